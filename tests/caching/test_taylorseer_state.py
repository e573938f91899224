"""State of TaylorSeer: lanes, experts, shapes, two evaluations a step, memory, gradients, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import factorial

import pytest
import torch
from torch import Tensor

from ditkit.caching.taylorseer import Forecaster, TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory
from rig import BRANCH, STEPS, call_at, calls, evaluate, noise, play, tiny_dit


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


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
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 11, 12, 13]
    assert [float(out.flatten()[0]) for out in outs] == pytest.approx(expected, abs=1e-5)
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
                assert session.projected_bytes() == lanes * numel * dtype.itemsize * (order + 1)
            factors = min(order + 1, sum(s <= index for s in TaylorSeer(3, order).full_steps(STEPS)))
            assert session.bytes() == 2 * numel * dtype.itemsize * factors
    assert trajectory.peak_bytes == session.bytes() == session.projected_bytes()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bfloat16_is_kept_as_it_is_and_rounded_once(order):
    """What a difference of two bfloat16 numbers drops, and k^i then multiplies, is not dropped here."""
    outputs = {
        call.index: torch.randn(64, generator=torch.Generator().manual_seed(call.index)) for call in calls(9)
    }
    outputs = {index: (10 + 0.1 * out).bfloat16() for index, out in outputs.items()}
    policy = TaylorSeer(3, order, warmup=2)
    forecast = play(policy, lambda call: outputs[call.index], calls(9))[6]
    full, k = [0, 1, 4], 2
    assert policy.full_steps(9)[:3] == full
    ladder: list[Tensor] = []
    for last, s in zip((None, *full), full, strict=False):
        fresh = [outputs[s].double()]
        for f in ladder[:order]:
            fresh.append((fresh[-1] - f) / (s - last))
        ladder = fresh
    exact = sum(g * k**i / factorial(i) for i, g in enumerate(ladder))
    assert torch.equal(forecast, exact.float().bfloat16())


@pytest.mark.parametrize(("axis", "warmup"), [("call", 3), ("sigma", 4)])
def test_a_branch_that_is_met_late_is_computed_until_it_is_known(axis, warmup):
    """In Heun's order a noise-time is visited twice."""
    sites = (Site("a", "branch"), Site("b", "branch"))
    for late in (0, 2, 3):
        trajectory = Trajectory(sites, [TaylorSeer(2, 2, warmup, axis=axis)], 12)
        for index in range(12):
            call = Call(index, 12, 1 - ((index + 1) // 2 if axis == "sigma" else index) / 12)
            run, x = trajectory.run(call), torch.ones(1, 4, 2)
            assert torch.allclose(run.site("a", lambda x, i=index: x * i, x), x * index) or axis == "sigma"
            if index >= late:
                assert torch.equal(run.site("b", lambda x: 2 * x, x), 2 * x)
            trajectory.leave(call, x)
        (receipt,) = trajectory.finish()
        assert receipt.saved > 0


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
        ladder.branches["b"].outputs[0][0].untyped_storage().nbytes() == trajectory.sessions[0].bytes() == 800
    )


def test_nothing_kept_carries_a_graph(model):
    trajectory = Trajectory(model.sites(), [TaylorSeer(2, 1)], STEPS)
    for index in range(4):
        evaluate(model, trajectory, noise(), call_at(model, index)).sum().backward()
    (session,) = trajectory.sessions
    assert isinstance(session, Forecaster)
    (ladder,) = session.state.values()
    held = [t for branch in ladder.branches.values() for factors in branch.outputs for t in factors]
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
        ({"interval": 0}, "interval=0 should be at least 1"),
        ({"interval": 2.5}, "interval=2.5 should be an integer of at least 1"),
        ({"order": -1}, "order=-1 should be at least 0"),
        ({"warmup": 0}, "warmup=0 should be at least 1"),
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
