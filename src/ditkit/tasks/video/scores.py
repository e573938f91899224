"""Scores of clips that are given in part and completed, beside a baseline that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from rich import box
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.bench.rows import NOTHING
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.task import Progress
from ditkit.core.terminal import Table
from ditkit.metrics.baselines import blended
from ditkit.metrics.error import finite, pooled_psnr_db
from ditkit.metrics.features import EfficientNetLite0
from ditkit.metrics.perceptual import FEATURE_DISTANCE, ClipDistance, ClipFeature, frame_feature_distance
from ditkit.metrics.video import frame_psnr_db, frame_ssim, temporal_relative_l2
from ditkit.sample import Samples, Sampling, Unguided
from ditkit.tasks.video.masks import UNCONDITIONAL, MaskKind
from ditkit.tasks.video.recipe import conditioned
from ditkit.tasks.video.task import VideoTask

CLIP_FEATURE = ClipFeature()
COLUMNS = {"psnr_db": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "temporal_error": ("temporal error", 3)}
FEATURE_COLUMN = {"feature_distance": ("features", 3)}
"""Head and digits by score."""
EXPLAINED = (
    "Frames as they are shown, over what was generated of them; PSNR of the squared error of all clips together. "
    "temporal error: relative L2 of the differences between frames, 1 for standing still. "
    "baseline: the nearest given frame, or a linear blend of the two around the gap."
)


@dataclass(frozen=True)
class Scores:
    """Distances between clips and the truth, over what was generated; None where there is no finite number.

    Args:
        psnr_db: of the squared error averaged over the generated pixels of all clips.
        ssim: averaged over the frames of which something was generated, in each over what was generated.
        temporal_error: ||dx - dref|| / ||dref|| of the frame differences of all clips; 1 for standing still.
        feature_distance: `FEATURE_DISTANCE`, averaged over the same frames as whole pictures, if asked for.
        psnr_db_by_frame, ssim_by_frame: the same at each of the T frames.
    """

    psnr_db: float | None
    ssim: float | None
    temporal_error: float | None
    feature_distance: float | None
    psnr_db_by_frame: tuple[float | None, ...]
    ssim_by_frame: tuple[float | None, ...]

    @classmethod
    def of(
        cls, clips: Tensor, truth: Tensor, mask: Tensor, extractor: EfficientNetLite0 | None = None
    ) -> Self:
        """Score clips [B, C, T, H, W] with a mask [B, 1, T, H, W], true where they were generated.

        Raises:
            ShapeError, DataError: as `ditkit.metrics.video` does.
        """
        joined = [_joined(x) for x in (clips, truth, mask)]
        similarity = frame_ssim(clips, truth, mask)  # [B, T]
        features = None
        if extractor is not None:
            distance = frame_feature_distance(extractor, clips, truth)  # [B, T]
            features = float(distance[mask.any((1, 3, 4))].mean())
        return cls(
            psnr_db=pooled_psnr_db(clips, truth, mask),
            ssim=finite(similarity.nanmean().item()),
            temporal_error=finite(temporal_relative_l2(*joined).item()) if clips.shape[2] > 1 else None,
            feature_distance=features,
            psnr_db_by_frame=tuple(map(finite, frame_psnr_db(*joined)[0].tolist())),
            ssim_by_frame=tuple(map(finite, similarity.nanmean(0).tolist())),
        )


@dataclass(frozen=True)
class MaskScores:
    """Scores of the clips under one kind of mask.

    Args:
        model, baseline: None where nothing was given, so that there is no truth to compare with.
        frechet: between unconditional clips and as many of the data; None for fewer than it needs.
        seconds: wall clock of drawing all clips. evaluations: in one trajectory.
    """

    mask: str
    clips: int
    model: Scores | None
    baseline: Scores | None
    frechet: ClipDistance | None
    seconds: float
    evaluations: int
    policy_bytes: int
    receipts: tuple[dict[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Completed:
    """The clips behind `scores`, [B, C, T, H, W].

    Args:
        truth, baseline, mask: None where nothing was given. mask: bool [B, 1, T, H, W], true where generated.
    """

    kind: MaskKind
    scores: MaskScores
    generated: Tensor
    truth: Tensor | None = None
    baseline: Tensor | None = None
    mask: Tensor | None = None

    def first(self, count: int) -> Self:
        """Return the first clips alone, with the scores of all."""
        kept = {
            name: value[:count].clone()
            for name in ("generated", "truth", "baseline", "mask")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **kept)


@dataclass(frozen=True)
class VideoScores:
    """The scores of several kinds of masks."""

    masks: tuple[MaskScores, ...]

    @property
    def measured(self) -> bool:
        """True if there was anything to compare with."""
        return any(scores.model or scores.frechet for scores in self.masks)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the name of what the feature distance is."""
        return {"feature_distance": FEATURE_DISTANCE, "masks": [asdict(scores) for scores in self.masks]}

    def table(self) -> Table:
        """Make a line for the model and one for the baseline of each mask, in 80 columns."""
        with_features = any(
            scores.model and scores.model.feature_distance is not None for scores in self.masks
        )
        columns = COLUMNS | (FEATURE_COLUMN if with_features else {})
        about = [EXPLAINED, *([f"features: distance over {FEATURE_DISTANCE}."] if with_features else [])]
        for scores in self.masks:
            if (found := scores.frechet) is not None:
                about.append(
                    f"{scores.mask}: Frechet distance {found.frechet:.3f} over {found.name}, "
                    f"n = {found.n_fake} drawn, {found.n_real} real."
                )
        out = Table(
            box=box.SIMPLE_HEAD, caption="\n".join(about), caption_justify="left", padding=(0, 1, 0, 0)
        )
        for head in ("mask", "clips", "from"):
            out.add_column(head, no_wrap=True)
        for head, _ in columns.values():
            out.add_column(head, justify="right", no_wrap=True)
        for scores in self.masks:
            out.add_row(scores.mask, str(scores.clips), "model", *_cells(scores.model, columns))
            if scores.baseline is not None:
                out.add_row("", "", "baseline", *_cells(scores.baseline, columns))
        return out


def complete(
    model: Denoiser,
    clips: Tensor,
    kind: MaskKind,
    *,
    label: Tensor | None = None,
    sampling: Sampling = Sampling(guidance=Unguided()),
    extractor: EfficientNetLite0 | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Completed:
    """Generate again what masks of this kind leave out of clips [B, C, T, H, W], one seed a clip.

    Args:
        label: the class of each clip, int64 [B], for a model of classes.
        sampling, changes: the settings, and words of `Sampling` that differ; by default there is no guidance.
        extractor: of the features of the feature distance, which is measured if it is there.

    Raises:
        ConfigError: a mask that gives nothing, or a clip too short for it. As `generate` does.
    """
    if kind.gives_nothing:
        raise ConfigError(
            f"mask {kind.name!r} gives nothing of a clip, expected one that does; see `imagine`"
        )
    sampling = sampling.changed(**changes)
    cond = conditioned(clips, kind, sampling.seeds, label)
    assert cond.mask is not None
    baseline = blended(clips, cond.mask)
    plain = Scores.of(baseline, clips, cond.mask, extractor)
    drawn = generate(model, cond=cond, sampling=sampling, progress=_stage(progress, kind))
    _check_given(drawn.samples, clips, cond.mask)
    near = Scores.of(drawn.samples.clamp(-1, 1), clips, cond.mask, extractor)
    return Completed(kind, _scores(kind, drawn, near, plain), drawn.samples, clips, baseline, cond.mask)


def imagine(
    model: Denoiser,
    shape: Sequence[int],
    *,
    label: Tensor | None = None,
    sampling: Sampling = Sampling(guidance=Unguided()),
    real: Tensor | None = None,
    extractor: EfficientNetLite0 | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Completed:
    """Generate clips of `shape` (C, T, H, W) of which nothing is given, one a seed.

    Args:
        label: as of `complete`.
        sampling, changes: as of `complete`; guidance that no other network takes part in has nothing to favour.
        real: clips [B, C, T, H, W] to measure the Frechet distance to, with the features of `extractor`; it needs
            `CLIP_FEATURE.clips_needed` of either, and fewer are not measured.

    Raises:
        As `generate` does.
    """
    drawn = generate(
        model,
        cond=Cond(label=label),
        shape=shape,
        sampling=sampling,
        progress=_stage(progress, UNCONDITIONAL),
        **changes,
    )
    frechet, count = None, len(drawn.seeds)
    if extractor is not None and real is not None and min(len(real), count) >= CLIP_FEATURE.clips_needed:
        tell = None if progress is None else partial(progress, "features")
        features = [
            CLIP_FEATURE.extract(extractor, x, progress=tell) for x in (real, drawn.samples.clamp(-1, 1))
        ]
        frechet = CLIP_FEATURE.distance(*features)
    return Completed(UNCONDITIONAL, _scores(UNCONDITIONAL, drawn, frechet=frechet), drawn.samples)


def score(
    model: Denoiser,
    kind: MaskKind,
    truth: Tensor | None,
    shape: Sequence[int],
    *,
    sampling: Sampling,
    label: Tensor | None = None,
    extractor: EfficientNetLite0 | None = None,
    progress: Progress | None = None,
) -> Completed:
    """Generate clips under one kind of mask; where nothing is given, only a class or another network can guide.

    Args:
        truth: clips of `shape`, None only for a mask that gives nothing.
        label: the class of each clip, int64 [n], for a model of classes.
    """
    if not kind.gives_nothing:
        assert truth is not None  # the caller has refused other kinds without data
        return complete(
            model, truth, kind, label=label, sampling=sampling, extractor=extractor, progress=progress
        )
    if label is None:
        sampling = VideoTask().settle(sampling)
    return imagine(
        model, shape, label=label, sampling=sampling, real=truth, extractor=extractor, progress=progress
    )


def _stage(progress: Progress | None, kind: MaskKind) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, f"drawing, {kind.name}")


def _check_given(generated: Tensor, clips: Tensor, mask: Tensor) -> None:
    """Check that given content comes out as it went in, to the bit."""
    given = ~mask.expand_as(clips)
    assert torch.equal(generated[given].view(torch.int32), clips[given].view(torch.int32))


def _scores(
    kind: MaskKind,
    drawn: Samples,
    model: Scores | None = None,
    baseline: Scores | None = None,
    frechet: ClipDistance | None = None,
) -> MaskScores:
    return MaskScores(
        mask=kind.name,
        clips=len(drawn.seeds),
        model=model,
        baseline=baseline,
        frechet=frechet,
        seconds=drawn.seconds,
        evaluations=drawn.evaluations,
        policy_bytes=drawn.policy_bytes,
        receipts=tuple(receipt.as_dict() for receipt in drawn.receipts),
    )


def _joined(clips: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [1, C, T, B H, W]: all clips as one, below each other, whose mean is theirs."""
    return clips.permute(1, 2, 0, 3, 4).flatten(2, 3).unsqueeze(0)


def _cells(scores: Scores | None, columns: Mapping[str, tuple[str, int]]) -> list[str]:
    values = [(getattr(scores, name, None), digits) for name, (_, digits) in columns.items()]
    return [NOTHING if value is None else f"{value:.{digits}f}" for value, digits in values]
