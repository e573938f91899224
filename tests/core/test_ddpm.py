"""Paths and their conversions, DDPM's tables, and what a network's numbers mean."""

from __future__ import annotations

import math
from itertools import permutations

import diffusers
import pytest
import torch
from torch import Tensor

from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.ddpm import DISCRETE, DiscretePath
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.path import Cosine, Linear, Path, Trig, VariancePreserving, spread

CONTINUOUS = [Linear(), Cosine(), VariancePreserving(), Trig()]
PREDICTIONS = ("velocity", "noise", "data", "score")
T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def by_name(path: object) -> str:
    return type(path).__name__


def pair() -> tuple[Tensor, Tensor]:
    """Data and noise, one sample a time of `T`."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(T), 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "path", [Cosine(), VariancePreserving(), Trig(), *(make() for make in DISCRETE.values())]
)
def test_variance_is_preserved(path: Path) -> None:
    t = (
        torch.arange(-1, 1000).double()
        if isinstance(path, DiscretePath)
        else torch.linspace(0, 1, 101).double()
    )
    c = path.at(t)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", CONTINUOUS, ids=by_name)
def test_velocity_is_the_derivative_of_the_mixture(path: Path) -> None:
    data, noise = pair()
    h = 1e-5
    difference = (path.mix(data, noise, T + h) - path.mix(data, noise, T - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(data, noise, T), difference, rtol=1e-7, atol=1e-7)


def test_ends_are_data_and_noise() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for path in (Linear(), Cosine(), Trig()):
        c = path.at(ends)
        torch.testing.assert_close(c.alpha, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-15)
        torch.testing.assert_close(c.sigma, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)
    alpha = VariancePreserving().at(ends).alpha
    torch.testing.assert_close(alpha[1].log().item(), -0.25 * 19.9 - 0.05)  # SiT's table at its t = 0


@pytest.mark.parametrize("path", CONTINUOUS, ids=by_name)
@pytest.mark.parametrize(("source", "target"), list(permutations(PREDICTIONS, 2)))
def test_conversions_are_exact_and_invert_each_other(path: Path, source: str, target: str) -> None:
    data, noise = pair()
    x, sigma = path.mix(data, noise, T), path.at(T).sigma[:, None, None]
    true = {"data": data, "noise": noise, "score": -noise / sigma, "velocity": path.velocity(data, noise, T)}
    found = path.convert(true[source], x, T, source, target)  # type: ignore[arg-type]
    back = path.convert(found, x, T, target, source)  # type: ignore[arg-type]
    torch.testing.assert_close(found, true[target], rtol=0, atol=1e-6)
    torch.testing.assert_close(back, true[source], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), list(permutations(("noise", "data", "score"), 2)))
def test_discrete_conversions(source: str, target: str) -> None:
    path, t = DiscretePath.linear(), torch.arange(0, 1000, 40)
    data, noise = pair()
    x, sigma = path.mix(data, noise, t.double()), path.at(t.double()).sigma[:, None, None]
    true = {"data": data, "noise": noise, "score": -noise / sigma}
    found = path.convert(true[source], x, t.double(), source, target)  # type: ignore[arg-type]
    torch.testing.assert_close(found, true[target], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", CONTINUOUS, ids=by_name)
def test_score_of_sits_convention(path: Path) -> None:
    """With t = 1 at the data: score = (r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha'."""
    data, noise = pair()
    c = path.at(T)
    alpha, sigma, alpha_rate, sigma_rate = (
        v[:, None, None] for v in (c.alpha, c.sigma, -c.alpha_rate, -c.sigma_rate)
    )
    x, v = path.mix(data, noise, T), alpha_rate * data + sigma_rate * noise
    r = alpha / alpha_rate
    theirs = (r * v - x) / (sigma**2 - r * sigma_rate * sigma)
    ours = path.convert(-v, x, T, "velocity", "score")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if isinstance(path, Linear):
        s = 1 - T[:, None, None]
        torch.testing.assert_close(ours, (s * v - x) / (1 - s), rtol=1e-9, atol=1e-9)


def test_unknown_prediction_is_quoted() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="unknown prediction 'nois'; did you mean 'noise'"):
        Linear().convert(x, x, torch.ones(1), "nois", "data")  # type: ignore[arg-type]


def test_cumulative_products_to_the_published_digits() -> None:
    abar = DiscretePath.linear().abar
    assert abar[0].item() == pytest.approx(0.9999, abs=1e-12)
    assert f"{abar[499].item():.7f}" == "0.0785872"
    assert f"{abar[999].item():.5e}" == "4.03583e-05"


def test_stable_diffusions_betas_to_the_published_digits() -> None:
    """sqrt(beta) is linear from sqrt(0.00085) to sqrt(0.012); abar ends at 0.00466, not at zero."""
    abar = DiscretePath.scaled_linear().abar
    assert abar[0].item() == pytest.approx(1 - 0.00085, abs=1e-12)
    assert f"{abar[999].item():.5f}" == "0.00466"
    root = [0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5) for i in range(1000)]
    assert DiscretePath.scaled_linear().beta.tolist() == pytest.approx([r * r for r in root], rel=1e-9)


def test_improved_ddpms_cosine_to_the_formula() -> None:
    """abar_t = f(t) / f(0), f(t) = cos^2((t / T + 0.008) / 1.008 pi / 2); only the last beta is cut to 0.999."""

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    path = DiscretePath.cosine()
    assert path.abar[:999].tolist() == pytest.approx([f(t) / f(0) for t in range(1, 1000)], rel=1e-9)
    assert path.beta[-1].item() == pytest.approx(0.999, rel=1e-12) and (path.beta[:-1] < 0.76).all()
    assert path.abar[999].item() == pytest.approx(f(999) / f(0) * 0.001, rel=1e-9)
    assert path.beta[0].item() == pytest.approx(4.1284e-5, rel=1e-4)  # 1 - f(1) / f(0) by hand


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ddpm", {"beta_schedule": "linear"}),
        ("ddpm-sd", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("ddpm-cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_paths_by_name_are_schedules_of_diffusers(name: str, config: dict[str, object]) -> None:
    """Theirs are float32: betas to its precision, the products of a thousand of them to 1e-4."""
    path, theirs = DISCRETE[name](), diffusers.DDPMScheduler(**config)
    torch.testing.assert_close(path.beta.float(), theirs.betas, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(path.abar, theirs.alphas_cumprod.double(), rtol=1e-4, atol=0)
    convention = Convention(name, "noise", "index")
    again = convention.make_path()
    assert convention.discrete and isinstance(again, DiscretePath) and torch.equal(again.abar, path.abar)


def test_trig_is_trigflow() -> None:
    """The network is fed the angle and predicts dx / da = cos(a) noise - sin(a) data (Lu and Song 2024)."""
    data, noise = pair()
    convention = Convention("trig", "velocity")
    path, angle = convention.make_path(), (T * math.pi / 2)[:, None, None]
    torch.testing.assert_close(convention.model_time(T), T * math.pi / 2)
    x = path.mix(data, noise, T)
    torch.testing.assert_close(x, angle.cos() * data + angle.sin() * noise)
    output = angle.cos() * noise - angle.sin() * data
    value, _ = convention.split(output)
    torch.testing.assert_close(value, path.velocity(data, noise, T))
    torch.testing.assert_close(path.convert(value, x, T, "velocity", "data"), data)
    total = (
        angle.sin() + angle.cos()
    )  # a velocity network of the linear path at tan(a) = s / (1 - s) says the same
    s = (angle.sin() / total).flatten()
    torch.testing.assert_close(Linear().mix(data, noise, s), x / total)
    torch.testing.assert_close(((angle.cos() - angle.sin()) * x + (noise - data)) / total, output)
    backwards = Convention("trig", "velocity", "data")
    torch.testing.assert_close(backwards.model_time(T), (1 - T) * math.pi / 2)
    assert torch.equal(backwards.split(output)[0], -value)


def test_times_of_frames_follow_the_axis_that_is_named() -> None:
    """[B, T] against five axes, a series, and tokens, of which all lengths are the same."""
    t = torch.rand(3, 3, dtype=torch.float64)
    for axis, shape in ((2, (3, 3, 3, 3, 3)), (2, (3, 3, 3)), (1, (3, 3, 3))):
        x, noise = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        mixed = Linear().mix(x, noise, t, axis)
        for b in range(3):
            for i in range(3):
                one = Linear().mix(x[b : b + 1], noise[b : b + 1], t[b, i : i + 1]).select(axis, i)
                torch.testing.assert_close(mixed[b : b + 1].select(axis, i), one, rtol=0, atol=0)
        found = Linear().velocity(x, noise, t, axis)
        back = Linear().convert(found, mixed, t, "velocity", "data", axis)
        torch.testing.assert_close(back, x)
    assert spread(t[:, 0], torch.zeros(3, 2, 2)).shape == (3, 1, 1)
    for like, axis in ((torch.zeros(3, 3, 3), None), (torch.zeros(3, 4, 5), 2), (torch.zeros(3, 3), 2)):
        with pytest.raises(ShapeError, match="times \\[3, 3\\] with axis="):
            spread(t, like, axis)


def test_respaced_maps() -> None:
    path = DiscretePath.linear()
    even = path.evenly(250).tolist()
    assert even[:4] == [0, 4, 8, 12] and even[-2:] == [995, 999] and len(set(even)) == 250
    assert path.strided(50).tolist() == list(range(0, 981, 20))
    assert path.evenly(1000).tolist() == path.strided(1000).tolist() == list(range(1000))
    assert path.times(50).tolist() == [*range(980, -1, -20), -1]


def test_respacing_recomputes_betas_from_the_retained_products() -> None:
    path = DiscretePath.linear()
    kept = path.respaced(path.evenly(250))
    assert kept.index.tolist() == path.evenly(250).tolist()
    torch.testing.assert_close((1 - kept.beta).cumprod(0), path.abar[kept.index], rtol=1e-12, atol=0)
    torch.testing.assert_close(path.respaced(path.evenly(1000)).beta, path.beta, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_outside_the_schedule_are_refused(steps: int) -> None:
    path = DiscretePath.linear()
    for choose in (path.evenly, path.strided):
        with pytest.raises(ConfigError, match=f"steps={steps} should lie between 1 and the schedule's 1000"):
            choose(steps)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), in one dimension."""
    path, t = DiscretePath.linear(), torch.tensor([1, 250, 999])
    data, x = torch.full((3, 1), 0.7, dtype=torch.float64), torch.full((3, 1), -0.4, dtype=torch.float64)
    keep, beta, before = 1 - path.beta[t], path.beta[t], path.abar_before[t]
    precision = keep / beta + 1 / (1 - before)
    mean = (keep.sqrt() / beta * x[:, 0] + before.sqrt() / (1 - before) * data[:, 0]) / precision
    torch.testing.assert_close(path.posterior_variance[t], 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.posterior_mean(x, data, t)[:, 0], mean, rtol=1e-9, atol=0)


def test_log_variance_of_an_untrained_network_is_the_mean_of_its_bounds() -> None:
    """v = 0 gives f = 1/2; f is not clamped, and log beta~ at t = 0 is the one at t = 1."""
    path, t = DiscretePath.linear(), torch.tensor([0, 1, 500, 999])
    like = torch.zeros(4, 2, 1, 1, dtype=torch.float64)
    _, half = DDPM.split(torch.zeros(4, 4, 1, 1, dtype=torch.float64))
    low, high = path.log_posterior_variance[t], path.beta[t].log()
    expected = ((low + high) / 2)[:, None, None, None].expand_as(like)
    torch.testing.assert_close(path.log_variance(half, t, like), expected)
    torch.testing.assert_close(path.log_variance(None, t, like).flatten(), low)
    torch.testing.assert_close(
        path.log_variance(torch.full_like(like, 1.5), t, like)[:, 0, 0, 0], 1.5 * high - 0.5 * low
    )
    assert path.posterior_variance[0] == 0
    assert path.log_posterior_variance[0] == path.posterior_variance[1].log()


def test_noise_time_runs_from_data_to_noise() -> None:
    path = DiscretePath.linear()
    assert [path.noise_time(t) for t in (-1, 499, 999)] == [0, 0.5, 1]
    assert Linear().noise_time(0.3) == 0.3


def test_split_turns_every_convention_into_noise_time() -> None:
    out = torch.randn(2, 8, 3, 3)
    value, fraction = DDPM.split(out)
    assert torch.equal(value, out[:, :4]) and torch.equal(fraction, (out[:, 4:] + 1) / 2)  # type: ignore[arg-type]
    value, fraction = SIT.split(out)
    assert torch.equal(value, -out[:, :4]) and fraction is None
    assert torch.equal(Convention().split(out)[0], out)
    assert torch.equal(Convention(prediction="data", time="data").split(out)[0], out)
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(SIT.model_time(t), 1 - t) and torch.equal(Convention().model_time(t), t)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "liner"}, "unknown path 'liner'; did you mean 'linear'"),
        ({"prediction": "eps"}, "unknown prediction 'eps'"),
        ({"time": "seconds"}, "unknown time 'seconds'"),
        ({"path": "ddpm", "prediction": "noise"}, "cannot be fed time='noise'"),
        ({"time": "index"}, "ddpm goes with index"),
        ({"path": "ddpm", "time": "index"}, "has no velocity"),
        ({"path": "ddpm-cosin", "time": "index"}, "unknown path 'ddpm-cosin'; did you mean 'ddpm-cosine'"),
        ({"path": "ddpm-sd", "prediction": "noise"}, "path='ddpm-sd' cannot be fed time='noise'"),
        ({"path": "trig", "time": "index"}, "path='trig' cannot be fed time='index'"),
    ],
)
def test_conventions_that_make_no_sense_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Convention(**settings)  # type: ignore[arg-type]
