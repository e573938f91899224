"""What anybody can do without a model: hold the nearest given frame, or blend the two around a gap."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.core.errors import ShapeError


def blended(context: Tensor, mask: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] whose made pixels are linear in time between the given ones of the same place.

    Before the first given frame and after the last one the nearest is held, so that a prediction repeats the
    last frame that was seen. Where a place is given in no frame, it is 0, mid-grey.

    Args:
        mask: [B, 1, T, H, W], 1 where a pixel was made, 0 where it was given.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if context.ndim != 5 or mask.shape != (context.shape[0], 1, *context.shape[2:]):
        raise ShapeError(f"blended: clips {list(context.shape)} and mask {list(mask.shape)} do not fit")
    frames = context.shape[2]
    time = torch.arange(frames, device=context.device).reshape(1, 1, -1, 1, 1)
    given = mask == 0
    before = torch.where(given, time, -1).cummax(2).values
    after = torch.where(given, time, frames).flip(2).cummin(2).values.flip(2)
    left, right = torch.where(before < 0, after, before), torch.where(after == frames, before, after)
    share = ((time - left) / (right - left).clamp_min(1)).to(context.dtype)
    first, last = (context.gather(2, at.clamp(0, frames - 1).expand_as(context)) for at in (left, right))
    mixed = torch.lerp(first, last, share.expand_as(context))
    return mixed.where(given.any(2, keepdim=True), torch.zeros_like(context))
