"""Orders of convergence of all solvers on mixtures of Gaussians, whose probability flow is known in closed form.

    python benchmarks/solver_orders.py

In one dimension the flow keeps quantiles: x_s = F_s^-1(F_t(x_t)), F_t the distribution at time t. Deterministic solvers
are measured by the root mean square of their error at 33 quantiles of two Gaussians. Stochastic ones act affinely on a
single Gaussian, so that its mean and deviation after each step are known without a sample; their error is in both.
An order is log2 of the ratio of errors at 128 and at 256 steps: `inside`, between the noise-times 0.9 and 0.1, where
all is smooth; `whole`, from noise to data, where log(alpha / sigma) runs between infinities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor

from common import record, show
from ditkit.core.ddpm import DiscretePath
from ditkit.core.path import Cosine, Linear, Path, VariancePreserving
from ditkit.core.spec import spec
from ditkit.sample.denoiser import Estimate
from ditkit.sample.inversion import DdimInversion
from ditkit.sample.multistep import DpmSolverPP, UniPc
from ditkit.sample.solvers import Ancestral, Ddim, Euler, EulerMaruyama, Heun, Solver
from ditkit.sample.steppers import follow

STEPS = (128, 256)
FLOWS = (
    Euler(), Heun(), Ddim(), DpmSolverPP(order=1), DpmSolverPP(), UniPc(order=1), UniPc(), UniPc(order=3),
    DdimInversion(),
)  # fmt: skip
DIFFUSIONS = (EulerMaruyama(), EulerMaruyama("sbdm"), Ancestral())
FINE = (
    10 * 2**10
)  # indices of a discrete path, so many that its own distance to the continuous one is not seen


@dataclass(frozen=True)
class Mixture:
    """Gaussians in one dimension."""

    path: Path
    weight: Tensor
    mean: Tensor
    deviation: Tensor

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each Gaussian at time t, [K]."""
        c = self.path.at(torch.tensor(t, dtype=torch.float64))
        return c.alpha * self.mean, (c.alpha * self.deviation) ** 2 + c.sigma**2

    def __call__(self, x: Tensor, t: float) -> Estimate:
        """The exact prediction at x, [n]."""
        time = torch.tensor([t], dtype=torch.float64)
        c, (mean, variance) = self.path.at(time), self.at(t)
        off = x[:, None] - mean
        share = (self.weight.log() - 0.5 * variance.log() - 0.5 * off**2 / variance).softmax(1)
        data = (share * (self.mean + c.alpha * self.deviation**2 * off / variance)).sum(1)
        noise = (share * c.sigma * off / variance).sum(1)
        if isinstance(self.path, DiscretePath):
            return Estimate(self.path, "noise", noise, x, time)
        return Estimate(self.path, "velocity", c.alpha_rate * data + c.sigma_rate * noise, x, time)

    def distribution(self, x: Tensor, t: float) -> Tensor:
        mean, variance = self.at(t)
        return (self.weight * torch.special.ndtr((x[:, None] - mean) / variance.sqrt())).sum(1)

    def quantile(self, u: Tensor, t: float) -> Tensor:
        """The inverse of `distribution`, by halving."""
        low, high = torch.full_like(u, -20), torch.full_like(u, 20)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.distribution(middle, t) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def two(path: Path) -> Mixture:
    return Mixture(
        path, *(torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [1.2, -0.8], [0.5, 0.6]))
    )


def one(path: Path) -> Mixture:
    return Mixture(path, *(torch.tensor([v], dtype=torch.float64) for v in (1.0, 0.4, 0.5)))


def paths() -> dict[str, Path]:
    t = torch.arange(1, FINE + 1, dtype=torch.float64) / FINE
    fine = DiscretePath(VariancePreserving().at(t).alpha ** 2, torch.arange(FINE))
    return {"linear": Linear(), "cosine": Cosine(), "vp": VariancePreserving(), "discrete vp": fine}


def inside(path: Path, steps: int) -> Tensor:
    """Even times from 0.9 to 0.1 of the noise."""
    times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
    return (times * FINE).round() - 1 if isinstance(path, DiscretePath) else times


def whole(path: Path, steps: int) -> Tensor:
    return path.times(steps, spacing="trailing") if isinstance(path, DiscretePath) else path.times(steps)


def flow_error(solver: Any, path: Path, times: Tensor) -> float:
    mixture, u = two(path), torch.linspace(0.02, 0.98, 33, dtype=torch.float64)
    times = times.flip(0) if isinstance(solver, DdimInversion) else times
    first, last = times[0].item(), times[-1].item()
    found = follow(solver.begin(path, times), mixture, mixture.quantile(u, first))
    return (found - mixture.quantile(u, last)).square().mean().sqrt().item()


class Unit:
    """Noise 0, 0 and 1 for the three rows by which an affine step is found out."""

    def draw(self, device: Any = "cpu") -> Tensor:
        return torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def moments_error(solver: Solver, path: Path, times: Tensor) -> float:
    """Of mean and deviation, at the end, of all samples of a Gaussian."""
    gaussian = one(path)
    (mean,), (variance,) = gaussian.at(times[0].item())
    noise: Any = Unit()
    stepper = solver.begin(path, times, noise)
    while (t := stepper.t) is not None:
        x = torch.stack([mean, mean + 1, mean])
        mean, moved, noisy = stepper.step(x, gaussian(x, t))
        variance = (moved - mean) ** 2 * variance + (noisy - mean) ** 2
    (true,), (spread,) = gaussian.at(times[-1].item())
    return max((mean - true).abs().item(), (variance.sqrt() - spread.sqrt()).abs().item())


def order(error: Callable[[int], float]) -> tuple[float, float]:
    """The order between the numbers of steps, and the error at the larger."""
    coarse, fine = (error(steps) for steps in STEPS)
    return log2(coarse / fine), fine


def measure(*names: str) -> list[dict[str, object]]:
    """A row for each solver and path that it runs on, of all paths or those of `names`."""
    rows: list[dict[str, object]] = []
    for solver in (*FLOWS, *DIFFUSIONS):
        error = flow_error if solver in FLOWS else moments_error
        for name, path in paths().items():
            if names and name not in names:
                continue
            discrete = isinstance(path, DiscretePath)
            if (isinstance(solver, Euler | Heun | EulerMaruyama) and discrete) or (
                isinstance(solver, Ancestral) and not discrete
            ):
                continue
            row: dict[str, object] = {
                "solver": spec(solver),
                "path": name,
                "inside": None,
                "error_inside": None,
            }
            if not isinstance(solver, Ancestral):  # which has no end but the data
                row["inside"], row["error_inside"] = order(lambda n: error(solver, path, inside(path, n)))  # noqa: B023
            row["whole"], row["error_whole"] = order(lambda n: error(solver, path, whole(path, n)))  # noqa: B023
            rows.append(row)
    return rows


if __name__ == "__main__":
    found = measure()
    show(f"Orders of convergence between {STEPS[0]} and {STEPS[1]} steps", found)
    record("solver_orders", found)
