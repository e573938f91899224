"""What a model makes of clips that it is told in part, beside what anybody can do without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ditkit.api.generate import Generated, generate
from ditkit.bench.rows import NOTHING
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.metrics.baselines import blended
from ditkit.metrics.error import finite, pooled_psnr_db
from ditkit.metrics.features import EfficientNetLite0
from ditkit.metrics.perceptual import FEATURE_DISTANCE, ClipDistance, ClipFeature, frame_feature_distance
from ditkit.metrics.video import frame_psnr_db, frame_ssim, temporal_relative_l2
from ditkit.tasks.video.recipe import conditioned

UNCONDITIONAL = "unconditional"
CLIP_FEATURE = ClipFeature()
COLUMNS = {"psnr_db": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "temporal_error": ("temporal error", 3)}
FEATURE_COLUMN = {"feature_distance": ("features", 3)}
"""Head and digits by score."""
EXPLAINED = (
    "Frames as they are shown, over what was made of them; PSNR of the squared error of all clips together. "
    "temporal error: relative L2 of the differences between frames, 1 for standing still. "
    "baseline: the nearest given frame, or a linear blend of the two around the gap."
)
Progress = Callable[[str, int, int], None]  # (what is being done, so many done, so many in all)


@dataclass(frozen=True)
class Scores:
    """Distances between clips and the truth, over what was made; None where there is no finite number.

    Args:
        psnr_db: of the squared error averaged over the made pixels of all clips.
        ssim: averaged over the frames of which something was made, in each over what was made.
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
    def of(cls, clips: Tensor, truth: Tensor, mask: Tensor, network: EfficientNetLite0 | None = None) -> Self:
        """Of clips [B, C, T, H, W] and a mask [B, 1, T, H, W], true where they were made.

        Raises:
            ShapeError, DataError: as `ditkit.metrics.video` does.
        """
        joined = [_joined(x) for x in (clips, truth, mask)]
        similarity = frame_ssim(clips, truth, mask)  # [B, T]
        features = None
        if network is not None:
            distance = frame_feature_distance(network, clips, truth)  # [B, T]
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
    """What masks of one kind gave.

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
        truth, baseline, mask: None where nothing was given. mask: bool [B, 1, T, H, W], true where content was made.
    """

    scores: MaskScores
    made: Tensor
    truth: Tensor | None = None
    baseline: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class VideoScores:
    """The scores of several kinds of masks."""

    masks: tuple[MaskScores, ...]

    @property
    def measured(self) -> bool:
        """Whether there was anything to compare with."""
        return any(scores.model or scores.frechet for scores in self.masks)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the name of what the feature distance is."""
        return {"feature_distance": FEATURE_DISTANCE, "masks": [asdict(scores) for scores in self.masks]}

    def table(self) -> Table:
        """A line for the model and one for the baseline of each mask, in 80 columns."""
        asked = any(scores.model and scores.model.feature_distance is not None for scores in self.masks)
        columns = COLUMNS | (FEATURE_COLUMN if asked else {})
        about = [EXPLAINED, *([f"features: distance over {FEATURE_DISTANCE}."] if asked else [])]
        for scores in self.masks:
            if (found := scores.frechet) is not None:
                about.append(
                    f"{scores.mask}: Frechet distance {found.frechet:.3f} over {found.name}, "
                    f"n = {found.n_fake} drawn, {found.n_real} real."
                )
        out = Table(
            box=box.SIMPLE_HEAD, caption="\n".join(about), caption_justify="left", padding=(0, 1, 0, 0)
        )
        for head in ("mask", "clips", "made by"):
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
    mask: str,
    seeds: Sequence[int],
    *,
    network: EfficientNetLite0 | None = None,
    progress: Progress | None = None,
    **drawing: Any,
) -> Completed:
    """Clips [B, C, T, H, W] made again from what masks of this kind leave of them, one seed a clip.

    Args:
        network: asks for the feature distance.
        drawing: options of `generate`, such as steps and policies; there is no guidance unless it is asked for.

    Raises:
        ConfigError: an unknown mask, one that gives nothing, or a clip too short for it. As `generate` does.
    """
    cond = conditioned(clips, mask, seeds)
    assert cond.mask is not None
    if cond.mask.all():
        raise ConfigError(f"mask {mask!r} gives nothing of a clip, expected one that does; see `imagine`")
    baseline = blended(clips, cond.mask)
    plain = Scores.of(baseline, clips, cond.mask, network)
    drawn = _drawn(model, seeds, mask, progress, cond=cond, **drawing)
    _check_given(drawn.images, clips, cond.mask)
    near = Scores.of(drawn.images.clamp(-1, 1), clips, cond.mask, network)
    return Completed(_scores(mask, drawn, near, plain), drawn.images, clips, baseline, cond.mask)


def imagine(
    model: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    real: Tensor | None = None,
    network: EfficientNetLite0 | None = None,
    progress: Progress | None = None,
    **drawing: Any,
) -> Completed:
    """Clips of `shape` (C, T, H, W) of which nothing is given, one a seed.

    Args:
        real: clips [B, C, T, H, W] to measure the Frechet distance to, with the features of `network`; it needs
            `CLIP_FEATURE.clips_needed` of either, and fewer are not measured.

    Raises:
        As `generate` does.
    """
    drawn = _drawn(model, seeds, UNCONDITIONAL, progress, shape=shape, **drawing)
    frechet = None
    if network is not None and real is not None and min(len(real), len(seeds)) >= CLIP_FEATURE.clips_needed:
        tell = None if progress is None else partial(progress, "features")
        features = [
            CLIP_FEATURE.extract(network, x, progress=tell) for x in (real, drawn.images.clamp(-1, 1))
        ]
        frechet = CLIP_FEATURE.distance(*features)
    return Completed(_scores(UNCONDITIONAL, drawn, frechet=frechet), drawn.images)


def _drawn(
    model: Denoiser, seeds: Sequence[int], mask: str, progress: Progress | None, **drawing: Any
) -> Generated:
    tell = None if progress is None else partial(progress, f"drawing, {mask}")
    return generate(model, seeds=seeds, progress=tell, **{"guidance": 1.0, **drawing})


def _check_given(made: Tensor, clips: Tensor, mask: Tensor) -> None:
    """What was given comes out as it went in, to the bit."""
    given = ~mask.expand_as(clips)
    assert torch.equal(made[given].view(torch.int32), clips[given].view(torch.int32))


def _scores(
    mask: str,
    drawn: Generated,
    model: Scores | None = None,
    baseline: Scores | None = None,
    frechet: ClipDistance | None = None,
) -> MaskScores:
    return MaskScores(
        mask=mask,
        clips=len(drawn.seeds),
        model=model,
        baseline=baseline,
        frechet=frechet,
        seconds=drawn.seconds,
        evaluations=drawn.evaluations,
        policy_bytes=drawn.policy_bytes,
        receipts=drawn.receipts,
    )


def _joined(clips: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [1, C, T, B H, W]: all clips as one, below each other, whose mean is theirs."""
    return clips.permute(1, 2, 0, 3, 4).flatten(2, 3).unsqueeze(0)


def _cells(scores: Scores | None, columns: Mapping[str, tuple[str, int]]) -> list[str]:
    values = [(getattr(scores, name, None), digits) for name, (_, digits) in columns.items()]
    return [NOTHING if value is None else f"{value:.{digits}f}" for value, digits in values]
