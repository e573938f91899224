"""Errors of samples against a reference, over the part that was generated: the error columns of a comparison.

n samples, C channels, T frames, H W height and width. Pictures [n, C, H, W] and clips [n, C, T, H, W] lie in
[-1, 1], and nothing is clipped, as in `metrics`. `generated` is bool [n, 1, T, H, W], the mask of `Cond`: what was
given is the same in both and would only flatter. Without one, everything was generated.
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
        psnr_by_frame_db: T numbers, None where nothing was generated of the frame or nothing is off.
    """

    temporal_psnr_db: float | None
    psnr_by_frame_db: tuple[float | None, ...]

    def worst_frame(self) -> tuple[int, float] | None:
        """Return the frame that is farthest off, and its PSNR."""
        found = [(value, frame) for frame, value in enumerate(self.psnr_by_frame_db) if value is not None]
        return None if not found else (min(found)[1], min(found)[0])


def generated_mask(cond: Cond) -> Tensor | None:
    """Return the mask of generated content, on the CPU; None where nothing is given."""
    return None if cond.mask is None else cond.mask.bool().cpu()


def errors(x: Tensor, ref: Tensor, generated: Tensor | None = None) -> dict[str, Any]:
    """Compute the error fields of a `Row` for samples [n, ...] of any kind against a reference."""
    each = [pooled_psnr_db(x[i : i + 1], ref[i : i + 1], _part(generated, i)) for i in range(len(x))]
    weight = 1 if generated is None else generated
    return {
        "identical": torch.equal(x, ref),
        "psnr_db": pooled_psnr_db(x, ref, generated),
        "psnr_worst_db": min((value for value in each if value is not None), default=None),
        "ssim": None,
        "relative_l2": finite(relative_l2(x * weight, ref * weight).mean().item()),
        "clip": None,
    }


def picture_errors(x: Tensor, ref: Tensor, generated: Tensor | None = None) -> dict[str, Any]:
    """Measure pictures [n, C, H, W]: the same, with SSIM where a side has 6 pixels or more."""
    large = min(x.shape[-2:]) > SSIM_PADDING
    return errors(x, ref, generated) | {"ssim": ssim(x, ref).mean().item() if large else None}


def clip_errors(x: Tensor, ref: Tensor, generated: Tensor | None = None) -> dict[str, Any]:
    """Measure clips [n, C, T, H, W]: the same, with the errors that only clips have."""
    own: dict[str, Any] = {"clip": _of_clips(x, ref, generated)}
    if min(x.shape[-2:]) > SSIM_PADDING:
        own["ssim"] = (
            frame_ssim(x, ref, generated).nanmean().item()
        )  # NaN: nothing was generated of the frame
    return errors(x, ref, generated) | own


def pooled_psnr_db(x: Tensor, ref: Tensor, generated: Tensor | None = None) -> float | None:
    """Return the PSNR of the squared error averaged over what was generated of [n, ...]; None where it is equal."""
    if generated is not None:
        where = generated.expand_as(x)
        x, ref = x[where], ref[where]
    return finite(psnr_db(x.flatten()[None], ref.flatten()[None]).item()) if x.numel() else None


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _of_clips(x: Tensor, ref: Tensor, generated: Tensor | None) -> ClipErrors:
    by_frame = [
        pooled_psnr_db(x[:, :, t], ref[:, :, t], None if generated is None else generated[:, :, t])
        for t in range(x.shape[2])
    ]
    counted = None if generated is None else generated[:, :, 1:] | generated[:, :, :-1]
    moved = pooled_psnr_db(x.double().diff(dim=2), ref.double().diff(dim=2), counted)
    return ClipErrors(moved, tuple(by_frame))


def _part(generated: Tensor | None, index: int) -> Tensor | None:
    return None if generated is None else generated[index : index + 1]
