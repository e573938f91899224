"""What masks in training are measured against: filling in by a network that knows none, a control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.path import Path
from ditkit.sample.denoiser import Estimate
from ditkit.sample.noise import SampleNoise
from ditkit.sample.solvers import Euler, Solver, drawn
from ditkit.sample.steppers import OneEstimate, Stepper


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

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return ReplacementStepper(self, path, times, drawn(self, noise))


@final
class ReplacementStepper(OneEstimate):
    """Keeps the noise with which given content is mixed."""

    def __init__(self, solver: Replacement, path: Path, times: Tensor, noise: SampleNoise) -> None:
        super().__init__(solver, path, times)
        self.solver, self.noise = solver, noise

    def start(self, x: Tensor) -> Tensor:
        self.drawn = x
        return self._given(x, self.times[0])

    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        x = x + (s - t) * estimate.to("velocity")
        if self.solver.fresh:
            self.drawn = self.noise.draw(x.device)
        return self._given(x, s)

    def _given(self, x: Tensor, t: float) -> Tensor:
        given = self.solver.given.to(x.device)
        assert given.context is not None
        return replace(given, context=self.path.mix(given.context, self.drawn, x.new_tensor([t]))).given(x)
