"""Filling what clouds hide without learning: the last clear value of a pixel, the closest in time, or a line between.

n series, C bands, T dates in the order of time, H W pixels. A pixel that is clear at no date has its band's mean over
all that is clear in its series, and mid-grey, 0, where nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ditkit.core.errors import ShapeError

Filling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images [n, C, T, H, W], where they are hidden [n, 1, T, H, W], and days [n, T], to images without gaps."""


def last(image: Tensor, hidden: Tensor, days: Tensor) -> Tensor:
    """Take the last clear value up to each date; before the first one, that.

    Raises:
        ShapeError: the shapes do not fit.
    """
    before, after = _neighbours(image, hidden, days)
    return _taken(image, hidden, torch.where(before < 0, after, before))


def closest(image: Tensor, hidden: Tensor, days: Tensor) -> Tensor:
    """Take the clear value of fewest days' distance; of two equally far, the earlier. Raise as `last` does."""
    before, after = _neighbours(image, hidden, days)
    to_before, to_after = (_days_to(days, source, image.shape[2]) for source in (before, after))
    frames = image.shape[2]
    later = (before < 0) | ((after < frames) & (to_after < to_before))
    return _taken(image, hidden, torch.where(later, after, before))


def linear(image: Tensor, hidden: Tensor, days: Tensor) -> Tensor:
    """Go on a line in days between the clear values around; hold the first and the last. Raise as `last` does."""
    frames = image.shape[2]
    before, after = _neighbours(image, hidden, days)
    left, right = torch.where(before < 0, after, before), torch.where(after == frames, before, after)
    to_left, to_right = (_days_to(days, source, frames) for source in (left, right))
    share = (to_left / (to_left + to_right).clamp_min(1e-9)).to(image.dtype)
    first, second = (_taken(image, hidden, source) for source in (left, right))
    return torch.lerp(first, second, share.expand_as(image))


FILLINGS: Mapping[str, Filling] = {"last": last, "closest": closest, "linear": linear}
"""The baselines of UniTS's tables."""


def _neighbours(image: Tensor, hidden: Tensor, days: Tensor) -> tuple[Tensor, Tensor]:
    """Find the last clear date up to each, -1 for none, and the first from each on, T for none: [n, 1, T, H, W]."""
    n, _, frames = image.shape[:3]
    if hidden.shape != (n, 1, *image.shape[2:]) or days.shape != (n, frames):
        shapes = f"{list(image.shape)}, {list(hidden.shape)} and {list(days.shape)}"
        raise ShapeError(f"gap filling: {shapes}, expected [n, C, T, H, W], [n, 1, T, H, W] and [n, T]")
    number = torch.arange(frames, device=image.device).view(1, 1, -1, 1, 1)
    clear = ~hidden.bool()
    before = torch.where(clear, number, -1).cummax(2).values
    after = torch.where(clear, number, frames).flip(2).cummin(2).values.flip(2)
    return before, after


def _days_to(days: Tensor, source: Tensor, frames: int) -> Tensor:
    """Days between each date and the date `source` [n, 1, T, H, W], at least 0."""
    own = days.float()[:, None, :, None, None]
    other = own.expand(*source.shape).gather(2, source.clamp(0, frames - 1))
    return (own - other).abs()


def _taken(image: Tensor, hidden: Tensor, source: Tensor) -> Tensor:
    """Take each pixel from the date `source`; the band's mean where no date is clear."""
    clear = (~hidden.bool()).to(image.dtype)
    values = torch.where(hidden.bool(), 0.0, image)
    mean = values.sum((2, 3, 4), keepdim=True) / clear.sum((2, 3, 4), keepdim=True).clamp_min(1)
    found = values.gather(2, source.clamp(0, image.shape[2] - 1).expand_as(image))
    return torch.where(clear.bool().any(2, keepdim=True), found, mean.expand_as(image))
