"""TaylorSeer against closed forms, exact rational weights and an independent reuse cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import factorial, prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditkit.caching.taylorseer import Forecaster, TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.run import Call, Run, Site, named
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT
from rig import STEPS, call_at, evaluate, noise, sample, tiny_dit

BRANCH = (Site("b", "branch"),)


def play(
    policy: TaylorSeer,
    F: Callable[[Call], object],
    calls: Sequence[Call],
    tokens: Callable[[Call], object] = lambda call: torch.zeros(1, 1, 1),
) -> list[object]:
    """What one branch that is `F` of the call hands to its model in each of `calls`."""
    trajectory = Trajectory(BRANCH, [policy], len(calls))
    outs = []
    for call in calls:
        outs.append(trajectory.run(call).site("b", lambda x, call=call: F(call), tokens(call)))
        trajectory.leave(call, None)
    return outs


def calls(total: int) -> list[Call]:
    return [Call(index, total, 1 - index / total) for index in range(total)]


def forecasts(policy: TaylorSeer, F: Callable[[int], float], total: int) -> list[float]:
    return [
        float(v) for v in play(policy, lambda call: torch.tensor([[[float(F(call.index))]]]), calls(total))
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
    assert tuple(values[10 + k] - (10 + k) ** 2 for k in (1, 2, 3, 4)) == errors


def test_irregular_spacing_after_the_warmup():
    second, first = (forecasts(TaylorSeer(6, order, warmup=3), lambda s: s * s, 16) for order in (2, 1))
    assert second[9] == pytest.approx(74.58333, abs=1e-5)
    assert (second[15], first[15]) == pytest.approx((219, 218), abs=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (4, 2), (5, 3), (8, 4)])
def test_affine_is_exact(order, interval, warmup):
    values = forecasts(TaylorSeer(interval, order, warmup), lambda s: 3 * s - 7, 30)
    start = 1 if warmup > 1 else interval + 1
    assert values[start:] == [3 * s - 7 for s in range(start, 30)]


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
    weights = map(float, rational_weights(2, anchors, k))
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


def rational_weights(order: int, anchors: Sequence[int], k: int) -> list[Fraction]:
    """Exact weights of all `anchors` (oldest first) in the forecast k after the latest, by unit impulses."""
    weights = []
    for impulse in anchors:
        factors: list[Fraction] = []
        for i, s in enumerate(anchors):
            fresh = [Fraction(s == impulse)]
            for f in factors[:order]:
                fresh.append((fresh[-1] - f) / (s - anchors[i - 1]))
            factors = fresh
        weights.append(sum(g * Fraction(k**i, factorial(i)) for i, g in enumerate(factors)))
    return weights


class Twin(Run):
    """The slow twin: keeps every full output, and combines them with exact weights in float64."""

    def __init__(self, branches: Sequence[str], order: int) -> None:
        super().__init__()
        self.branches, self.order, self.anchors = branches, order, []
        self.history: dict[str, list[Tensor]] = {name: [] for name in branches}
        self.index, self.full = 0, True

    def site(self, name, fn, *args):
        if name not in self.branches:
            return fn(*args)
        past = self.history[name]
        if self.full:
            past.append(fn(*args).double())
            return past[-1].float()
        weights = rational_weights(self.order, self.anchors, self.index - self.anchors[-1])
        return sum(float(w) * F for w, F in zip(weights, past, strict=True)).float()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (4, 2), (3, 3)])
def test_a_trajectory_equals_the_slow_twin(model, order, interval, warmup):
    run, x = Twin(named(model.sites(), "branch"), order), noise()
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
        block.feed = lambda x, *_, a=-2 * i, b=i: torch.full_like(x, a * now[0] ** 2 + b)
    policy, gained = TaylorSeer(5, 2, warmup=1), []
    model.head.forward = lambda x, c: gained.append(x[0, 0, 0].item()) or x.new_zeros(*x.shape[:2], 12)

    def at_its_index(model: DiT, trajectory: Trajectory, x: Tensor, call: Call) -> Tensor:
        now[0] = call.index
        return evaluate(model, trajectory, x, call)

    sample(model, [policy], steps=25, evaluate=at_its_index)
    embedded = model.tokenize(noise()).x[0, 0, 0].item()
    for s in range(25):
        anchors = [a for a in policy.full_steps(25) if a <= s]
        weights = rational_weights(2, anchors, s - anchors[-1])
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
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [*here, fresh.stdout.strip()] == [here[0]] * 3


# --- lanes, nets, shapes -----------------------------------------------------------------------------------


def computed(policy: TaylorSeer, sequence: Sequence[Call], **kwargs) -> list[Call]:
    ran: list[Call] = []
    play(policy, lambda call: ran.append(call) or torch.zeros(1, 1, 1), sequence, **kwargs)
    return ran


def test_lanes_share_one_counter():
    both = [replace(call, lane=lane) for call in calls(12) for lane in ("cond", "uncond")]
    assert [(c.index, c.lane) for c in computed(TaylorSeer(), both)] == [
        (index, lane) for index in TaylorSeer().full_steps(12) for lane in ("cond", "uncond")
    ]


def test_a_late_lane_is_computed_once_and_then_keeps_step():
    """Guidance in an interval: the unconditional lane joins at 6, and is away from 12 to 17."""
    uncond = [replace(c, lane="uncond") for c in calls(24) if 6 <= c.index < 12 or c.index >= 18]
    both = sorted([*calls(24), *uncond], key=lambda c: (c.index, c.lane))
    ran = computed(TaylorSeer(interval=4), both)
    assert [c.index for c in ran if c.lane == "cond"] == [0, 1, 5, 9, 13, 17, 21]
    assert [c.index for c in ran if c.lane == "uncond"] == [6, 9, 18, 21]


def test_a_switch_of_experts_forces_a_full_evaluation_and_starts_its_own_schedule():
    sequence = [replace(c, net="low" if c.index >= 7 else "high") for c in calls(16)]
    assert [c.index for c in computed(TaylorSeer(interval=4), sequence)] == [0, 1, 5, 7, 8, 12]


def test_another_batch_or_grid_is_computed_in_full(model):
    def tokens(call: Call) -> Tensor:
        return torch.zeros(2 if call.index < 7 else 3, 4, 8)

    ran = computed(TaylorSeer(interval=4), calls(14), tokens=tokens)
    assert [c.index for c in ran] == [0, 1, 5, 7, 9, 13]
    grids = [replace(c, layout=model.layout((3, 8, 8 if c.index < 7 else 16))) for c in calls(14)]
    assert [c.index for c in computed(TaylorSeer(interval=4), grids)] == [0, 1, 5, 7, 9, 13]


def test_factors_of_another_shape_are_not_mixed():
    def F(call: Call) -> Tensor:
        return torch.full((2 if call.index < 7 else 3, 1, 1), float(call.index))

    outs = play(TaylorSeer(interval=4), F, calls(14), tokens=F)
    assert [float(out.flatten()[0]) for out in outs] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 11, 12, 13]
    assert [out.shape[0] for out in outs] == [2] * 7 + [3] * 7


def test_a_branch_may_return_several_tensors():
    """A joint block's branch returns image and text rows, here in two types."""

    def F(call: Call) -> dict[str, Tensor]:
        s = torch.tensor(float(call.index))
        return {"image": (3 * s).expand(1, 4, 2), "text": (1 - s).bfloat16().expand(1, 3, 2)}

    for call, out in zip(calls(20), play(TaylorSeer(4, 2), F, calls(20)), strict=True):
        torch.testing.assert_close(out, F(call))


# --- two evaluations a step, and noise-time as the axis ----------------------------------------------------


def heun_calls(steps: int) -> list[Call]:
    """Evaluation 2 i at t_i, 2 i + 1 at t_{i+1}: noise-times repeat, and the steps differ in size."""
    times = [(1 - i / steps) ** 2 for i in range(steps + 1)]
    return [Call(2 * i + j, 2 * steps, times[i + j]) for i in range(steps) for j in (0, 1)]


@pytest.mark.parametrize("basis", ["taylor", "newton"])
def test_sigma_axis_is_exact_on_what_is_affine_in_noise_time(basis):
    policy = TaylorSeer(interval=4, order=2, warmup=4, axis="sigma", basis=basis)
    values = play(policy, lambda call: torch.tensor([5 * call.t - 2]), heun_calls(10))
    for call, value in list(zip(heun_calls(10), values, strict=True))[2:]:
        assert float(value) == pytest.approx(5 * call.t - 2, abs=1e-4)


def test_call_axis_counts_both_evaluations_of_heun():
    values = play(TaylorSeer(4, 1, 2), lambda call: torch.tensor([2.0 * call.index]), heun_calls(10))
    assert [float(v) for v in values] == [2.0 * i for i in range(20)]
    assert TaylorSeer(4, 1, 2).full_steps(20) == [0, 1, 5, 9, 13, 17]


def test_sigma_axis_needs_one_time_a_call():
    with pytest.raises(ConfigError, match="expected one noise-time a call, got t=nan"):
        play(
            TaylorSeer(axis="sigma"), lambda call: torch.zeros(1), [Call(0, 2, float("nan")), Call(1, 2, 0.5)]
        )


# --- memory and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_follow_the_formula(model, order, dtype):
    model = tiny_dit().to(dtype)
    trajectory = Trajectory(model.sites(), [TaylorSeer(3, order)], STEPS)
    session, numel = trajectory.sessions[0], 6 * 2 * 16 * 32
    x = noise().to(dtype)
    with torch.no_grad():
        for index in range(STEPS):
            for lane in ("cond", "uncond"):
                call = call_at(model, index, lane)
                trajectory.leave(
                    call,
                    model(x, torch.full((2,), call.t), Cond(label=torch.arange(2)), trajectory.run(call)),
                )
                lanes = 2 if index or lane == "uncond" else 1
                assert session.projected_bytes() == lanes * numel * 4 * (order + 1)
            factors = min(order + 1, sum(s <= index for s in TaylorSeer(3, order).full_steps(STEPS)))
            assert session.bytes() == 2 * numel * 4 * factors
    assert trajectory.peak_bytes == session.bytes() == session.projected_bytes()


def test_projection_knows_how_many_full_evaluations_there_are(model):
    trajectory = Trajectory(model.sites(), [TaylorSeer(4, 4, warmup=1)], 6)
    evaluate(model, trajectory, noise(), call_at(model, 0, total=6))
    assert trajectory.sessions[0].projected_bytes() == 2 * trajectory.sessions[0].bytes()


def test_a_part_of_a_larger_tensor_does_not_keep_the_rest_alive():
    trajectory = Trajectory(BRANCH, [TaylorSeer()], 4)
    call = calls(4)[0]
    trajectory.run(call).site("b", lambda x: torch.zeros(8, 100)[:2], torch.zeros(1))
    trajectory.leave(call, None)
    (ladder,) = trajectory.sessions[0].state.values()
    assert (
        ladder.branches["b"].factors[0][0].untyped_storage().nbytes() == trajectory.sessions[0].bytes() == 800
    )


def test_nothing_kept_carries_a_graph(model):
    trajectory = Trajectory(model.sites(), [TaylorSeer(2, 1)], STEPS)
    for index in range(4):
        evaluate(model, trajectory, noise(), call_at(model, index)).sum().backward()
    (session,) = trajectory.sessions
    assert isinstance(session, Forecaster)
    (ladder,) = session.state.values()
    held = [t for branch in ladder.branches.values() for factors in branch.factors for t in factors]
    assert len(held) == 12 and not any(t.requires_grad for t in held)


def test_checkpointing_recomputes_the_same_gradients():
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny_dit().train()
        model.gradient_checkpointing = checkpointing
        trajectory = Trajectory(model.sites(), [TaylorSeer(2, 1)], 6)
        x, cond = noise(), Cond(label=torch.arange(2), drop=torch.zeros(2, dtype=torch.bool))
        for index in range(6):
            call = call_at(model, index, total=6)
            v = model(x, torch.full((2,), call.t), cond, run=trajectory.run(call))
            x = x - trajectory.leave(call, v) / 6
        x.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": 0}, "interval=0, expected an integer of at least 1"),
        ({"interval": 2.5}, "interval=2.5, expected an integer"),
        ({"order": -1}, "order=-1, expected an integer of at least 0"),
        ({"warmup": 0}, "warmup=0, expected an integer of at least 1"),
        ({"axis": "sigmas"}, "unknown axis 'sigmas'; did you mean 'sigma'"),
        ({"basis": "lagrange"}, "unknown basis 'lagrange'.*choose from: taylor, newton"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TaylorSeer(**fields)


def test_more_warmup_than_evaluations_is_refused(model):
    with pytest.raises(ConfigError, match="warmup=13, expected at most total=12 evaluations"):
        Trajectory(model.sites(), [TaylorSeer(warmup=13)], 12)
