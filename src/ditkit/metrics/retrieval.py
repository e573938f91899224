"""Retrieval: whether a picture drawn for a caption is nearer to that caption's real picture than to all others.

n drawn pictures, m real ones, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import ShapeError


@dataclass(frozen=True)
class Retrieval:
    """Shares of drawn pictures whose own real one is among the nearest.

    Args:
        top1, top5: of the drawn pictures. chance1, chance5: what guessing would give.
        median_rank: place of the own real picture among all, from 1; (m + 1) / 2 is chance.
        drawn, real: how many.
    """

    top1: float
    top5: float
    chance1: float
    chance5: float
    median_rank: float
    drawn: int
    real: int


def ranks(drawn: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """Return the place of each drawn picture's own real one by cosine similarity, [n], from 1; ties count half.

    Args:
        drawn: [n, d]. real: [m, d]. own: [n] rows of `real`.

    Raises:
        ShapeError: they do not fit each other.
    """
    if drawn.ndim != 2 or real.ndim != 2 or drawn.shape[1] != real.shape[1] or own.shape != drawn.shape[:1]:
        shapes = [list(v.shape) for v in (drawn, real, own)]
        raise ShapeError(f"ranks: drawn, real and own of {shapes}, expected [n, d], [m, d] and [n]")
    centre = real.double().mean(0)  # features of a network after ReLU all point one way
    a, b = (torch.nn.functional.normalize(v.double() - centre, dim=1) for v in (drawn, real))
    likeness = a @ b.mT
    mine = likeness.gather(1, own[:, None])
    nearer, equal = (likeness > mine).sum(1), (likeness == mine).sum(1) - 1
    return 1 + nearer.double() + equal.double() / 2


def retrieval(drawn: Tensor, real: Tensor, own: Tensor) -> Retrieval:
    """Measure retrieval; the arguments are those of `ranks`."""
    place, m = ranks(drawn, real, own), len(real)
    return Retrieval(
        top1=(place <= 1).double().mean().item(),
        top5=(place <= 5).double().mean().item(),
        chance1=1 / m,
        chance5=min(1.0, 5 / m),
        median_rank=place.median().item(),
        drawn=len(drawn),
        real=m,
    )
