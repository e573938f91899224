"""CG-Taylor against closed forms, a slow twin in fractions, and what its specification says of cost and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import factorial, inf
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.caching import ConfidentTaylor
from ditkit.caching.confident_taylor import GatedForecaster, image_rows, relative_error
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory
from rig import calls

STACK = (Site("blocks", "stack"), Site("blocks.0", "block"), Site("blocks.1", "block"))
State = Callable[[Call], Any]


class Toy:
    """Two blocks whose hidden states are given functions of the call; `ran` says which block ran for whom."""

    def __init__(self, policy: Policy, h1: State, hL: State, total: int) -> None:
        self.states, self.ran = (h1, hL), []
        self.trajectory = Trajectory(STACK, [policy], total)
        self.session: Any = self.trajectory.sessions[0]

    def __call__(self, call: Call, x: Tensor | None = None) -> Any:
        out = self.trajectory.run(call).site("blocks", self._blocks(call), torch.zeros(1) if x is None else x)
        return self.trajectory.leave(call, out)

    def _blocks(self, call: Call) -> Callable[..., Any]:
        def blocks(x: Any, start: int = 0, stop: int | None = None) -> Any:
            for i in range(2)[start:stop]:
                self.ran.append((call.lane, call.index, i))
                x = self.states[i](call)
            return x

        return blocks

    def full(self, lane: str = "cond") -> list[int]:
        return [index for name, index, block in self.ran if (name, block) == (lane, 1)]


def value(f: Callable[[int], float]) -> State:
    return lambda call: torch.tensor([[[float(f(call.index))]]])


def play(
    policy: ConfidentTaylor, h1: Callable[[int], float], hL: Callable[[int], float], total: int
) -> tuple[list[int], list[float]]:
    """The evaluations that were full, and what the stack gave in each."""
    toy = Toy(policy, value(h1), value(hL), total)
    outs = [float(toy(call)) for call in calls(total)]
    return toy.full(), outs


@dataclass
class Rungs:
    """The slow twin of a ladder: f_i at the last anchor, in fractions."""

    order: int
    anchor: int = -1
    factors: Sequence[Fraction] = ()

    def climb(self, s: int, h: Fraction) -> None:
        fresh = [h]
        for f in self.factors[: self.order]:
            fresh.append((fresh[-1] - f) / (s - self.anchor))
        self.anchor, self.factors = s, fresh

    def at(self, s: int) -> Fraction:
        return sum(
            (f * Fraction((s - self.anchor) ** i, factorial(i)) for i, f in enumerate(self.factors)),
            Fraction(0),
        )


def twin(
    policy: ConfidentTaylor,
    h1: Callable[[int], float],
    hL: Callable[[int], float],
    total: int,
    careless: bool = False,
) -> tuple[list[int], list[float]]:
    """The method as its specification words it; `careless` climbs the first ladder where it was trusted, too."""
    first, last = Rungs(policy.first_order), Rungs(policy.last_order)
    full, outs = [], []
    for s in range(total):
        h, forced = Fraction(h1(s)), s <= policy.warmup or s == total - 1
        trusted = not forced and abs(first.at(s) - h) / abs(h) < policy.threshold
        if not trusted or careless:
            first.climb(s, h)
        if not trusted:
            full.append(s)
            last.climb(s, Fraction(hL(s)))
        outs.append(float(last.at(s)))
    return full, outs


def square(s: int) -> int:
    return s * s


def wavy(s: int) -> float:
    return 40 + s**4 % 23 / 8


# --- the gate and the ladders ------------------------------------------------------------------------------


def test_the_closed_form_of_a_square():
    """With O_1 = 1: f(3) = 7 and e = 2/9, f(4) = 10 and e = 6/16."""
    policy = ConfidentTaylor(0.3, first_order=1)
    full, outs = play(policy, square, square, 24)
    assert full == [0, 1, 2, 4, 7, 13, 23]
    assert twin(policy, square, square, 24) == (full, pytest.approx(outs))
    assert outs[3] == 7 and outs[5] == 16 + 6
    for threshold, asked in ((2 / 9 - 1e-4, [3]), (2 / 9 + 1e-4, [4]), (6 / 16 + 1e-4, [])):
        full, _ = play(replace(policy, threshold=threshold), square, square, 24)
        assert [s for s in full if s in (3, 4)] == asked


def test_a_first_ladder_that_climbs_where_it_was_trusted_decides_otherwise():
    policy = ConfidentTaylor(0.3, first_order=1)
    careless = twin(policy, square, square, 24, careless=True)[0]
    assert 4 not in careless and play(policy, square, square, 24)[0] != careless


@pytest.mark.parametrize("orders", [(0, 0), (1, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(("h1", "threshold"), [(square, 0.07), (wavy, 0.0305)])
@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_decisions_and_outputs_equal_the_slow_twin(orders, h1, threshold, warmup):
    policy = ConfidentTaylor(threshold, *orders, warmup)
    full, outs = play(policy, h1, wavy, 40)
    expected = twin(policy, h1, wavy, 40)
    assert full == expected[0] and outs == pytest.approx(expected[1], rel=1e-4)
    assert len(full) < 40 or orders == (0, 0)


@pytest.mark.parametrize("first_order", [1, 2, 3])
@pytest.mark.parametrize("last_order", [1, 2])
def test_affine_states_are_forecast_exactly_and_only_the_last_evaluation_is_asked_for(
    first_order, last_order
):
    """To float32's rounding, which weights of up to k^3 / 6 multiply."""
    policy = ConfidentTaylor(1e-3, first_order, last_order, warmup=2)
    full, outs = play(policy, lambda s: 4 * s + 9, lambda s: 3 * s - 7, 30)
    assert full == [0, 1, 2, 29]
    assert outs == pytest.approx([3 * s - 7 for s in range(30)], rel=1e-4)


@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_an_open_gate_of_order_zero_reuses_the_last_block_bit_for_bit(warmup):
    drawn = torch.randn(20, 1, 4, 8)
    toy = Toy(ConfidentTaylor(inf, 0, 0, warmup), lambda c: drawn[c.index], lambda c: -drawn[c.index], 20)
    outs = [toy(call) for call in calls(20)]
    assert toy.full() == [*range(warmup + 1), 19]
    assert all(torch.equal(out, -drawn[min(s, warmup)]) for s, out in enumerate(outs[:-1]))


@pytest.mark.parametrize("warmup", [12, 30])
def test_a_warmup_as_long_as_the_trajectory_is_dense(warmup):
    full, outs = play(ConfidentTaylor(inf, warmup=warmup), square, wavy, 12)
    assert full == [*range(12)] and outs == [wavy(s) for s in range(12)]


def test_error_of_a_forecast_by_hand():
    h, forecast = torch.tensor([[[1.0, -2.0], [4.0, 1.0]]]), torch.tensor([[[1.5, -2.0], [3.0, 0.5]]])
    assert relative_error(forecast, h).item() == 2.0 / 8.0


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e5])
def test_scale_changes_no_decision(scale):
    policy = ConfidentTaylor(0.3, first_order=1)
    assert play(policy, lambda s: scale * s * s, wavy, 24)[0] == play(policy, square, wavy, 24)[0]


def test_bfloat16_states_are_compared_in_float32():
    """e = 1/132 = 0.0075758; in bfloat16 it is 0.0075684, below the threshold."""
    states = (1, 1 + 1 / 128, 1 + 2 / 128, 1 + 4 / 128)
    assert float(torch.tensor(1 / 132).bfloat16()) < 0.00757 < 1 / 132
    toy = Toy(
        ConfidentTaylor(0.00757, 1, 1),
        lambda c: torch.full((1, 8, 4), states[min(c.index, 3)]).bfloat16(),
        lambda c: torch.ones(1, 8, 4, dtype=torch.bfloat16),
        5,
    )
    assert {toy(call).dtype for call in calls(5)} == {torch.bfloat16}
    assert 3 in toy.full()
    (lane,) = toy.session.state.values()
    for series, dtype in ((lane.first, torch.float32), (lane.last, torch.bfloat16)):
        assert {t.dtype for s in series for t in s.branch.outputs[0]} == {dtype}


def test_where_it_is_trusted_nothing_is_touched():
    toy = Toy(ConfidentTaylor(0.3, first_order=1), value(square), value(square), 24)
    before = None
    for call in calls(24):
        toy(call)
        (lane,) = toy.session.state.values()
        same = before is not None and lane.first[0] is before.first[0] and lane.last[0] is before.last[0]
        assert same == (call.index not in toy.full())
        before = lane


def test_an_evaluation_made_twice_or_a_trajectory_begun_again():
    toy = Toy(ConfidentTaylor(0.3, first_order=1), value(square), value(square), 24)
    for index in (0, 1, 2, 2, 3, 4, 4):
        out = toy(calls(24)[index])
        assert float(out) == (7 if index == 3 else index * index)
    toy.ran.clear()
    for call in calls(24):
        toy(call)
    assert toy.full() == [0, 1, 2, 4, 7, 13, 23]


def test_a_part_of_a_larger_tensor_does_not_keep_the_rest_alive():
    whole = torch.randn(1, 100, 8)
    toy = Toy(ConfidentTaylor(0.1, 0, 0), lambda c: whole[:, :4], lambda c: whole[:, 4:9], 8)
    toy(calls(8)[0])
    assert isinstance(toy.session, GatedForecaster)
    assert toy.session.bytes() == (4 + 5) * 8 * 4
    (lane,) = toy.session.state.values()
    assert all(
        t.untyped_storage().nbytes() == t.nbytes
        for s in (*lane.first, *lane.last)
        for t in s.branch.outputs[0]
    )


# --- which rows are compared -------------------------------------------------------------------------------


def test_only_rows_of_the_image_that_are_no_padding_are_compared():
    x = torch.randn(2, 9, 4)
    valid = torch.tensor([[True, True, False, True], [True, True, True, True]])
    image = Segment("image", Grid(4), 4)
    text, context = Segment("text", Grid(3), 3), Segment("context", Grid(2), 2)
    assert torch.equal(image_rows(x, (text, image, context)), x[:, 3:7])
    assert torch.equal(image_rows(x[:, :4], ()), x[:, :4])
    padded = image_rows(x[:, :7], (text, image._replace(valid=valid)))
    assert not padded[0, 2].any()
    f = padded + torch.where(valid[..., None], 0.1, 0.0)
    expected = 0.1 * 7 * 4 / x[:, 3:7][valid].abs().sum()
    assert relative_error(f, padded).item() == pytest.approx(expected.item(), rel=1e-5)


# --- lanes, networks, samples ------------------------------------------------------------------------------


def lanes_of(toy: Toy, total: int, sequence: Sequence[Call]) -> dict[str, list[int]]:
    for call in sequence:
        toy(call)
    return {lane: toy.full(lane) for lane in ("cond", "uncond")}


def both(total: int) -> list[Call]:
    return [replace(call, lane=lane) for call in calls(total) for lane in ("cond", "uncond")]


def by_lane(call: Call) -> Tensor:
    s = call.index
    return torch.tensor([[[float(s * s if call.lane == "cond" else (s + 3) ** 3)]]])


def test_sequential_guidance_runs_the_gate_on_the_first_lane_only():
    toy = Toy(ConfidentTaylor(0.3, 1, 0), by_lane, by_lane, 24)
    full = lanes_of(toy, 24, both(24))
    assert full["cond"] == full["uncond"] == [0, 1, 2, 4, 7, 13, 23]
    assert [index for lane, index, block in toy.ran if (lane, block) == ("cond", 0)] == [*range(24)]
    assert [index for lane, index, block in toy.ran if (lane, block) == ("uncond", 0)] == full["uncond"]
    series = {key[1]: (len(lane.first), len(lane.last)) for key, lane in toy.session.state.items()}
    assert series == {"cond": (1, 1), "uncond": (0, 1)}


def test_each_lane_can_be_gated_on_its_own():
    policy = ConfidentTaylor(0.3, 1, 0, decider="each")
    toy = Toy(policy, by_lane, by_lane, 24)
    full = lanes_of(toy, 24, both(24))
    assert full["cond"] == twin(policy, square, square, 24)[0]
    assert full["uncond"] == twin(policy, lambda s: (s + 3) ** 3, square, 24)[0] != full["cond"]
    assert len(toy.ran) == 2 * 24 + len(full["cond"]) + len(full["uncond"])


def test_a_lane_that_was_away_is_computed_before_it_follows():
    """It joins at 5, which the other one skips, and is away from 10 to 17, where that one is full at 13."""
    sequence = [c for c in both(24) if c.lane == "cond" or 5 <= c.index < 10 or c.index >= 18]
    full = lanes_of(Toy(ConfidentTaylor(0.3, 1, 0), by_lane, by_lane, 24), 24, sequence)
    assert full["cond"] == [0, 1, 2, 4, 7, 13, 23]
    assert full["uncond"] == [5, 7, 18, 23]


def test_every_network_has_its_own_state_and_warmup():
    sequence = [replace(c, net="low" if c.index >= 9 else "high") for c in calls(24)]
    toy = Toy(ConfidentTaylor(inf, 0, 0), value(square), value(square), 24)
    assert lanes_of(toy, 24, sequence)["cond"] == [0, 1, 2, 9, 10, 11, 23]


def test_another_batch_is_computed():
    toy = Toy(ConfidentTaylor(inf, 0, 0), value(square), value(square), 24)
    for call in calls(24):
        toy(call, torch.zeros(1 if call.index < 9 else 2, 3))
    assert toy.full() == [0, 1, 2, 9, 10, 11, 23]


def two_samples(call: Call) -> Tensor:
    s = float(call.index)
    return torch.tensor([s * s, (s + 3) ** 3])[:, None, None]


def test_the_gate_is_a_statistic_of_the_batch_unless_asked_of_each_sample():
    def outputs(policy: ConfidentTaylor, state: State, x: Tensor) -> tuple[Tensor, list[int]]:
        toy = Toy(policy, state, state, 24)
        return torch.stack([toy(call, x) for call in calls(24)], 1), toy.full()

    policy = ConfidentTaylor(0.3, 1, 1)
    alone = [
        outputs(policy, lambda c, i=i: two_samples(c)[i : i + 1], torch.zeros(1, 1, 1)) for i in range(2)
    ]
    singles = torch.cat([out for out, _ in alone])
    joint = outputs(policy, two_samples, torch.zeros(2, 1, 1))[0]
    assert not torch.equal(joint, singles)
    apart, full = outputs(replace(policy, per_sample_gate=True), two_samples, torch.zeros(2, 1, 1))
    assert torch.equal(apart, singles)
    assert alone[0][1] != alone[1][1] and full == sorted({*alone[0][1], *alone[1][1]})
