"""What a clip model is scored for: what it made, beside the baseline, and never what it was given."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, DataError
from ditkit.data.clips import MemoryClips, spread
from ditkit.data.loading import accepts_option, load_held_out
from ditkit.data.sets import moving_digits
from ditkit.metrics.error import pooled_psnr_db
from ditkit.metrics.features import EfficientNetLite0
from ditkit.metrics.image import psnr_db
from ditkit.metrics.perceptual import ClipFeature
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.report.film import BETWEEN_PX
from ditkit.report.legend import GIVEN_RGB
from ditkit.report.sheet import LINE
from ditkit.sample import Samples
from ditkit.tasks.video import scores as video_scores
from ditkit.tasks.video.figures import leadtime, write_films
from ditkit.tasks.video.masks import KINDS, UNCONDITIONAL, MaskKind
from ditkit.tasks.video.recipe import conditioned
from ditkit.tasks.video.scores import (
    Scores,
    VideoScores,
    complete,
    imagine,
)
from models_support import perturbed

T, SIDE = 8, 8
TINY = VDTConfig(channels=1, frames=T, size=SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())


@pytest.fixture(scope="module")
def model() -> VDT:
    torch.manual_seed(0)
    return perturbed(VDT(TINY), 0.3).requires_grad_(False)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.rand(3, 1, T, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


GIVING = [kind for kind in KINDS.values() if not kind.gives_nothing]
PREDICT = KINDS["predict"]
of_masks = pytest.mark.parametrize("kind", GIVING, ids=lambda kind: kind.name)


@of_masks
def test_only_what_was_made_is_scored(kind: MaskKind, clips: Tensor) -> None:
    """Against a loop over pixels, clips and frames."""
    mask = conditioned(clips, kind, [0, 1, 2]).mask
    assert mask is not None
    made = torch.where(mask, (clips + 0.1 * torch.randn_like(clips)).clamp(-1, 1), clips)
    scores = Scores.of(made, clips, mask)
    errors: dict[int, list[float]] = {t: [] for t in range(T)}
    for b, _, t, y, x in mask.nonzero().tolist():
        errors[t].append(float(made[b, 0, t, y, x] - clips[b, 0, t, y, x]) ** 2)
    pooled = [e for frame in errors.values() for e in frame]
    assert scores.psnr_db == pytest.approx(10 * math.log10(4 * len(pooled) / sum(pooled)))
    assert scores.psnr_db == pooled_psnr_db(made, clips, mask)
    for t, frame in errors.items():
        if not frame:
            assert scores.psnr_db_by_frame[t] is None and scores.ssim_by_frame[t] is None
            continue
        assert scores.psnr_db_by_frame[t] == pytest.approx(10 * math.log10(4 * len(frame) / sum(frame)))
        assert 0 < (scores.ssim_by_frame[t] or 0) < 1


def test_temporal_error_is_that_of_all_clips_together(clips: Tensor) -> None:
    made, mask = clips.roll(1, 2), torch.ones(3, 1, T, SIDE, SIDE, dtype=torch.bool)
    expected = (made - clips).diff(dim=2).norm() / clips.diff(dim=2).norm()
    assert Scores.of(made, clips, mask).temporal_error == pytest.approx(float(expected))
    assert Scores.of(clips[:, :, :1].expand_as(clips), clips, mask).temporal_error == pytest.approx(1)
    assert Scores.of(made[:, :, :1], clips[:, :, :1], mask[:, :, :1]).temporal_error is None


def test_the_truth_has_no_finite_psnr_and_stays_json(clips: Tensor) -> None:
    mask = torch.ones(3, 1, T, SIDE, SIDE, dtype=torch.bool)
    scores = Scores.of(clips, clips, mask)
    assert scores.psnr_db is None and scores.psnr_db_by_frame == (None,) * T
    assert scores.ssim == pytest.approx(1) and scores.temporal_error == 0


@of_masks
def test_given_content_comes_out_to_the_bit(kind: MaskKind, model: VDT, clips: Tensor) -> None:
    done = complete(model, clips, kind, seeds=[5, 6, 7], steps=2)
    assert done.mask is not None and done.truth is clips
    given = ~done.mask
    assert given.any() and torch.equal(done.generated[given], clips[given])
    assert not torch.equal(done.generated[done.mask], clips[done.mask])
    assert done.scores.clips == 3 and done.scores.evaluations == 2


def test_given_content_that_changed_is_an_error(
    model: VDT, clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(*args: Any, **options: Any) -> Samples:
        drawn = generate(*args, **options)
        return replace(drawn, samples=drawn.samples.nextafter(torch.tensor(9.0)))

    monkeypatch.setattr(video_scores, "generate", careless)
    with pytest.raises(AssertionError):
        complete(model, clips, PREDICT, seeds=[0, 1, 2], steps=1)


def test_the_baseline_of_a_prediction_repeats_the_last_frame(model: VDT, clips: Tensor) -> None:
    done = complete(model, clips, PREDICT, seeds=[0, 1, 2], steps=1)
    half = T // 2
    repeated = clips[:, :, half - 1 : half].expand(-1, -1, T - half, -1, -1)
    assert done.baseline is not None and torch.equal(done.baseline[:, :, half:], repeated)
    flat = psnr_db(repeated.reshape(1, -1), clips[:, :, half:].reshape(1, -1))
    assert done.scores.baseline is not None and done.scores.baseline.psnr_db == pytest.approx(float(flat))


def test_scores_are_of_frames_as_they_are_shown(model: VDT, clips: Tensor) -> None:
    done = complete(model, clips, PREDICT, seeds=[0, 1, 2], steps=1)
    assert done.generated.abs().max() > 1 and done.mask is not None
    assert done.scores.model == Scores.of(done.generated.clamp(-1, 1), clips, done.mask)


def test_a_clip_of_another_length_and_size(model: VDT) -> None:
    assert imagine(model, (1, 3, 12, 8), seeds=[0, 1], steps=1).generated.shape == (2, 1, 3, 12, 8)
    longer = torch.rand(1, 1, 2 * T, 12, 8)
    assert complete(model, longer, PREDICT, steps=1).generated.shape == longer.shape


def test_a_mask_that_gives_nothing_is_refused(model: VDT, clips: Tensor) -> None:
    with pytest.raises(ConfigError, match="'unconditional' gives nothing"):
        complete(model, clips, UNCONDITIONAL, seeds=[0, 1, 2], steps=1)


def test_frechet_distance_from_as_many_clips_as_it_needs(model: VDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of one frame's pixels stand for the network's: what is tested is when, and of what."""
    pixels = lambda self, network, clips, progress: clips[:, 0, 0].reshape(len(clips), -1)  # noqa: E731
    monkeypatch.setattr(ClipFeature, "extract", pixels)
    monkeypatch.setattr(video_scores, "CLIP_FEATURE", ClipFeature(0))
    with torch.device("meta"):
        network = EfficientNetLite0()
    enough = ClipFeature(0).clips_needed
    real = torch.rand(enough, 1, 2, 4, 8) * 2 - 1
    options: dict[str, Any] = {"extractor": network, "steps": 1, "batch_size": enough}
    scores = imagine(model, (1, 2, 4, 8), seeds=range(enough), real=real, **options).scores
    found = scores.frechet
    assert found is not None and (found.n_real, found.n_fake) == (enough, enough) and found.frechet > 0
    assert f"n = {enough} drawn" in " ".join(shown(VideoScores((scores,))).split())
    assert imagine(model, (1, 2, 4, 8), seeds=range(9), real=real[:9], **options).scores.frechet is None


def shown(scores: VideoScores, columns: int = 80) -> str:
    console = Console(width=columns, file=io.StringIO())
    with console.capture() as capture:
        console.print(scores.table())
    return capture.get()


def test_the_table_and_the_json_say_the_same(model: VDT, clips: Tensor) -> None:
    done = [
        complete(model, clips, KINDS[name], seeds=[0, 1, 2], steps=1).scores
        for name in ("predict", "random-frames")
    ]
    featured = replace(done[0], model=replace(done[0].model, feature_distance=0.1234))  # type: ignore[type-var]
    bare = imagine(model, (1, T, SIDE, SIDE), steps=1).scores
    scores = VideoScores((featured, done[1], bare))
    text = shown(scores)
    assert max(map(len, text.splitlines())) <= 80
    assert "0.123" in text and "features" in text and "…" not in text
    assert "features" not in shown(VideoScores(tuple(done)))
    back = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert [mask["mask"] for mask in back["masks"]] == ["predict", "random-frames", "unconditional"]
    for mask in back["masks"][:2]:
        assert f"{mask['model']['psnr_db']:.2f}" in text and f"{mask['baseline']['ssim']:.3f}" in text
    assert back["masks"][2]["model"] is None and back["masks"][2]["baseline"] is None


@pytest.mark.parametrize("kind", ["predict", "region"])
def test_a_film_is_black_where_nothing_was_given_and_outlines_what_was(
    kind: str, model: VDT, clips: Tensor, tmp_path: Path
) -> None:
    done = complete(model, clips[:1], KINDS[kind], steps=1)
    assert done.mask is not None
    write_films(tmp_path, done, 8.0)
    scale = 256 // SIDE
    left, right = scale * SIDE + BETWEEN_PX, 2 * scale * SIDE + BETWEEN_PX
    amber = torch.tensor(GIVEN_RGB, dtype=torch.uint8)
    with Image.open(tmp_path / f"{kind}.gif") as film:
        for t in range(T):
            film.seek(t)
            given = torch.from_numpy(np.array(film.convert("RGB").crop((left, LINE + 2, right, film.height))))
            made = done.mask[0, 0, t].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            outline = (given == amber).all(-1)
            assert (given[made] == 0).all()
            assert not outline[made].any() and outline.any() == (~made).any()


def test_lead_time_runs_over_predicted_frames(model: VDT, clips: Tensor) -> None:
    done = complete(model, clips, PREDICT, seeds=[0, 1, 2], steps=1)
    plot = leadtime(done.scores)
    assert plot is not None and [*plot.lead] == [1, 2, 3, 4]
    assert done.scores.model is not None
    assert tuple(plot.curves["model"]) == done.scores.model.psnr_db_by_frame[T // 2 :]
    still = clips[:, :, :1].expand_as(clips).contiguous()
    assert leadtime(complete(model, still, PREDICT, seeds=[0, 1, 2], steps=1).scores) is None
    assert leadtime(imagine(model, (1, T, SIDE, SIDE), steps=1).scores) is None


def test_held_out_clips_are_of_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def read(split: str) -> Tensor:
        asked.append(split)
        return torch.full((10, 28, 28), 200, dtype=torch.uint8)

    monkeypatch.setattr(moving_digits, "read_digits", read)
    (tmp_path / "film.mp4").touch()
    found = load_held_out("moving-digits", (16, 16), 5, length=7)
    assert asked == ["test"] and (len(found), found.frames, found.size) == (7, 5, (16, 16))
    assert (
        accepts_option("moving-digits", "split")
        and not accepts_option(tmp_path, "split")
        and accepts_option(tmp_path, "max_bad")
    )
    with pytest.raises(DataError, match="no-such-set"):
        load_held_out("no-such-set", (16, 16), 5)


def test_clips_are_chosen_over_the_whole_set() -> None:
    film = torch.zeros(12, 1, 4, 4, dtype=torch.uint8)
    windows = MemoryClips("films", (film,), ("a.mp4",), 10.0, frames=3)
    assert spread(windows, 3).indices.tolist() == [0, 3, 6]
    assert spread(windows, 10).indices.tolist() == list(range(10))
    with pytest.raises(ConfigError, match="films has 10 clips of 3 frames, asked for 11"):
        spread(windows, 11)
