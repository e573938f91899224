"""Errors of samples against a reference, over the part that was generated: the error columns of a comparison.

n samples, C channels, T frames, H W height and width. Pictures [n, C, H, W] and clips [n, C, T, H, W] lie in
[-1, 1], and nothing is clipped, as in `metrics`. `made` is bool [n, 1, T, H, W], the mask of `Cond`: what was
given is the same in both and would only flatter. Without one, everything was made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.metrics.image import SSIM_PADDING, psnr_db, relative_l2, ssim
from ditkit.metrics.video import frame_ssim


@dataclass(frozen=True)
class ClipErrors:
    """Errors of clips alone, under their keys in report.json.

    Args:
        temporal_psnr_db: None where no frame difference is off, and for clips of one frame.
        psnr_by_frame_db: T numbers, None where nothing was made of the frame or nothing is off.
    """

    temporal_psnr_db: float | None
    psnr_by_frame_db: tuple[float | None, ...]

    def worst_frame(self) -> tuple[int, float] | None:
        """Return the frame that is farthest off, and its PSNR."""
        found = [(value, frame) for frame, value in enumerate(self.psnr_by_frame_db) if value is not None]
        return None if not found else (min(found)[1], min(found)[0])


def made_of(cond: Cond) -> Tensor | None:
    """Return the mask of generated content, on the CPU; None where nothing is given."""
    return None if cond.mask is None else cond.mask.bool().cpu()


def errors(x: Tensor, ref: Tensor, made: Tensor | None) -> dict[str, Any]:
    """Compute the fields of a `Row` that compare `x` with `ref`, [n, C, H, W], [n, C, T, H, W] or [n, ...]."""
    each = [pooled_psnr_db(x[i : i + 1], ref[i : i + 1], _part(made, i)) for i in range(len(x))]
    weight = 1 if made is None else made
    return {
        "identical": torch.equal(x, ref),
        "psnr_db": pooled_psnr_db(x, ref, made),
        "psnr_worst_db": min((value for value in each if value is not None), default=None),
        "ssim": _ssim(x, ref, made),
        "relative_l2": finite(relative_l2(x * weight, ref * weight).mean().item()),
        "clip": _of_clips(x, ref, made) if x.ndim == 5 else None,
    }


def pooled_psnr_db(x: Tensor, ref: Tensor, made: Tensor | None = None) -> float | None:
    """PSNR of the squared error averaged over all that was made of [n, ...]; None where that is equal, or nothing."""
    if made is not None:
        where = made.expand_as(x)
        x, ref = x[where], ref[where]
    return finite(psnr_db(x.flatten()[None], ref.flatten()[None]).item()) if x.numel() else None


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _ssim(x: Tensor, ref: Tensor, made: Tensor | None) -> float | None:
    if x.ndim not in (4, 5) or min(x.shape[-2:]) <= SSIM_PADDING:
        return None
    if x.ndim == 4:
        return ssim(x, ref).mean().item()
    return frame_ssim(x, ref, made).nanmean().item()  # NaN: nothing was made of the frame


def _of_clips(x: Tensor, ref: Tensor, made: Tensor | None) -> ClipErrors:
    by_frame = [
        pooled_psnr_db(x[:, :, t], ref[:, :, t], None if made is None else made[:, :, t])
        for t in range(x.shape[2])
    ]
    counted = None if made is None else made[:, :, 1:] | made[:, :, :-1]
    moved = pooled_psnr_db(x.double().diff(dim=2), ref.double().diff(dim=2), counted)
    return ClipErrors(moved, tuple(by_frame))


def _part(made: Tensor | None, index: int) -> Tensor | None:
    return None if made is None else made[index : index + 1]
