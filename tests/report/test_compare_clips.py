"""Comparisons of clips: errors over what was made, frame by frame and of motion, and files that show them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from ditkit.api.compare import compare
from ditkit.bench.rows import headline
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli.main import main
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.data.sets import moving_digits
from ditkit.metrics.error import clip_errors, picture_errors, pooled_psnr_db
from ditkit.metrics.image import ssim
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.report.html import page
from ditkit.report.report import Report
from ditkit.report.strips import BETWEEN_PX, GIVEN_RGB, side_by_side
from ditkit.sample import sample
from ditkit.tasks.image import ImageTask
from ditkit.tasks.video import VideoTask
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.recipe import conditioned
from models_support import perturbed, save_tiny

STEPS, CONVERGED, SEEDS, FRAMES, SIZE = 8, 20, (0, 1, 2), 4, 16
POLICIES = (TaylorSeer(interval=1), TaylorSeer(interval=4, order=0))
OF_CLIPS = {"temporal_psnr_db", "psnr_by_frame_db"}
REQUIRED = OF_CLIPS | {
    "name", "seconds", "speedup", "macs", "macs_ratio", "peak_bytes", "policy_bytes", "identical", "psnr_db",
    "psnr_worst_db", "ssim", "relative_l2", "psnr_converged_db", "control_psnr_db", "receipt",
}  # fmt: skip


def tiny_vdt(**changes: object) -> VDT:
    options = {"channels": 1, "frames": FRAMES, "size": SIZE, "patch": 4, "width": 16, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    return perturbed(VDT(VDTConfig(**{**options, "convention": Convention(), **changes})), 0.1)


def tiny_video_dit() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(channels=1, frames=FRAMES, size=SIZE, patch=(1, 4, 4), width=24, depth=2, heads=2)
    return perturbed(VideoDiT(config), 0.1)


def told(kind: str = "predict", frames: int = FRAMES) -> Cond:
    clips = torch.rand(len(SEEDS), 1, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return conditioned(clips, mask_kind(kind), SEEDS)


def compared(model: Denoiser, policies=POLICIES, **settings) -> Report:
    quick = {"steps": STEPS, "converged_steps": CONVERGED, "rounds": 1, "memory": False, "guidance": 1}
    return compare(model, policies=policies, seeds=SEEDS, **(quick | settings))


@pytest.fixture(scope="module", params=[tiny_vdt, tiny_video_dit], ids=["VDT", "VideoDiT"])
def model(request) -> Denoiser:
    return request.param()


@pytest.fixture(scope="module")
def report(model) -> Report:
    return compared(model, cond=told(), controls_as_rows=True)


# -- errors against brute force


def of_values(x: Tensor, ref: Tensor, where: Tensor) -> float:
    """PSNR of the values that are chosen, one by one."""
    chosen = where.expand_as(x).flatten().tolist()
    pairs = zip(x.flatten().tolist(), ref.flatten().tolist(), chosen, strict=True)
    squares = [(a - b) ** 2 for a, b, made in pairs if made]
    return 10 * math.log10(4 * len(squares) / sum(squares))


def test_errors_are_of_what_was_made_and_of_nothing_else():
    ref, mask = torch.randn(3, 2, 4, 8, 8), torch.rand(3, 1, 4, 8, 8) > 0.5
    mask[:, :, 1] = False  # given to all
    mask[0, :, 2] = False  # given to one
    x = torch.where(mask, ref + 0.1 * torch.randn_like(ref), ref)
    found = clip_errors(x, ref, mask)
    assert found["psnr_db"] == pytest.approx(of_values(x, ref, mask), abs=1e-4)
    assert found["psnr_db"] < clip_errors(x, ref, None)["psnr_db"]
    worst = min(of_values(x[i], ref[i], mask[i]) for i in range(3))
    assert found["psnr_worst_db"] == pytest.approx(worst, abs=1e-4)
    made = mask.expand_as(x)
    ratios = [float((x - ref)[i].norm() / ref[i][made[i]].norm()) for i in range(3)]
    assert found["relative_l2"] == pytest.approx(sum(ratios) / 3, rel=1e-5)
    by_frame = found["clip"].psnr_by_frame_db
    assert by_frame[1] is None
    for t in (0, 2, 3):
        assert by_frame[t] == pytest.approx(of_values(x[:, :, t], ref[:, :, t], mask[:, :, t]), abs=1e-4)
    assert found["clip"].worst_frame() == min(((t, by_frame[t]) for t in (0, 2, 3)), key=lambda pair: pair[1])
    counted = mask[:, :, 1:] | mask[:, :, :-1]
    assert found["clip"].temporal_psnr_db == pytest.approx(
        of_values(x.diff(dim=2), ref.diff(dim=2), counted), abs=1e-3
    )


def test_ssim_is_the_mean_over_frames_of_each_frame():
    ref = torch.rand(2, 3, 4, 8, 8) * 2 - 1
    x = ref + 0.1 * torch.randn_like(ref)
    each = [ssim(x[:, :, t], ref[:, :, t]) for t in range(4)]
    assert clip_errors(x, ref, None)["ssim"] == pytest.approx(float(torch.stack(each).mean()), abs=1e-9)
    mask = torch.ones(2, 1, 4, 8, 8, dtype=torch.bool)
    mask[:, :, :2] = False
    assert clip_errors(x, ref, mask)["ssim"] == pytest.approx(float(torch.stack(each[2:]).mean()), abs=1e-9)


def test_a_constant_shift_is_no_error_of_motion_and_flicker_is():
    ref = torch.rand(2, 1, 4, 8, 8).double()
    assert clip_errors(ref + 0.25, ref, None)["clip"].temporal_psnr_db is None
    sign = torch.tensor([1, -1, 1, -1]).view(1, 1, 4, 1, 1)
    found = clip_errors(ref + 0.1 * sign, ref, None)
    assert found["psnr_db"] == pytest.approx(10 * math.log10(4 / 0.01))
    assert found["clip"].temporal_psnr_db == pytest.approx(10 * math.log10(4 / 0.04))


def test_pictures_and_identical_clips_have_no_errors_of_clips():
    picture, clip = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 2, 8, 8)
    assert picture_errors(picture, 0.9 * picture, None)["clip"] is None
    found = clip_errors(clip, clip, None)
    assert (found["identical"], found["psnr_db"], found["psnr_worst_db"], found["relative_l2"]) == (
        True, None, None, 0,
    )  # fmt: skip
    assert vars(found["clip"]) == {"temporal_psnr_db": None, "psnr_by_frame_db": (None, None)}


# -- whole comparisons


def test_every_row_has_all_keys_and_neutral_is_identical(report):
    saved = report.as_dict()
    assert [row["kind"] for row in saved["rows"]] == ["exact", "policy", "policy", "control"]
    for row in saved["rows"]:
        assert set(row) >= REQUIRED
        assert len(row["psnr_by_frame_db"]) == FRAMES
        assert set(row["psnr_by_frame_db"][: FRAMES // 2]) == {None}  # given
    exact, neutral, forecast, control = report.rows
    for row in (exact, neutral):
        assert row.identical
        assert (row.psnr_db, row.temporal_psnr_db, row.relative_l2) == (None, None, 0)
        assert row.clip.psnr_by_frame_db == (None,) * FRAMES
    for row in (forecast, control):
        assert math.isfinite(row.temporal_psnr_db)
        assert all(map(math.isfinite, row.clip.psnr_by_frame_db[FRAMES // 2 :]))
        assert row.ssim < 1
    assert set(saved["definitions"]) >= OF_CLIPS
    assert saved["settings"]["generated"] == 0.5


def test_rows_say_what_separate_runs_say(model, report):
    cond = told()
    if model.config.classes:
        cond = replace(cond, label=torch.zeros(len(SEEDS), dtype=torch.long))
    exact, forecast, converged, fewer = (
        sample(model, cond, SEEDS, steps=steps, policies=policies).samples
        for steps, policies in (
            (STEPS, ()),
            (STEPS, POLICIES[1:]),
            (CONVERGED, ()),
            (report.rows[3].steps, ()),
        )
    )
    row, made = report.rows[2], cond.mask
    assert row.psnr_db == pytest.approx(of_values(forecast, exact, made), abs=1e-3)
    assert row.psnr_converged_db == pooled_psnr_db(forecast, converged, made)
    assert row.control_psnr_db == pooled_psnr_db(fewer, exact, made) == report.rows[3].psnr_db
    assert row.control_psnr_converged_db == pooled_psnr_db(fewer, converged, made)
    half = forecast[:, :, FRAMES // 2 :], exact[:, :, FRAMES // 2 :]
    assert row.psnr_db == pooled_psnr_db(*half)
    assert torch.equal(forecast[:, :, : FRAMES // 2], cond.context[:, :, : FRAMES // 2])


def test_unconditional_clips_need_no_cond_and_any_length_is_compared(model):
    report = compared(model, shape=(1, 6, SIZE, SIZE), control=False)
    assert "generated" not in report.settings
    assert report.pictures["exact"].shape == (len(SEEDS), 6, 1, SIZE, SIZE)
    assert None not in report.rows[2].clip.psnr_by_frame_db


def test_a_clip_of_one_frame_has_no_motion(tmp_path):
    report = compared(tiny_vdt(frames=1), POLICIES[1:], control=False)
    row = report.rows[1]
    assert row.temporal_psnr_db is None
    assert row.clip.psnr_by_frame_db == (pytest.approx(row.psnr_db),)
    assert len(report.save(tmp_path)) == 3


def test_memory_is_measured_in_a_process_that_is_told_what_is_given():
    report = compared(tiny_vdt(), POLICIES[1:], cond=told(), memory=True, control=False, batch_size=2)
    for row in report.rows:
        assert 0 < row.peak_added_bytes < row.peak_bytes


# -- what is looked at


def test_the_files_show_clips(report, tmp_path):
    from PIL import Image

    from ditkit.report.sheet import LABEL_WIDTH, LINE, MARGIN

    assert [path.name for path in report.save(tmp_path)] == ["report.json", "report.html", "sheet.png"]
    text = (tmp_path / "report.html").read_text(encoding="utf8")
    assert text.count("<img ") == 2 * (len(report.rows) + 1)
    assert text.count('<svg viewBox="0 0 560') == 4
    for words in (
        "<h2>Clips</h2>",
        "The first 2 of 3 clips.",
        "4 frames of 16 x 16, 50% given",
        "worst frame",
    ):
        assert words in text
    assert "picture" not in text.partition("<details>")[0]
    cell = 80 + BETWEEN_PX  # 16 pixels enlarged 5 times
    sheet = Image.open(tmp_path / "sheet.png")
    corner = MARGIN + LABEL_WIDTH, MARGIN + LINE
    outlined = [sheet.getpixel((corner[0] + i * cell, corner[1])) == GIVEN_RGB for i in range(FRAMES)]
    assert outlined == [True, True, False, False]
    last = report.pictures["exact"][0, FRAMES - 1, 0, 0, 0].item()
    assert sheet.getpixel((corner[0] + (FRAMES - 1) * cell, corner[1])) == (last,) * 3


def test_frames_stand_beside_each_other_in_order():
    clips = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 4, 1, 1, 1).expand(2, 4, 1, 40, 40)
    strips = side_by_side(clips, [0, 2, 3])
    assert strips.shape == (2, 3, 80, 3 * 80 + 2 * BETWEEN_PX)
    for place, value in enumerate((0, 20, 30)):
        assert (strips[..., place * (80 + BETWEEN_PX) :][..., :80] == value).all()
    assert (strips[..., 80 : 80 + BETWEEN_PX] == 255).all()


def test_the_table_reads_at_80_columns(report):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    heads, row = next(line for line in lines if "motion" in line), report.rows[2]
    assert f"{row.temporal_psnr_db:.1f}" in " ".join(lines)
    assert "…" not in heads
    assert "to its clips" in headline(report.rows, "clip") or "identical clips" in headline(
        report.rows, "clip"
    )


def test_pages_of_pictures_have_no_word_of_clips(report):
    rows = [replace(row, clip=None) for row in report.rows]
    settings = {**report.settings, "shape": [1, SIZE, SIZE], "seeds": [0]}
    settings.pop("generated")
    pictures = {name: clips[:1, 0] for name, clips in report.pictures.items()}
    text = page(rows, settings, "", ImageTask(), pictures=pictures, captions=report.captions(), heads=["0"])
    body = text.partition("<body>")[2].partition("<details>")[0]
    said = re.sub(r' title="[^"]*"', "", body)
    assert not re.search("clip|frame|motion|films", said)


# -- bad input, and the command line


def test_what_cannot_be_compared_is_refused_in_one_line():
    cond = told()
    whole = replace(cond, mask=cond.mask & torch.tensor([True, False, True]).view(3, 1, 1, 1, 1))
    odd = replace(cond, context=cond.context * torch.nan)
    for settings, message in (
        ({"cond": whole}, "Cond.mask: sample 1 is all 0, which leaves nothing to be generated"),
        ({"cond": odd}, "Cond.context: nan in sample 0, frame 0, expected finite numbers"),
        ({"real": torch.zeros(5, 3, 8, 8)}, "real: no distance of distributions for clips"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            compared(tiny_vdt(), **settings)
        assert "\n" not in str(caught.value)


@pytest.fixture
def digits(monkeypatch) -> None:
    """Moving digits without their package: noise instead of handwriting, another in each split."""

    def read(split: str) -> Tensor:
        generator = torch.Generator().manual_seed(moving_digits.SPLITS.index(split))
        return torch.randint(256, (20, 28, 28), generator=generator, dtype=torch.uint8)

    monkeypatch.setattr(moving_digits, "read_digits", read)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_vdt().save(tmp_path_factory.mktemp("vdt"))


def command(folder: Path, out: Path, *words: str) -> int:
    flags = ["--policy", "taylorseer:interval=4,order=0", "--seeds", "0..2", "--steps", str(STEPS)]
    quick = ["--rounds", "1", "--no-memory", "--converged-steps", str(CONVERGED), "--guidance", "1"]
    return main(["compare", str(folder), *flags, *quick, *words, "--out", str(out)])


def test_the_command_gives_clips_of_the_held_out_split_in_part(folder, tmp_path, digits, capsys):
    assert command(folder, tmp_path, "--data", "moving-digits", "--mask", "interpolate") == 0
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["settings"]["generated"] == 0.75
    assert [value is None for value in saved["rows"][1]["psnr_by_frame_db"]] == [True, False, False, False]
    assert "motion" in capsys.readouterr().out


def test_clips_are_spread_over_the_held_out_split(folder, digits):
    real, cond = VideoTask().reference(tiny_vdt(), "moving-digits", None, SEEDS)
    held_out = moving_digits.load(SIZE, FRAMES, split="test")
    spread = held_out.clips(torch.tensor([0, 3333, 6666]))
    assert real is None
    assert torch.equal(cond.context, spread)
    assert cond.mask[:, :, : FRAMES // 2].sum() == 0  # predict
    assert cond.mask[:, :, FRAMES // 2 :].all()


def test_the_command_draws_whole_clips_without_data(folder, tmp_path):
    assert command(folder, tmp_path, "--mask", "unconditional") == 0
    assert "generated" not in json.loads((tmp_path / "report.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--mask", "predict"], ["--mask predict", "--data"]),
        (["--mask", "predcit", "--data", "moving-digits"], ["'predcit'", "did you mean 'predict'?"]),
        (
            ["--mask", "unconditional", "--data", "moving-digits"],
            ["--mask unconditional", "--data moving-digits"],
        ),
        (["--data", "moving-digit"], ["'moving-digit'", "did you mean 'moving-digits'?"]),
    ],
)
def test_wrong_combinations_are_one_line(folder, tmp_path, digits, capsys, words, quoted):
    out = tmp_path / "out"
    assert command(folder, out, *words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert [part for part in quoted if part not in line] == []
    assert not out.exists()


def test_a_model_of_pictures_takes_no_mask_and_one_of_other_channels_no_such_clips(tmp_path, digits, capsys):
    assert command(save_tiny(tmp_path / "dit"), tmp_path / "out", "--mask", "predict") == 2
    assert "--mask predict with a model of pictures" in capsys.readouterr().err
    assert (
        command(tiny_vdt(channels=3).save(tmp_path / "v"), tmp_path / "out", "--data", "moving-digits") == 2
    )
    assert "moving-digits has 1 channels, the model draws 3" in capsys.readouterr().err
