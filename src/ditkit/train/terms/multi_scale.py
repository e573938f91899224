"""Squared errors of all predictions of a network of several resolutions (DiMR, arXiv 2406.09416, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.core.model import Model
from ditkit.core.run import Site, named
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class MultiScale(Term):
    """sum over stages of lambda mean (target - prediction)^2, each against the target at its own resolution.

    The last stage's prediction is the network's output, as `Regression` has it; those below it are what their `head`
    sites return, [B, C, h, w].

    Args:
        scales: lambda of each stage, lowest resolution first.
    """

    weight: Weight = 1.0
    scales: Annotated[tuple[Annotated[float, Ge(0)], ...], MinLen(1)] = (0.25, 1.0)

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return named(sites, "head")[:-1]

    def check(self, model: Model) -> str:
        heads = len(named(model.sites(), "head"))
        if heads != len(self.scales):
            return f"a prediction for each of scales={self.scales}; the model makes {heads}"
        kind = model.config.convention.prediction
        return (
            "a prediction whose target has a bounded scale; the model predicts a score"
            if kind == "score"
            else ""
        )

    def loss(self, batch: NoisyBatch) -> Tensor:
        losses = self.scales[-1] * batch.counted(batch.residual()).square().flatten(1).mean(1)
        for name, scale in zip(self.taps(batch.sites), self.scales, strict=False):
            tap = batch.taps[name]
            prediction, _ = batch.convention.split(tap.to(torch.promote_types(tap.dtype, torch.float32)))
            target = at_resolution(batch.target(), prediction.shape[-2:])
            losses = losses + scale * (target - prediction).square().flatten(1).mean(1)
        return losses


def at_resolution(target: Tensor, sides: Sequence[int]) -> Tensor:
    """Scale a target [B, C, H, W] to `sides` (h, w): sums over blocks of s x s pixels, divided by s.

    White noise keeps its variance so; a constant k becomes s k. Where H is odd, blocks of s + 1 pixels overlap at their
    edges and reach over the border into zeros (the published code).

    Raises:
        ShapeError: the sides are no whole part of the target's.
    """
    height, width = target.shape[-2:]
    if (height, width) == tuple(sides):
        return target
    odd = height % 2
    ratio = (height - odd) // max(sides[0] - odd, 1)
    expected = tuple((side - side % 2) // max(ratio, 1) + side % 2 for side in (height, width))
    if width % 2 != odd or expected != tuple(sides) or (not odd and (height % ratio or width % ratio)):
        raise ShapeError(
            f"MultiScale: a prediction of {tuple(sides)} pixels for samples of {(height, width)}"
        )
    block = ratio + odd
    padding = ratio // 2 if odd else 0
    return F.avg_pool2d(target, block, ratio, padding) * block
