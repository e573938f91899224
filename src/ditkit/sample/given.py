"""What a user gives of samples, checked before any of them is drawn.

B samples, C channels, T frames, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ShapeError

CLIP_AXES = 4


def check_given(cond: Cond, seeds: int, shape: Sequence[int]) -> None:
    """Refuse given content that is not of a part of each sample, or is not finite there.

    Samples of which nothing is given are asked for by neither a context nor a mask.

    Args:
        seeds: samples to be drawn. shape: of one, (C, T, H, W).

    Raises:
        ConfigError: samples that are no clips, a context or a mask alone, a value of the mask that is neither 0 nor 1,
            a sample that is given whole or not at all, a given value that is not finite.
        ShapeError: a context or a mask of another shape.
    """
    context, mask = cond.context, cond.mask
    if context is None and mask is None:
        return
    if len(shape) != CLIP_AXES:
        raise ConfigError(f"Cond gives content of samples {list(shape)}, expected clips [C, T, H, W]")
    if context is None:
        raise ConfigError("Cond.mask says what is given, but Cond.context is None")
    if mask is None:
        raise ConfigError(
            "Cond.context is given, but Cond.mask is None; expected one that is 0 where it counts"
        )
    for name, found, channels in (("context", context, shape[0]), ("mask", mask, 1)):
        expected = [seeds, channels, *shape[1:]]
        if list(found.shape) != expected:
            raise ShapeError(f"Cond.{name} {list(found.shape)} should be {expected}, a row a seed")
    _check_mask(mask)
    odd = ~(context.isfinite() | mask.to(context.device).bool())
    if odd.any():
        raise ConfigError(
            f"Cond.context: {context[odd][0]:g} in {_place(odd)}, expected finite numbers where Cond.mask is 0"
        )


def _check_mask(mask: Tensor) -> None:
    other = (mask != 0) & (mask != 1)
    if other.any():
        raise ConfigError(
            f"Cond.mask: {mask[other][0]:g} in {_place(other)}, expected 0 (given) or 1 (to be made)"
        )
    for sample, made in enumerate(mask.bool().flatten(1)):
        if made.all():
            raise ConfigError(
                f"Cond.mask: sample {sample} is all 1, which gives nothing, expected some 0; "
                "to make all of every sample, give no mask"
            )
        if not made.any():
            raise ConfigError(
                f"Cond.mask: sample {sample} is all 0, which leaves nothing to be made, expected some 1"
            )


def _place(where: Tensor) -> str:
    """The first true place of [B, C, T, H, W]."""
    sample, _, frame = where.nonzero()[0, :3].tolist()
    return f"sample {sample}, frame {frame}"
