"""`ditkit train`: a codec, then a model of its latents; a clip's length, size and patch by one flag each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import ditkit
from cli_support import Capture, complaint, exit_code
from ditkit.cli.train import found
from ditkit.core.model import Denoiser
from ditkit.data.sets import moving_digits
from ditkit.report.sheet import write_png

QUICK = [
    "--batch",
    "4",
    "--warmup",
    "0",
    "--precision",
    "float32",
    "--snapshot-every",
    "0",
    "--save-every",
    "0",
]
VAE = ["--size", "16", "--widths", "8", "16", "--groups", "4", "--steps", "3", *QUICK]
TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--sheet-every", "0", *QUICK]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(8):
        place = tmp_path / "pictures" / ("warm" if i % 2 else "cold") / f"{i}.png"
        write_png(place, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)))
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares stand for the handwritten digits."""
    squares = torch.zeros(10, 28, 28, dtype=torch.uint8)
    squares[:, 6:22, 6:22] = 255
    monkeypatch.setattr(moving_digits, "read_digits", lambda split: squares)


def said(capsys: Capture, *words: object) -> str:
    """What `ditkit WORDS` prints; it must succeed."""
    code = exit_code(*words)
    captured = capsys.readouterr()
    assert code == 0, captured
    return captured.out


def told(text: str) -> dict[str, str]:
    """The lines of a dry run."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())


def test_a_codec_then_a_model_of_its_latents_then_pictures(
    pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    vae, run = tmp_path / "vae", tmp_path / "run"
    text = said(capsys, "train", "image-vae", "--data", pictures, "--sheet-every", "3", *VAE, "--out", vae)
    (line,) = text.splitlines()
    assert line.startswith(f"wrote {vae}: model, losses.jsonl, samples")
    assert line.endswith(f"go on with: ditkit train emoji --codec {vae / 'model'}")
    with Image.open(vae / "samples" / "000003.png") as sheet:
        assert sheet.width > 8 * 16  # eight pictures beside each other

    latent = [
        "--data",
        pictures,
        "--size",
        "16",
        "--patch",
        "2",
        "--codec",
        vae / "model",
        "--steps",
        "2",
        *TINY,
    ]
    lines = told(said(capsys, "train", "emoji", *latent, "--dry-run"))
    assert lines["codec"] == f"{vae / 'model'}, latents [4, 8, 8]"
    assert (lines["model.size"], lines["model.channels"]) == ("8", "4") and not run.exists()

    text = said(capsys, "train", "emoji", *latent, "--out", run)
    assert text.endswith(f"go on with: ditkit generate {run / 'model'}\n")
    drawn = [
        "generate",
        run / "model",
        "--label",
        "warm",
        "--seeds",
        "5",
        "--steps",
        "2",
        "--out",
        tmp_path / "out",
    ]
    assert "warm-5.png" in said(capsys, *drawn)
    with Image.open(tmp_path / "out" / "warm-5.png") as picture:
        assert picture.size == (16, 16)


@pytest.mark.parametrize("name", [name for name, build in found().items() if not build().latent])
def test_a_recipe_that_learns_no_latents_refuses_a_codec(name: str, tmp_path: Path, capsys: Capture) -> None:
    for more in ([], ["--dry-run"]):
        line = complaint(capsys, "train", name, "--codec", "my-vae", "--out", tmp_path / "run", *more)
        assert "codec='my-vae'" in line and "learns no latents" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name, build in found().items() if build().latent])
def test_a_codec_that_is_not_there_is_missed_before_the_data_are_read(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    words = [
        "train",
        name,
        "--codec",
        tmp_path / "nowhere",
        "--data",
        tmp_path / "none",
        "--out",
        tmp_path / "run",
    ]
    assert f"cannot read {tmp_path / 'nowhere' / 'config.json'}" in complaint(capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ([], (1, 16, 32, 32)),
        (["--frames", "8"], (1, 8, 32, 32)),
        (["--size", "64"], (1, 16, 64, 64)),
        (["--patch", "4"], (1, 16, 32, 32)),
        (["--frames", "8", "--size", "16", "--patch", "2"], (1, 8, 16, 16)),
    ],
    ids=["as it is", "length", "size", "patch", "all"],
)
def test_length_size_and_patch_of_a_clip_are_one_flag_each(
    flags: list[str], shape: tuple[int, ...], tmp_path: Path, capsys: Capture
) -> None:
    words = ["train", "vdt", "--steps", "1", *TINY, "--batch", "1", *flags]
    lines = told(said(capsys, *words, "--dry-run"))
    channels, frames, height, width = shape
    assert f"clips [{channels}, {frames}, {height}, {width}]" in lines["data"]
    assert lines["model.frames"] == str(frames) and lines["model.size"] == f"({height}, {width})"

    assert f"ditkit video {tmp_path / 'model'}" in said(capsys, *words, "--out", tmp_path)
    model = ditkit.load(tmp_path / "model")
    assert isinstance(model, Denoiser) and model.sample_shape == shape
    clip = ditkit.generate(model, seeds=[0], steps=1, guidance=1.0).samples
    assert tuple(clip.shape[1:]) == shape and clip.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--size", "62"], "size=62 does not divide into patches of 4"),
        (["--patch", "5"], "does not divide into patches of 5"),
        (["--frames", "0"], "frames=0 should be at least 1"),
    ],
    ids=" ".join,
)
def test_a_clip_that_cannot_be_made_is_refused(
    flags: list[str], expected: str, tmp_path: Path, capsys: Capture
) -> None:
    for more in ([], ["--dry-run"]):
        words = ["train", "vdt", *flags, "--steps", "1", *TINY, "--out", tmp_path / "run", *more]
        assert expected in complaint(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_a_token_of_a_video_dit_spans_frames_by_one_flag(capsys: Capture) -> None:
    def macs(*flags: str) -> int:
        lines = told(said(capsys, "train", "video-dit", "--dry-run", "--data", "moving-digits", *flags))
        return int(lines["MACs of a sample"].split()[0].replace(",", ""))

    plain = macs()
    assert macs("--patch", "2", "8", "8") < plain / 2 < macs("--frames", "12") < plain
    assert macs("--size", "16") < plain / 4


@pytest.mark.parametrize("frames", ["1", "2"])
def test_the_training_sheet_leaves_out_what_a_short_clip_has_no_room_for(
    frames: str, tmp_path: Path, capsys: Capture
) -> None:
    words = [
        "train",
        "vdt",
        "--frames",
        frames,
        "--steps",
        "1",
        *TINY,
        "--sheet-every",
        "1",
        "--out",
        tmp_path,
    ]
    assert "samples" in said(capsys, *words)
    assert (tmp_path / "samples" / "000001.png").exists()
