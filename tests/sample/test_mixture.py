"""Solvers on a Gaussian mixture, whose prediction at any (x, t) is known in closed form.

Moments are accepted within four standard errors of an estimate from n draws; orders of convergence are
measured over halvings of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ditkit.core.cond import UNDECLARED, Cond
from ditkit.core.convention import Convention
from ditkit.core.grid import Segment
from ditkit.core.model import Model
from ditkit.core.path import Path
from ditkit.core.run import DIRECT, Run, Site
from ditkit.sample import (
    Ancestral,
    Ddim,
    Euler,
    EulerMaruyama,
    Heun,
    SampleNoise,
    Solver,
    Stepper,
    sample,
)
from ditkit.sample.denoiser import GuidedDenoiser

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
CONTINUOUS = ("linear", "cosine", "vp")
DIFFUSIONS = ("sigma", "constant", "sbdm", "linear", "decreasing", "increasing-decreasing")
WEIGHT = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEAN = torch.tensor([[1.2, -0.6], [-0.8, 0.5]], dtype=torch.float64)
COVARIANCE = torch.tensor([[[0.25, 0.1], [0.1, 0.16]], [[0.3, -0.12], [-0.12, 0.4]]], dtype=torch.float64)


class Mixture(Model):
    """The exact prediction for a mixture of Gaussians in D dimensions; one sample is a cloud [D, n]."""

    def __init__(
        self,
        convention: Convention,
        points: int = 4000,
        weight: Tensor = WEIGHT,
        mean: Tensor = MEAN,
        covariance: Tensor = COVARIANCE,
    ) -> None:
        super().__init__()
        self.points = points
        self.config = SimpleNamespace(convention=convention)
        self.path = convention.make_path()
        self.conditions = UNDECLARED
        self.weight, self.mean, self.covariance = weight, mean, covariance
        self.variance, self.axes = torch.linalg.eigh(covariance)  # [K, D], [K, D, D]
        self.eval()

    def sites(self) -> tuple[Site, ...]:
        return ()

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return ()

    def unconditional(self, cond: Cond) -> Cond:
        return cond

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.mean.shape[1], self.points)

    def posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E[data | x_t = x], E[noise | x_t = x] and log p_t(x) [..., n], at x [..., D, n] and one t [1]."""
        c = self.path.at(t)
        variance = c.alpha**2 * self.variance + c.sigma**2
        off = x.unsqueeze(-3) - c.alpha * self.mean.unsqueeze(-1)  # [..., K, D, n]
        whitened = (self.axes / variance.unsqueeze(-2)) @ (self.axes.mT @ off)
        scale = self.weight.log() - 0.5 * (2 * math.pi * variance).log().sum(-1)
        log_joint = scale.unsqueeze(-1) - 0.5 * (off * whitened).sum(-2)
        share = log_joint.softmax(-2).unsqueeze(-2)
        data = self.mean.unsqueeze(-1) + c.alpha * self.covariance @ whitened
        return (share * data).sum(-3), c.sigma * (share * whitened).sum(-3), log_joint.logsumexp(-2)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.path.at(t)
        data, noise, _ = self.posterior(x, t)
        return c.alpha_rate * data + c.sigma_rate * noise

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        convention = self.config.convention
        towards_data = convention.time == "data"
        t = 1 - t[:1] if towards_data else t[:1]
        if convention.prediction == "velocity":
            return -self.velocity(x, t) if towards_data else self.velocity(x, t)
        data, noise, _ = self.posterior(x, t)
        return {"data": data, "noise": noise, "score": -noise / self.path.at(t).sigma}[convention.prediction]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the data."""
        mean = (self.weight[:, None] * self.mean).sum(0)
        off = self.mean - mean
        within = (self.weight[:, None, None] * self.covariance).sum(0)
        return mean, within + torch.einsum("k,ki,kj->ij", self.weight, off, off)


def model_of(path: str, points: int = 4000, **changes: str) -> Mixture:
    if path == "ddpm":
        return Mixture(Convention("ddpm", "noise", "index"), points)
    return Mixture(Convention(path, **changes), points)  # type: ignore[arg-type]


def draw(model: Mixture, solver: Solver, steps: int, seed: int = 0) -> Tensor:
    """Points [D, n]."""
    return sample(model, Cond(), [seed], steps=steps, solver=solver).samples[0].double()


def deviations(model: Mixture, points: Tensor) -> Tensor:
    """Standard errors by which means and covariances of points [D, n] differ from the mixture's."""
    mean, covariance = model.moments()
    off = points.T - mean
    products = torch.einsum("ni,nj->nij", off, off).flatten(1)
    found = torch.cat([off, products - covariance.flatten()], dim=1)
    return found.mean(0).abs() / (found.std(0) / math.sqrt(len(off)))


def assert_same_moments(model: Mixture, points: Tensor) -> None:
    assert deviations(model, points).max() < 4


@dataclass(frozen=True)
class Dopri5(Solver):
    """scipy's adaptive Dormand-Prince 5(4), at SiT's default tolerances unless told otherwise."""

    rtol: float = 1e-3
    atol: float = 1e-6
    until: float = 1e-5

    def times(self, path: Path, steps: int) -> Tensor:
        return path.times(steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        raise NotImplementedError("its steps are adaptive, and asked for by scipy")

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        def slope(t: float, flat: object) -> object:
            return field(torch.as_tensor(flat).reshape(x.shape), t).to("velocity").flatten().numpy()

        start = x.flatten().numpy()
        found = solve_ivp(slope, (1.0, self.until), start, method="RK45", rtol=self.rtol, atol=self.atol)
        return torch.from_numpy(found.y[:, -1]).reshape(x.shape)


@pytest.mark.parametrize("path", CONTINUOUS)
@pytest.mark.parametrize("solver", [Euler(), Heun(), Ddim(), Dopri5()], ids=lambda s: type(s).__name__)
def test_ode_reproduces_the_moments(path: str, solver: Solver) -> None:
    model = model_of(path)
    assert_same_moments(model, draw(model, solver, steps=100))


@pytest.mark.parametrize(
    ("path", "diffusion"),
    [("linear", d) for d in DIFFUSIONS]
    + [(path, d) for path in ("cosine", "vp") for d in ("sigma", "sbdm")],  # what reads the path itself
)
def test_sde_reproduces_the_moments_with_every_diffusion(path: str, diffusion: str) -> None:
    model = model_of(path)
    assert_same_moments(model, draw(model, EulerMaruyama(diffusion, last=0.004), steps=250))  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [Ddim(), Ancestral()], ids=lambda s: type(s).__name__)
def test_ddpm_reproduces_the_moments(solver: Solver) -> None:
    model = model_of("ddpm")
    assert_same_moments(model, draw(model, solver, steps=500))


def test_a_wrong_sampler_is_noticed() -> None:
    """The acceptance above has the power to refuse: a tenth too wide, or a mixture of other weights."""
    model = model_of("linear")
    assert deviations(model, 1.1 * draw(model, Heun(), steps=50)).max() > 4
    other = Mixture(Convention(), weight=WEIGHT.flip(0))
    assert deviations(model, draw(other, Heun(), steps=50)).max() > 4


def test_constant_diffusion_with_a_long_last_step_loses_variance() -> None:
    """SiT's noise-free last step of 0.04 is only harmless where w vanishes at the data."""
    model = model_of("linear")
    lost = draw(model, EulerMaruyama("constant", last=0.04), steps=250)
    kept = draw(model, EulerMaruyama("sigma", last=0.04), steps=250)
    assert (lost.var(1) < kept.var(1)).all()
    assert_same_moments(model, kept)
    assert deviations(model, lost).max() > 4


@lru_cache
def velocity_samples(path: str) -> Tensor:
    return draw(model_of(path, 500), Heun(), steps=50)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
@pytest.mark.parametrize("path", CONTINUOUS)
def test_every_prediction_and_clock_gives_the_same_samples(path: str, prediction: str) -> None:
    """Noise and score are read at t = 0.999 on paths that end at alpha = 0: hence their tolerance."""
    exact = velocity_samples(path)
    for time in ("noise", "data"):
        found = draw(model_of(path, 500, prediction=prediction, time=time), Heun(), steps=50)
        clamped = prediction in ("noise", "score") and path != "vp"
        torch.testing.assert_close(found, exact, rtol=0, atol=5e-3 if clamped else 2e-6)


@lru_cache
def limit_of(path: str) -> torch.Tensor:
    """What all solvers of the path's equation converge to."""
    return draw(model_of(path, 500), Dopri5(rtol=1e-9, atol=1e-9, until=1e-9), steps=1)


@pytest.mark.parametrize("path", CONTINUOUS)
@pytest.mark.parametrize(
    ("solver", "order"), [(Euler(), 1), (Ddim(), 1), (Heun(), 2)], ids=lambda v: type(v).__name__
)
def test_order_of_convergence(path: str, solver: Solver, order: int) -> None:
    model, exact = model_of(path, 500), limit_of(path)
    errors = [(draw(model, solver, steps) - exact).square().mean().sqrt() for steps in (32, 64, 128)]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize("path", CONTINUOUS)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_ode_likelihood_is_the_analytic_density(path: str, dimensions: int) -> None:
    """log p_0(x_0) = log p_1(x_1) + integral of div v along the trajectory (Song et al. 2021, eq. 39)."""
    corner = (slice(None), slice(dimensions))
    model = Mixture(Convention(path), mean=MEAN[corner], covariance=COVARIANCE[(*corner, slice(dimensions))])
    start = torch.randn(dimensions, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def slope(t: float, state: object) -> object:
        time = torch.tensor([t], dtype=torch.float64)
        with torch.enable_grad():
            x = torch.as_tensor(state)[:-40].reshape(dimensions, 40).requires_grad_()
            v = model.velocity(x, time)
            rows = [torch.autograd.grad(v[i].sum(), x, retain_graph=True)[0][i] for i in range(dimensions)]
        return torch.cat([v.detach().flatten(), sum(rows)]).numpy()

    state = torch.cat([start.flatten(), torch.zeros(40, dtype=torch.float64)]).numpy()
    first = 1e-9  # VP's sigma' is infinite at 0
    end = torch.from_numpy(
        solve_ivp(slope, (first, 1.0), state, method="RK45", rtol=1e-8, atol=1e-8).y[:, -1]
    )
    at_noise = model.posterior(end[:-40].reshape(dimensions, 40), torch.ones(1, dtype=torch.float64))[2]
    at_data = model.posterior(start, torch.zeros(1, dtype=torch.float64))[2]
    torch.testing.assert_close(at_noise + end[-40:], at_data, rtol=0, atol=1e-5)
