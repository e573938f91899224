"""Averages of the weights against their definitions, and reconstruction after training (EDM2)."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditkit.core.checkpoint import write_state
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.train.ema import Average, Constant, Power, exponent, relative_std
from ditkit.train.posthoc import coefficients, correlation, read_snapshots, reconstruct, write_snapshot


class Tiny(nn.Module):
    """A weight, a float buffer and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def trajectory(steps: int) -> Tensor:
    """Weights after each step, [steps, 3]: a decaying trend with noise, as training makes them."""
    noise = torch.randn(steps, 3, generator=torch.Generator().manual_seed(1)).cumsum(0) / 30
    return torch.exp(-torch.arange(steps)[:, None] / torch.tensor([20.0, 80.0, 300.0])) + noise


def follow(decay: Constant | Power, weights: Tensor) -> Average:
    module = Tiny()
    average = Average(module, decay)
    for step, weight in enumerate(weights, start=1):
        module.weight.data.copy_(weight)
        average.update(module, step)
    return average


@pytest.mark.parametrize("std", [0.01, 0.05, 0.10, 0.2, 12**-0.5])
def test_std_to_exponent_and_back(std):
    assert relative_std(exponent(std)) == pytest.approx(std, rel=1e-6)


def test_exponents_of_the_paper():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)


def test_relative_std_is_that_of_the_profile():
    """Of the density (gamma + 1) tau^gamma on [0, 1], integrated."""
    tau = np.linspace(0, 1, 200_001)
    density = (exponent(0.1) + 1) * tau ** exponent(0.1)
    mean = np.trapezoid(tau * density, tau)
    assert np.sqrt(np.trapezoid((tau - mean) ** 2 * density, tau)) == pytest.approx(0.1, rel=1e-6)


def test_constant_average_is_first_synchronised_then_the_plain_recursion():
    weights = trajectory(50)
    slow = weights[0].clone()
    for weight in weights[1:]:
        slow = 0.9 * slow + 0.1 * weight
    torch.testing.assert_close(follow(Constant(0.9), weights).state["weight"], slow)
    assert torch.equal(follow(Constant(0.9999), weights[:1]).state["weight"], weights[0])


def test_power_average_is_the_weighted_sum_of_its_definition():
    """Weight of step i: (1 - beta_i) prod_{j > i} beta_j; for many steps, i^gamma up to 1 / steps."""
    weights, gamma = trajectory(400).double(), exponent(0.1)
    beta = (1 - 1 / torch.arange(1, 401, dtype=torch.float64)) ** (gamma + 1)
    share = (1 - beta) * torch.cat([beta[1:].flip(0).cumprod(0).flip(0), beta.new_ones(1)])
    assert share.sum().item() == pytest.approx(1)
    tracked = follow(Power(0.1), weights.float()).state["weight"]
    torch.testing.assert_close(tracked.double(), share @ weights, rtol=1e-5, atol=1e-6)
    profile = torch.arange(1, 401, dtype=torch.float64) ** gamma
    assert (share - profile / profile.sum()).abs().sum() < 0.03


def test_buffers_are_copied_and_keep_their_type():
    module = Tiny()
    average = Average(module, Constant(0.9))
    module.weight.data.fill_(1.0)
    for step in (1, 2):
        module.seen.fill_(step)
        module.count.fill_(step)
        average.update(module, step)
    assert average.state["seen"].tolist() == [2.0, 2.0]
    assert average.state["count"].item() == 2 and average.state["count"].dtype == torch.long
    assert average.state["weight"].tolist() == [1.0, 1.0, 1.0]


def test_half_precision_weights_are_averaged_in_float32():
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    average = Average(module, Constant(0.999))
    with torch.no_grad():
        module.weight.fill_(0.0)
        average.update(module, 1)
        module.weight.fill_(1.0)
        average.update(module, 2)
    assert average.state["weight"].dtype == torch.float32
    torch.testing.assert_close(average.state["weight"], torch.full((2, 2), 0.001))


@pytest.mark.parametrize(("step_a", "std_a", "step_b", "std_b"), [(3, 0.05, 7, 0.1), (9, 0.1, 4, 0.05)])
def test_correlation_is_the_integral_of_two_profiles(step_a, std_a, step_b, std_b):
    def profile(t, step, std):
        gamma = exponent(std)
        return np.where(t <= step, (gamma + 1) * (t / step) ** gamma / step, 0.0)

    t = np.linspace(0, min(step_a, step_b), 400_001)
    twin = np.trapezoid(profile(t, step_a, std_a) * profile(t, step_b, std_b), t)
    given = [torch.tensor(float(v), dtype=torch.float64) for v in (step_a, std_a, step_b, std_b)]
    assert correlation(*given).item() == pytest.approx(twin, rel=1e-6)


@pytest.fixture
def snapshots(tmp_path):
    """Two tracked widths, kept every 100 of 800 steps."""
    weights, module = trajectory(800), Tiny()
    averages = [Average(module, Power(std)) for std in (0.05, 0.10)]
    for step, weight in enumerate(weights, start=1):
        module.weight.data.copy_(weight)
        for average in averages:
            average.update(module, step)
            if step % 100 == 0:
                write_snapshot(tmp_path, step, average)
    return tmp_path


def test_snapshots_are_read_in_order(snapshots):
    found = read_snapshots(snapshots)
    expected = [(step, std) for step in range(100, 900, 100) for std in (0.05, 0.10)]
    assert [(s.step, s.std) for s in found] == expected


@pytest.mark.parametrize(("step", "std"), [(800, 0.05), (800, 0.10), (500, 0.10)])
def test_reconstructing_a_tracked_average_returns_it(snapshots, step, std):
    found = read_snapshots(snapshots)
    share = coefficients(found, step, std)
    kept = [s for s in found if (s.step, s.std) == (step, std)]
    only = torch.tensor([s in kept for s in found]).double()
    torch.testing.assert_close(share, only, atol=1e-9, rtol=0)
    again = reconstruct(found, step, std)
    torch.testing.assert_close(again["weight"], kept[0].read()["weight"].float(), atol=1e-6, rtol=0)
    assert again["weight"].dtype == torch.float32 and again["count"].dtype == torch.long


@cache
def average_of(std: float) -> torch.Tensor:
    return follow(Power(std), trajectory(800)).state["weight"]


@pytest.mark.parametrize(("std", "bound"), [(0.06, 0.01), (0.075, 0.01), (0.09, 0.01), (0.15, 0.05)])
def test_reconstructing_an_untracked_average_comes_near_it(snapshots, std, bound):
    """Error relative to how far the two tracked averages lie apart; at 0.15 it is an extrapolation."""
    direct, narrow, wide = (average_of(s) for s in (std, 0.05, 0.10))
    again = reconstruct(read_snapshots(snapshots), 800, std)["weight"]
    assert (again - direct).norm() < bound * (wide - narrow).norm()


def test_what_cannot_be_reconstructed_is_refused(snapshots, tmp_path):
    found = read_snapshots(snapshots)
    with pytest.raises(ConfigError, match="no snapshot was saved"):
        reconstruct([], 10, 0.1)
    with pytest.raises(ConfigError, match=r"step=801 should lie between 1 and the last snapshot's 800"):
        reconstruct(found, 801, 0.1)
    with pytest.raises(ConfigError, match=r"std=0.3 should lie in \(0, 0.2887\]"):
        reconstruct(found, 800, 0.3)
    write_state(tmp_path / "z.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"z.safetensors is no snapshot"):
        read_snapshots(tmp_path)
    (tmp_path / "z.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"z.safetensors cannot be read"):
        read_snapshots(tmp_path)


@pytest.mark.parametrize("bad", [-0.1, 1.0, math.nan])
def test_decays_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=r"decay=.* should lie in \[0, 1\)"):
        Constant(bad)
    with pytest.raises(ConfigError, match="std="):
        Power(bad)
