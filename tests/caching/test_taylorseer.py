"""TaylorSeer against closed forms, exact rational weights and an independent reuse cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import factorial, prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.run import Call, Run, named
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT
from rig import STEPS, call_at, calls, evaluate, noise, play, sample, tiny_dit


def forecasts(policy: TaylorSeer, F: Callable[[int], float], total: int) -> list[float]:
    return [
        float(v)
        for v in play(
            policy, lambda call: torch.tensor([[[float(F(call.index))]]], dtype=torch.float64), calls(total)
        )
    ]


# --- the schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "warmup", "count"), [(4, 2, 14), (3, 2, 18), (5, 2, 11), (6, 3, 10), (5, 1, 10), (6, 1, 9)]
)
def test_full_evaluations_of_fifty(interval, warmup, count):
    policy = TaylorSeer(interval=interval, warmup=warmup)
    computed = []
    play(policy, lambda call: computed.append(call.index) or torch.zeros(1), calls(50))
    expected = [*range(warmup), *range(warmup - 1 + interval, 50, interval)]
    assert computed == policy.full_steps(50) == expected
    assert len(computed) == count


def test_full_evaluations_of_the_flux_setting():
    assert TaylorSeer(interval=6, warmup=3).full_steps(50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]


# --- the forecaster ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "errors"), [(2, (-5, -10, -15, -20)), (1, (-6, -14, -24, -36)), (0, (-21, -44, -69, -96))]
)
def test_bias_on_a_square(order, errors):
    values = forecasts(TaylorSeer(5, order, warmup=1), lambda s: s * s, 15)
    assert [values[10 + k] - (10 + k) ** 2 for k in (1, 2, 3, 4)] == pytest.approx(errors, abs=1e-10)


def test_irregular_spacing_after_the_warmup():
    second, first = (forecasts(TaylorSeer(6, order, warmup=3), lambda s: s * s, 16) for order in (2, 1))
    assert second[9] == pytest.approx(74.58333, abs=1e-5)
    assert (second[15], first[15]) == pytest.approx((219, 218), abs=1e-5)


def test_the_first_difference_is_that_of_the_last_two_evaluations_of_the_warmup():
    """On s^2 after evaluations 0, 1 and 2: 4 + 3 k. A difference of differences, 2, would make it 4 + 3 k + k^2."""
    values = forecasts(TaylorSeer(6, 2, warmup=3), lambda s: s * s, 8)
    assert values[3:] == pytest.approx([4 + 3 * k for k in range(1, 6)], abs=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (4, 2), (5, 3), (8, 4)])
def test_affine_is_exact(order, interval, warmup):
    values = forecasts(TaylorSeer(interval, order, warmup), lambda s: 3 * s - 7, 30)
    start = 1 if warmup > 1 else interval + 1
    assert values[start:] == pytest.approx([3 * s - 7 for s in range(start, 30)], abs=1e-10)


@pytest.mark.parametrize(("order", "absolute"), [(1, 2.6), (2, 3.88), (3, 4.56), (4, 4.84)])
def test_weights_of_the_anchors(order, absolute):
    """A forecast is linear in the anchors, so a unit impulse at each reads off its weight."""
    anchors = [5 * i for i in range(order + 1)]
    policy = TaylorSeer(5, order, warmup=1)
    weights = [forecasts(policy, lambda s, at=at: s == at, anchors[-1] + 5)[-1] for at in anchors]
    published = {1: (-0.8, 1.8), 2: (0.32, -1.44, 2.12)}
    if order in published:
        assert weights == pytest.approx(published[order], abs=1e-6)
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    amplification = sum(map(abs, weights))
    assert amplification == pytest.approx(sum(1.6**i / factorial(i) for i in range(order + 1)), abs=1e-5)
    assert round(amplification, 2) == absolute


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_reproduces_polynomials_of_its_order(order):
    policy = TaylorSeer(5, order, warmup=order + 1, basis="newton")
    values = forecasts(policy, lambda s: (s - 6) ** order, 25)
    assert values == pytest.approx([(s - 6) ** order for s in range(25)], rel=1e-5, abs=1e-3)


def test_newton_equals_lagrange_and_taylor_does_not():
    def lagrange(s: int, anchors: Sequence[int]) -> float:
        terms = (F(a) * prod(Fraction(s - b, a - b) for b in anchors if b != a) for a in anchors)
        return float(sum(terms))

    def F(s: int) -> int:
        return s**4 % 23 - 9

    newton, taylor = (
        forecasts(TaylorSeer(6, 3, warmup=3, basis=basis), F, 50) for basis in ("newton", "taylor")
    )
    full = TaylorSeer(6, 3, warmup=3).full_steps(50)
    for s in set(range(9, 50)) - set(full):
        anchors = [a for a in full if a < s][-4:]
        assert newton[s] == pytest.approx(lagrange(s, anchors), rel=1e-4, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(newton, taylor, strict=True)) > 1


def feature(s: int) -> Tensor:
    """A slowly drifting feature as a bfloat16 model makes it, [1, 64, 64]."""
    phase = torch.linspace(0, 6, 4096, dtype=torch.float64)
    return (4 + torch.sin(0.03 * s + phase)).bfloat16().view(1, 64, 64)


def test_two_ways_to_keep_bfloat16_features():
    """Factors in float32, as ours, against differences taken in float32 and stored in bfloat16.

    Ours has a thousandth of the other's error; both lie below the rounding of the forecast to bfloat16.
    """
    policy, anchors, k = TaylorSeer(6, 2, warmup=3), (0, 1, 2, 8, 14), 4
    weights = map(float, rational_weights(2, anchors, k, warmup=3))
    exact = sum(w * feature(a).double() for w, a in zip(weights, anchors, strict=True))
    rounded: list[Tensor] = []
    for s, d in zip(anchors, (1, 1, 1, 6, 6), strict=True):
        fresh = [feature(s)]
        for f in rounded[:2]:
            fresh.append(((fresh[-1].float() - f.float()) / d).bfloat16())
        rounded = fresh
    theirs = sum(g.float() * k**i / factorial(i) for i, g in enumerate(rounded))
    ours = play(policy, lambda call: feature(call.index).float(), calls(20))[14 + k]
    assert (ours - exact).norm() < 1e-2 * (theirs - exact).norm()
    cast = play(policy, lambda call: feature(call.index), calls(20))
    assert {out.dtype for out in cast} == {torch.bfloat16}
    assert torch.equal(cast[14 + k], ours.bfloat16())


# --- a whole model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_interval_one_changes_no_bit(model, order):
    exact = sample(model)["cond"]
    assert exact.abs().max() > 0.1
    assert torch.equal(sample(model, [TaylorSeer(interval=1, order=order)])["cond"], exact)
    assert TaylorSeer(4, order).exact() == TaylorSeer(1, order)


@pytest.mark.parametrize("policy", [TaylorSeer(4, 2), TaylorSeer(3, 2, warmup=3)], ids=str)
def test_interleaved_lanes_equal_runs_of_one_lane_to_the_bit(model, policy):
    """Classifier-free guidance in two calls a step: each lane draws what it would draw alone."""

    def alone(lane: str, seed: int) -> Tensor:
        trajectory, x = Trajectory(model.sites(), [policy], STEPS), noise(seed=seed)
        with torch.no_grad():
            for index in range(STEPS):
                call = call_at(model, index, lane)
                x = x - trajectory.guided(call, evaluate(model, trajectory, x, call)) / STEPS
        return x

    together = sample(model, [policy], ("cond", "uncond"))
    assert torch.equal(together["cond"], alone("cond", 0))
    assert torch.equal(together["uncond"], alone("uncond", 1))
    assert not torch.equal(alone("cond", 0), alone("uncond", 0))


class Reuse(Run):
    """FORA, written without TaylorSeer: in skipped evaluations every branch returns its last output."""

    def __init__(self, branches: Sequence[str]) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.branches, self.full = branches, True

    def site(self, name, fn, *args):
        if name not in self.branches:
            return fn(*args)
        if self.full:
            self.kept[name] = fn(*args)
        return self.kept[name]


@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (4, 2), (5, 3)])
def test_order_zero_is_plain_reuse_bit_for_bit(model, interval, warmup):
    run, x = Reuse(named(model.sites(), "branch")), noise()
    with torch.no_grad():
        for i in range(STEPS):
            run.full = i < warmup or (i - warmup) % interval == interval - 1
            x = x - model(x, torch.full((2,), 1 - i / STEPS), Cond(label=torch.arange(2)), run=run) / STEPS
    assert torch.equal(sample(model, [TaylorSeer(interval, 0, warmup)])["cond"], x)


def rational_weights(order: int, anchors: Sequence[int], k: int, warmup: int) -> list[Fraction]:
    """Exact weights of all `anchors` (oldest first) in the forecast k after the latest, by unit impulses.

    An evaluation before the last one of the warm-up leaves its value and no difference.
    """
    weights = []
    for impulse in anchors:
        factors: list[Fraction] = []
        for i, s in enumerate(anchors):
            fresh = [Fraction(s == impulse)]
            for f in factors[:order] if s >= warmup - 1 else ():
                fresh.append((fresh[-1] - f) / (s - anchors[i - 1]))
            factors = fresh
        weights.append(sum(g * Fraction(k**i, factorial(i)) for i, g in enumerate(factors)))
    return weights


class Twin(Run):
    """The slow twin: keeps every full output, and combines them with exact weights in float64."""

    def __init__(self, branches: Sequence[str], order: int, warmup: int) -> None:
        super().__init__()
        self.branches, self.order, self.warmup, self.anchors = branches, order, warmup, []
        self.history: dict[str, list[Tensor]] = {name: [] for name in branches}
        self.index, self.full = 0, True

    def site(self, name, fn, *args):
        if name not in self.branches:
            return fn(*args)
        past = self.history[name]
        if self.full:
            past.append(fn(*args).double())
            return past[-1].float()
        weights = rational_weights(self.order, self.anchors, self.index - self.anchors[-1], self.warmup)
        return sum(float(w) * F for w, F in zip(weights, past, strict=True)).float()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (4, 2), (3, 3), (3, 5)])
def test_a_trajectory_equals_the_slow_twin(model, order, interval, warmup):
    run, x = Twin(named(model.sites(), "branch"), order, warmup), noise()
    with torch.no_grad():
        for i in range(STEPS):
            run.index, run.full = i, i < warmup or (i - warmup) % interval == interval - 1
            run.anchors += [i] * run.full
            x = x - model(x, torch.full((2,), 1 - i / STEPS), Cond(label=torch.arange(2)), run=run) / STEPS
    torch.testing.assert_close(sample(model, [TaylorSeer(interval, order, warmup)])["cond"], x)


def test_known_branches_follow_the_closed_form():
    """Branches that are functions of s, gates that do not know the time: tokens gain the forecasts."""
    model, now = tiny_dit(), [0]
    polynomials = {}
    for i, block in enumerate(model.blocks):
        block.modulation.weight.data.zero_()
        block.modulation.bias.data.fill_(1)
        for kind, a in (("attn", i + 1), ("mlp", -2 * i)):
            polynomials[f"blocks.{i}.{kind}"] = (a, i)
        block.attend = lambda run, at, x, *_, a=i + 1, b=i: torch.full_like(x, a * now[0] ** 2 + b)
        block.feed = lambda run, at, x, *_, a=-2 * i, b=i: torch.full_like(x, a * now[0] ** 2 + b)
    policy, gained = TaylorSeer(5, 2, warmup=1), []
    model.head.forward = lambda x, c, **_: gained.append(x[0, 0, 0].item()) or x.new_zeros(*x.shape[:2], 12)

    def at_its_index(model: DiT, trajectory: Trajectory, x: Tensor, call: Call) -> Tensor:
        now[0] = call.index
        return evaluate(model, trajectory, x, call)

    sample(model, [policy], steps=25, evaluate=at_its_index)
    embedded = model.tokenize(noise()).x[0, 0, 0].item()
    for s in range(25):
        anchors = [a for a in policy.full_steps(25) if a <= s]
        weights = rational_weights(2, anchors, s - anchors[-1], policy.warmup)
        square = float(sum(w * a * a for w, a in zip(weights, anchors, strict=True)))
        if s > 10:
            assert square == s * s - 5 * (s % 5)
        expected = sum(a * square + b for a, b in polynomials.values())
        assert gained[s] - embedded == pytest.approx(expected, abs=2e-3)


FINGERPRINT = """
import hashlib, torch
torch.set_num_threads(1)
from rig import sample, tiny_dit
from ditkit.caching.taylorseer import TaylorSeer
out = sample(tiny_dit(), [TaylorSeer(4, 2)], ("cond", "uncond"))
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in out.values())).hexdigest())
"""


def test_back_to_back_equals_fresh_processes(model):
    here = []
    for _ in range(2):
        out = sample(model, [TaylorSeer(4, 2)], ("cond", "uncond"))
        here.append(hashlib.sha256(b"".join(x.numpy().tobytes() for x in out.values())).hexdigest())
    fresh = subprocess.run(
        [sys.executable, "-c", FINGERPRINT],
        cwd=Path(__file__).parents[1] / "support",
        capture_output=True,
        text=True,
        check=True,
    )
    assert [*here, fresh.stdout.strip()] == [here[0]] * 3
