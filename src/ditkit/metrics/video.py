"""Distances between clips and their references, frame by frame and from frame to frame.

B batch, C channels, T frames, H W height and width. Clips [B, C, T, H, W] lie in [-1, 1], and nothing is
clipped, as in `metrics`. A mask [B, 1, T, H, W] is that of `Cond`: 1 where content was made, 0 where it was
given. With a mask only what was made is scored; a frame (or clip) of which nothing was made scores NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import DataError, ShapeError
from ditkit.metrics.image import psnr_db, relative_l2, ssim_map


@dataclass(frozen=True)
class ClipScores:
    """Every score of a batch of clips; the two of motion are None for clips of one frame.

    Args:
        psnr_db: [B, T]. ssim: [B, T].
        temporal_psnr_db: [B, T - 1]. temporal_relative_l2: [B].
    """

    psnr_db: Tensor
    ssim: Tensor
    temporal_psnr_db: Tensor | None
    temporal_relative_l2: Tensor | None

    def by_frame(self) -> dict[str, list[float]]:
        """PSNR and SSIM at each of the T frames, averaged over the clips in which it was made."""
        return {"psnr_db": self.psnr_db.nanmean(0).tolist(), "ssim": self.ssim.nanmean(0).tolist()}

    def means(self) -> dict[str, float]:
        """Each score averaged over clips and made frames: of decibels, so inf once a frame is exact."""
        return {name: float(score.nanmean()) for name, score in vars(self).items() if score is not None}


def clip_scores(x: Tensor, ref: Tensor, mask: Tensor | None = None) -> ClipScores:
    """All scores of clips [B, C, T, H, W].

    Raises ShapeError for unequal shapes, another mask or frames of fewer than 6 pixels a side, DataError for
    values that are not finite, or a mask with other values than 0 and 1.
    """
    moves = x.ndim == 5 and x.shape[2] > 1
    return ClipScores(
        psnr_db=frame_psnr_db(x, ref, mask),
        ssim=frame_ssim(x, ref, mask),
        temporal_psnr_db=temporal_psnr_db(x, ref, mask) if moves else None,
        temporal_relative_l2=temporal_relative_l2(x, ref, mask) if moves else None,
    )


def frame_psnr_db(x: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """`psnr_db` of every frame: [B, C, T, H, W] -> [B, T] in dB, inf where equal.

    With a mask, the mean square is taken over the made pixels of the frame.
    """
    generated = _generated("frame_psnr_db", x, ref, mask)
    return _each_frame(psnr_db, x * generated, ref * generated) + _correction_db(generated)


def frame_ssim(x: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity of every frame: [B, C, T, H, W] -> [B, T], 1 where equal.

    With a mask, the mean of `ssim_map` over the made pixels; the windows about them see given pixels too.
    """
    generated = _generated("frame_ssim", x, ref, mask)
    similarity = _each_frame(ssim_map, x, ref).mean(2)  # [B, T, H, W]
    weight = generated.squeeze(1)
    return (similarity * weight).sum((2, 3)) / weight.sum((2, 3))


def temporal_psnr_db(x: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """PSNR of frame differences: [B, C, T, H, W] -> [B, T - 1] in dB, inf where equal.

    10 log10(2^2 / mean (dx_t - dref_t)^2) with dx_t = x_{t+1} - x_t. A constant offset of the whole clip
    costs nothing, flicker costs twice its variance. The peak is that of the clips, 2, although differences reach 4:
    the number can be held against `frame_psnr_db`. With a mask, pixels are counted that were made in
    either of the two frames, so that the step from a given frame to a made one counts.

    Raises ShapeError for fewer than two frames.
    """
    dx, dref, generated = _differences("temporal_psnr_db", x, ref, mask)
    return _each_frame(psnr_db, dx, dref) + _correction_db(generated)


def temporal_relative_l2(x: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """||dx - dref|| / ||dref|| over all frame differences (and pixels counted) of `temporal_psnr_db`: -> [B].

    0 where equal, 1 for a clip that stands still, inf where only the reference stands still.
    """
    dx, dref, generated = _differences("temporal_relative_l2", x, ref, mask)
    return torch.where(generated.flatten(1).any(1), relative_l2(dx, dref), torch.nan)


def _differences(name: str, x: Tensor, ref: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx and dref [B, C, T - 1, H, W], 0 where not counted, and the mask of what is counted."""
    generated = _generated(name, x, ref, mask)
    if x.shape[2] < 2:
        raise ShapeError(f"{name}: expected clips of 2 frames or more, got {list(x.shape)}")
    counted = torch.maximum(generated[:, :, 1:], generated[:, :, :-1])
    return counted * x.double().diff(dim=2), counted * ref.double().diff(dim=2), counted


def _each_frame(metric: Callable[[Tensor, Tensor], Tensor], x: Tensor, ref: Tensor) -> Tensor:
    """Apply a metric of pictures [n, C, H, W] -> [n, ...] to each frame of clips: -> [B, T, ...]."""
    frames = [clips.transpose(1, 2).flatten(0, 1) for clips in (x, ref)]
    return metric(*frames).unflatten(0, (x.shape[0], x.shape[2]))


def _correction_db(generated: Tensor) -> Tensor:
    """Compute the term from the PSNR over all pixels, 0 where given, to one over generated pixels: [B, T]."""
    return 10 * generated.mean((1, 3, 4)).log10()  # -inf + inf = NaN where nothing was made


def _generated(name: str, x: Tensor, ref: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask in float64 [B, 1, T, H, W], all 1 where none is given."""
    if x.shape != ref.shape or x.ndim != 5 or x.numel() == 0:
        raise ShapeError(
            f"{name}: expected two clips [B, C, T, H, W] of one shape, got {list(x.shape)} and {list(ref.shape)}"
        )
    expected = (x.shape[0], 1, *x.shape[2:])
    if mask is None:
        return x.new_ones(expected, dtype=torch.float64)
    if mask.shape != expected:
        raise ShapeError(f"{name}: mask {list(mask.shape)}, expected {list(expected)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise DataError(f"{name}: the mask holds other values than 0 (given) and 1 (made)")
    return mask.double()
