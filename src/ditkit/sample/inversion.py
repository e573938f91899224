"""DDIM inversion: the noise from which the deterministic sampler would draw given data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.config import MOST_STEPS, integer
from ditkit.core.ddpm import Spacing
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.path import Path
from ditkit.core.policy import Policy, with_inherent
from ditkit.core.time_grid import EVEN, TimeGrid
from ditkit.core.trajectory import Trajectory
from ditkit.sample.denoiser import Estimate, GuidedDenoiser
from ditkit.sample.guidance import Guidance, Unguided
from ditkit.sample.solvers import check_where, spaced
from ditkit.sample.steppers import Stepper, follow

UNGUIDED = Unguided()


@final
@dataclass(frozen=True)
class DdimInversion:
    """`Ddim` backwards, from data to noise; order 1. It is no `Solver`: a sampler starts from noise.

    The step from t up to s takes the prediction at s, where the step down takes it, though of the state at t
    (null-text inversion, Mokady et al. 2023; diffusers' DDIMInverseScheduler).

    Args:
        spacing: of the indices of a discrete path on the even grid, as in `Ddim`.
        grid: where the steps lie.
    """

    spacing: Spacing = "strided"
    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        check_where(self)

    def times(self, path: Path, steps: int) -> Tensor:
        """Return the times of `Ddim`, rising from the data.

        Raises:
            ConfigError: a spacing or a number of steps that the path does not have.
        """
        return spaced(self, path, steps).flip(0)

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor) -> Stepper:
        """Begin a trajectory over rising `times`."""
        return DdimInversionStepper(path, times)

    def solve(self, field: Callable[[Tensor, float], Estimate], x: Tensor, path: Path, steps: int) -> Tensor:
        """Return the noise [B, C, ...] of data `x`, of the same shape."""
        return follow(self.begin(path, self.times(path, steps)), field, x)


@final
class DdimInversionStepper(Stepper):
    def __init__(self, path: Path, times: Tensor) -> None:
        self.path, self.times, self.index = path, times.tolist(), 0
        if len(times) < 2 or not (times.diff() > 0).all():
            raise ConfigError(
                "DdimInversion: times should rise from data to noise; expected Ddim's, backwards"
            )

    @property
    def t(self) -> float | None:
        return self.times[self.index + 1] if self.index < len(self.times) - 1 else None

    def step(self, x: Tensor, estimate: Estimate) -> Tensor:
        t, s = (x.new_tensor([time]) for time in self.times[self.index : self.index + 2])
        self.index += 1
        here, there = self.path.at(t), self.path.at(s)
        if here.sigma.item() == 0:
            return there.alpha * x / here.alpha + there.sigma * estimate.to("noise")
        data, noise = (
            self.path.convert(estimate.value, x, t, estimate.kind, target) for target in ("data", "noise")
        )
        return there.alpha * data + there.sigma * noise


INVERSION = DdimInversion()


@torch.no_grad()
def invert(
    model: Denoiser,
    data: Tensor,
    cond: Cond,
    *,
    steps: int = 50,
    inversion: DdimInversion = INVERSION,
    guidance: Guidance = UNGUIDED,
    policies: Sequence[Policy] = (),
) -> Tensor:
    """Return the float64 noise [B, C, ...] from which `Ddim` in as many steps draws latents `data`, to its error.

    Raises:
        ConfigError: steps below 1, or a setting that does not fit the model. NoEffectError: a policy saved nothing.
    """
    integer("steps", steps, least=1, most=MOST_STEPS)
    chosen = with_inherent(model, policies)
    trajectory = Trajectory(model.sites(), chosen, inversion.evaluations(steps), None, model.learned)
    for policy in chosen:
        policy.check_model(model)
    field = GuidedDenoiser(model, cond, guidance, trajectory)
    noise = inversion.solve(field, data.double(), field.path, steps)
    for one in field.trajectories:
        one.finish()
    return noise
