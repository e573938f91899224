"""What masks in training are measured against: filling in by a network that knows none, a control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.path import Path
from ditkit.sample.denoiser import GuidedDenoiser
from ditkit.sample.noise import SampleNoise
from ditkit.sample.solvers import Euler, Solver


@final
@dataclass(frozen=True, eq=False)
class Replacement(Solver):
    """Euler's steps; before each, given content is noised as far as the rest and put in its place.

    Song et al. 2021, appendix I.2; the "replacement method" of Ho et al. 2022 (video diffusion models), section 3.1.

    Args:
        given: context and mask of the whole batch.
        fresh: noise is drawn anew at each step; else it is the sample's own, and given content moves straight.
    """

    given: Cond
    fresh: bool = False

    def times(self, path: Path, steps: int) -> Tensor:
        return Euler().times(path, steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        given, drawn = self.given.to(x.device), x
        assert given.context is not None
        for t, s in pairwise(self.times(field.path, steps).tolist()):
            noised = field.path.mix(given.context, drawn, x.new_tensor([t]))
            x = replace(given, context=noised).given(x)
            x = x + (s - t) * field(x, t).to("velocity")
            if self.fresh:
                drawn = noise.draw(x.device)
        return given.given(x)
