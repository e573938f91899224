"""What training minimises: targets at their minimum, DDPM's bound against its definition, timesteps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError
from ditkit.core.path import Cosine, Linear, Path, VariancePreserving
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import (
    HALF_BIN,
    VariationalBound,
    discretised_log_likelihood,
    gaussian_kl,
)
from ditkit.train.timesteps import LogitNormal, Shifted, Uniform
from scripts.toy_run import DIFFUSION, toy_model

CONVENTIONS = [
    Convention(path, prediction)  # type: ignore[arg-type]
    for path in ("linear", "cosine", "vp")
    for prediction in ("velocity", "noise", "data", "score")
] + [SIT, DDPM, Convention("ddpm", "data", "index"), Convention("ddpm", "score", "index")]


def made_batch(convention: Convention, fraction: float | Tensor | None = None) -> NoisyBatch:
    """16 noisy samples [1, 4, 4] with a perfect prediction, made from the data without `Path.convert`."""
    path: Path = convention.make_path()
    data, noise = torch.rand(2, 16, 1, 4, 4, dtype=torch.float64) * 2 - 1
    t = path.place(torch.linspace(0.05, 0.95, 16, dtype=torch.float64))
    x = path.mix(data, noise, t.double())
    c = path.at(t.double()[:, None, None, None])
    perfect = {
        "velocity": c.alpha_rate * data + c.sigma_rate * noise,
        "noise": noise,
        "data": data,
        "score": -noise / c.sigma,
    }[convention.prediction]
    spread_fraction = None if fraction is None else torch.as_tensor(fraction).expand(data.shape)
    return NoisyBatch(
        path=path,
        convention=convention,
        data=data,
        noise=noise,
        x=x,
        t=t,
        prediction=perfect,
        fraction=spread_fraction,
        taps={},
    )


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: f"{c.path}-{c.prediction}-{c.time}")
def test_regression_is_zero_at_its_target_and_the_squared_distance_elsewhere(convention):
    batch = made_batch(convention)
    assert Regression().loss(batch).max() < 1e-16
    off = NoisyBatch(**vars(batch) | {"prediction": batch.prediction + 0.5})
    weight = torch.ones(16, dtype=torch.float64)
    if convention.prediction == "score":  # as SiT: the target grows like 1 / sigma
        weight = batch.path.at(batch.t.double()).sigma ** 2
    torch.testing.assert_close(Regression().loss(off), 0.25 * weight)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: f"{c.path}-{c.prediction}-{c.time}")
def test_the_loss_is_moderate_at_both_ends_of_time(convention):
    model, path = toy_model(convention), convention.make_path()
    data, noise = torch.rand(2, 4, 1, 8, 8) * 2 - 1
    t = path.place(torch.tensor([0, 1e-9, 1e-4, 1 - 2**-53], dtype=torch.float64))
    told = Cond(label=torch.zeros(4, dtype=torch.long))
    loss = Denoising().at(model, model, path=path, data=data, noise=noise, t=t, cond=told)["loss"]
    assert loss < (1e4 if convention.path == "vp" and convention.prediction == "velocity" else 10)


def test_trained_times_are_sits():
    u = torch.rand(1000, dtype=torch.float64)
    for path in (Linear(), Cosine()):
        for kind in ("velocity", "data"):
            assert torch.equal(path.trainable(u, kind), u)  # to the bit: runs are resumed
        for kind in ("noise", "score"):
            torch.testing.assert_close(path.trainable(u, kind), 1e-3 + (1 - 2e-3) * u, rtol=0, atol=1e-15)
    for kind in ("velocity", "noise", "data", "score"):
        torch.testing.assert_close(
            VariancePreserving().trainable(u, kind), 1e-5 + (1 - 1e-5) * u, rtol=0, atol=1e-15
        )
    index = torch.arange(1000)
    assert torch.equal(DiscretePath.linear().trainable(index, "noise"), index)


def test_network_is_fed_and_read_in_its_own_convention():
    """A SiT network fed data-time and answering data minus noise has no flow-matching loss."""
    seen = {}

    def perfect_sit(x, t, cond, run):
        seen["t"] = t
        return torch.cat([data - noise, torch.full_like(data, 9.0)], 1)

    data, noise = torch.randn(2, 3, 1, 8, 8)
    t = torch.tensor([0.1, 0.5, 0.9])
    told = Cond(label=torch.zeros(3, dtype=torch.long))
    losses = Denoising().at(
        perfect_sit, toy_model(SIT), path=SIT.make_path(), data=data, noise=noise, t=t, cond=told
    )
    torch.testing.assert_close(seen["t"], 1 - t)
    assert losses["loss"] < 1e-12


def at_start() -> tuple[DiT, NoisyBatch]:
    """A fresh DiT, which answers exactly zero, under DDPM's convention."""
    model = DiT(DiTConfig(size=4, patch=2, channels=1, width=32, depth=1, heads=2, classes=2))
    batch = made_batch(DDPM)
    out = model(batch.x.float(), batch.t.float(), Cond(label=torch.zeros(16, dtype=torch.long)))
    prediction, fraction = DDPM.split(out.double())
    return model, NoisyBatch(**vars(batch) | {"prediction": prediction, "fraction": fraction})


def test_fresh_network_has_the_mean_of_both_log_variances():
    _, batch = at_start()
    path = batch.path
    assert isinstance(path, DiscretePath)
    assert batch.fraction is not None and torch.equal(batch.fraction, torch.full_like(batch.fraction, 0.5))
    mean = (path.beta.log() + path.log_posterior_variance) / 2
    ours = path.log_variance(batch.fraction, batch.t, batch.x)
    torch.testing.assert_close(ours, mean[batch.t][:, None, None, None].expand_as(ours), rtol=1e-14, atol=0)


def test_bound_teaches_the_variance_and_nothing_else():
    batch = made_batch(DDPM)
    out = torch.randn(16, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    prediction, fraction = DDPM.split(out)
    told = NoisyBatch(**vars(batch) | {"prediction": prediction, "fraction": fraction})
    VariationalBound().loss(told).sum().backward()
    assert out.grad is not None
    assert torch.equal(out.grad[:, :1], torch.zeros_like(out.grad[:, :1]))
    assert out.grad[:, 1:].abs().min() > 0


def test_bound_is_zero_for_the_true_posterior():
    """With the true noise and the fraction of log beta~ (0), p is q; t = 0 has no posterior."""
    batch = made_batch(DDPM, fraction=0.0)
    assert (batch.t > 0).all()
    assert VariationalBound().loss(batch).abs().max() < 1e-12


def test_bound_is_the_integral_of_q_log_q_over_p_in_bits():
    """Twin: E_q[log2 q - log2 p] on a grid around each mean, from the densities of x_{t-1}."""
    batch = made_batch(DDPM, fraction=0.7)
    wrong = NoisyBatch(
        **vars(batch) | {"prediction": batch.prediction + 0.3 * torch.randn(16, 1, 4, 4).double()}
    )
    path, t = DiscretePath.linear(), wrong.t
    guess = (wrong.x - (1 - path.abar[t]).sqrt()[:, None, None, None] * wrong.prediction) / path.abar[
        t
    ].sqrt()[:, None, None, None]
    beta, tilde = path.beta[t], path.posterior_variance[t]
    q = torch.distributions.Normal(path.posterior_mean(wrong.x, wrong.data, t), spread(tilde.sqrt()))
    p_variance = (0.7 * beta.log() + 0.3 * tilde.log()).exp()
    p = torch.distributions.Normal(path.posterior_mean(wrong.x, guess, t), spread(p_variance.sqrt()))
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None, None, None, None]
    at = q.mean + q.stddev * z
    integrand = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (q.log_prob(at) - p.log_prob(at))
    twin = torch.trapezoid(integrand, dx=18 / 4000, dim=0).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(VariationalBound().loss(wrong), twin, rtol=1e-8, atol=1e-10)


def spread(v: Tensor) -> Tensor:
    return v[:, None, None, None].expand(-1, 1, 4, 4)


def test_bound_at_time_zero_is_the_likelihood_of_the_data():
    batch = made_batch(DDPM, fraction=0.5)
    first = NoisyBatch(**vars(batch) | {"t": torch.zeros(16, dtype=torch.long)})
    path = DiscretePath.linear()
    guess = (first.x - (1 - path.abar[0]).sqrt() * first.prediction) / path.abar[0].sqrt()
    log_variance = 0.5 * (path.beta[0].log() + path.posterior_variance[1].log()).expand_as(guess)
    nll = -discretised_log_likelihood(first.data, guess, log_variance).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(VariationalBound().loss(first), nll)


@pytest.mark.parametrize("std", [0.002, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("mean", [-1.4, -0.3, 0.0, 1.0])
def test_discretised_gaussian_sums_to_one(mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
    log_mass = discretised_log_likelihood(levels, torch.tensor(mean), log_variance)
    assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-9)  # 254 bins hold at least 1e-12 each


def test_discretised_gaussian_keeps_its_accuracy_in_float32():
    """Five deviations out: the plain difference of two normal integrals in float32 would be rounding."""
    data, std = torch.tensor([100 / 127.5 - 1]), 0.05
    mean = data - 5 * std
    log_variance = torch.full((1,), 2 * math.log(std))
    ours = discretised_log_likelihood(data, mean, log_variance)
    exact = discretised_log_likelihood(data.double(), mean.double(), log_variance.double())
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    assert exact.item() > math.log(1e-12)
    width = math.log(2 * HALF_BIN) - math.log(std * math.sqrt(2 * math.pi)) - 12.5
    assert exact.item() == pytest.approx(width, rel=0.01)  # the density times the bin's width


def test_kl_of_known_gaussians():
    """KL(N(1, 4) || N(0, 1)) = (4 + 1 - 1 - ln 4) / 2."""
    kl = gaussian_kl(torch.tensor(1.0), torch.tensor(math.log(4.0)), torch.tensor(0.0), torch.tensor(0.0))
    assert kl.item() == pytest.approx((4 - math.log(4)) / 2)


def test_dit_objective_is_both_terms_with_their_weights():
    data, noise = torch.randn(2, 4, 1, 8, 8)
    path, told = DiscretePath.linear(), Cond(label=torch.arange(4))
    given = {"path": path, "data": data, "noise": noise, "t": torch.tensor([0, 3, 500, 999]), "cond": told}
    model = toy_model()
    both = DIFFUSION.at(model, model, **given)
    assert set(both) == {"Regression", "VariationalBound", "loss"}
    torch.testing.assert_close(both["loss"], both["Regression"] + both["VariationalBound"])
    doubled = Denoising((Regression(2.0), VariationalBound(0.5))).at(model, model, **given)
    torch.testing.assert_close(doubled["loss"], 2 * both["Regression"] + 0.5 * both["VariationalBound"])


@pytest.mark.parametrize("kind", every(Term), ids=lambda k: k.__name__)
def test_term_of_weight_zero_is_not_computed(kind, monkeypatch):
    monkeypatch.setattr(kind, "loss", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(kind, "taps", lambda *_: pytest.fail("asked for its sites"))
    objective = Denoising((kind(weight=0.0), Kept()))
    model = toy_model()
    data, noise = torch.randn(2, 2, 1, 8, 8)
    losses = objective.at(
        model,
        model,
        path=DiscretePath.linear(),
        data=data,
        noise=noise,
        t=torch.tensor([1, 2]),
        cond=Cond(label=torch.zeros(2, dtype=torch.long)),
    )
    assert set(losses) == {"Kept", "loss"}


class Kept(Term):
    """Reads the blocks and keeps what it saw."""

    weight = 1.0

    def taps(self, sites):
        return [site.name for site in sites if site.kind == "block"]

    def loss(self, batch):
        assert list(batch.taps) == ["blocks.0", "blocks.1"]
        return batch.taps["blocks.1"].flatten(1).square().mean(1)


def test_objectives_that_cannot_be_learned_are_refused():
    with pytest.raises(ConfigError, match=r"Regression: weight=-1.0 should not be negative"):
        Denoising((Regression(-1.0),))
    with pytest.raises(ConfigError, match="nothing to learn"):
        Denoising((Regression(0.0),))
    with pytest.raises(ConfigError, match="Regression is given twice"):
        Denoising((Regression(), Regression(2.0)))
    with pytest.raises(ConfigError, match=r"VariationalBound needs a learned variance.*path='linear'"):
        DIFFUSION.check(toy_model(Convention()))
    DIFFUSION.check(toy_model())


@pytest.mark.parametrize(
    ("density", "median", "upper_quartile"),
    [
        (Uniform(), 0.5, 0.75),
        (LogitNormal(0.0, 1.0), 0.5, 0.66251),  # sigmoid(0.67449)
        (LogitNormal(-0.4, 1.0), 0.40131, 0.56819),
        (Shifted(3.0), 0.75, 0.9),
        (Shifted(3.0, LogitNormal()), 0.75, 0.85484),  # sigmoid(0.67449 + ln 3)
    ],
)
def test_timestep_quantiles(density, median, upper_quartile):
    given = density.quantile(torch.tensor([0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(
        given, torch.tensor([median, upper_quartile], dtype=torch.float64), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("density", [Uniform(), LogitNormal(1, 2), Shifted(0.2), Shifted(9, LogitNormal())])
def test_timestep_quantiles_rise_and_stay_inside(density):
    t = density.quantile(torch.linspace(0, 1 - 2**-53, 1001, dtype=torch.float64))
    assert (t.diff() > 0).all() and t.min() >= 0 and t.max() <= 1


def test_discrete_times_are_uniform_integers():
    path = DiscretePath.linear()
    places = path.place(torch.arange(4000, dtype=torch.float64) / 4000)
    assert torch.equal(places.bincount(), torch.full((1000,), 4))
