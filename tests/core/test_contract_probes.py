"""What the contract promises, probed on our own DiT with policies of very different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Call, Run
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig
from policies_support import BandReuse, Gate, Gated, RowSelector, SelectedRows, Tap

B, STEPS, CLASSES = 2, 12, 3


@cache
def model() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        size=16, patch=2, channels=4, width=48, depth=4, heads=4, classes=CLASSES, convention=Convention()
    )
    dit = DiT(config).eval().requires_grad_(False)
    for p in dit.parameters():  # at initialisation the output is zero
        p.normal_(std=0.08)
    return dit


def noise() -> Tensor:
    return torch.randn(B, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def evaluate(x: Tensor, t: float, label: int, run: Run = DIRECT) -> Tensor:
    return model()(x, torch.full((B,), t), Cond(label=torch.full((B,), label)), run)


def call_at(index: int, total: int = STEPS, lane: str = "cond") -> Call:
    return Call(index, total, 1 - index / total, lane, layout=model().layout((4, 16, 16)))


def sample(policies: Sequence[Policy] = (), lanes: Sequence[str] = ("cond",)) -> tuple[Tensor, Trajectory]:
    """Euler; with two lanes, guidance of strength 2."""
    trajectory = Trajectory(model().sites(), policies, STEPS)
    x = noise()
    for i in range(STEPS):
        outs = []
        for lane in lanes:
            call = call_at(i, lane=lane)
            out = evaluate(x, call.t, 0 if lane == "cond" else CLASSES, trajectory.run(call))
            outs.append(trajectory.leave(call, out))
        v = outs[0] if len(outs) == 1 else outs[1] + 2 * (outs[0] - outs[1])
        x = x - trajectory.guided(call_at(i), v) / STEPS
    return x, trajectory


@cache
def exact(lanes: tuple[str, ...] = ("cond",)) -> Tensor:
    return sample(lanes=lanes)[0]


def error(policies: Sequence[Policy]) -> float:
    return float((sample(policies)[0] - exact()).norm() / exact().norm())


NEUTRAL = {
    "no policy": (),
    "interval 1": (TaylorSeer(4, 2).exact(),),
    "all rows": (RowSelector(1.0),),
    "resets everywhere": (RowSelector(0.5, 2, tuple(range(STEPS))),),
    "measures always": (BandReuse().exact(),),
    "warm-up everywhere": (BandReuse(warmup=STEPS),),
    "threshold 0": (Gate().exact(),),
    "a tap": (Tap(("blocks.2.attn", "head")),),
    "two at once": (TaylorSeer(4, 2).exact(), BandReuse().exact()),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_change_no_bit(name: str) -> None:
    assert torch.equal(sample(NEUTRAL[name])[0], exact())
    lanes = ("cond", "uncond")
    assert torch.equal(sample(NEUTRAL[name], lanes)[0], exact(lanes))


ACTIVE: dict[str, Policy] = {
    "forecast": TaylorSeer(4, 1),
    "rows": RowSelector(0.5),
    "band": BandReuse(0.25),
    "gate": Gate(10.0),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_state_belongs_to_the_trajectory_and_lanes_keep_apart(name: str) -> None:
    once, trajectory = sample([ACTIVE[name]], ("cond", "uncond"))
    assert torch.equal(sample([ACTIVE[name]], ("cond", "uncond"))[0], once)
    assert once.isfinite().all()
    assert not torch.equal(once, exact(("cond", "uncond")))
    if name != "rows":  # rows are chosen once for all lanes, after guidance
        same = sample([ACTIVE[name]], ("cond", "again"))[1].sessions[0].bytes()
        assert same == 2 * sample([ACTIVE[name]])[1].sessions[0].bytes() == trajectory.sessions[0].bytes()


@pytest.mark.parametrize("name", ["forecast", "band", "gate"])
def test_receipts_tell_what_was_saved(name: str) -> None:
    (receipt,) = sample([ACTIVE[name]])[1].finish()
    assert receipt.saved > 0
    assert receipt.calls == STEPS


def test_selected_rows_equal_the_dense_run() -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    differences = []
    for keep_keys in (True, False):
        trajectory = Trajectory(model().sites(), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        dense = trajectory.leave(call_at(0, 4), evaluate(noise(), 0.7, 0, trajectory.run(call_at(0, 4))))
        trajectory.guided(call_at(0, 4), dense)
        sparse = evaluate(noise(), 0.7, 0, trajectory.run(call_at(1, 4)))
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows)
        assert session.active is not None
        mask = torch.zeros(64).index_fill(0, session.active, 1.0).reshape(8, 8).bool()
        mask = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert mask.sum() == 16 * 16 // 2
        assert sparse[..., ~mask].abs().max() == 0
        differences.append(float((sparse - dense)[..., mask].abs().max() / dense.abs().max()))
    assert differences[0] <= 1e-6
    assert differences[1] > 1e-3


def test_selected_rows_need_the_keys_of_the_others() -> None:
    with_keys, without = error([RowSelector(0.5)]), error([RowSelector(0.5, keep_keys=False)])
    assert 0 < with_keys < without


def test_reused_statistics_are_exact_on_constant_attention() -> None:
    dense = evaluate(noise(), 0.7, 0)
    trajectory = Trajectory(model().sites(), [BandReuse(0.1, warmup=0, every=4)], 4)
    for i in range(4):
        out = trajectory.leave(call_at(i, 4), evaluate(noise(), 0.7, 0, trajectory.run(call_at(i, 4))))
        assert (out - dense).abs().max() <= 1e-5 * dense.abs().max()
    assert trajectory.finish()[0].saved == 3 * 4


def test_a_gate_decides_inside_the_stack() -> None:
    (session,) = sample([Gate(10.0)])[1].sessions
    assert isinstance(session, Gated)
    assert session.log == ["computed"] * 2 + ["skipped"] * (STEPS - 3) + ["computed"]


def test_methods_that_own_different_things_compose() -> None:
    tap = Tap(("blocks.2.attn", "blocks.2.attn.core"))
    x, trajectory = sample([TaylorSeer(3, 1), BandReuse(0.25, every=4), tap])
    assert x.isfinite().all()
    assert tap.seen["blocks.2.attn"][1].shape == (B, 64, 48)
    q, _, _ = tap.seen["blocks.2.attn.core"][0]
    assert q.shape == (B, 4, 64, 12)
    forecast, band, _ = trajectory.finish()
    # full at 0 1 4 7 10, of which the band measures at 1: what a forecast replaces never reaches attention
    assert (forecast.saved, band.saved) == (7 * 8, 3 * 4)


@pytest.mark.parametrize(
    ("policies", "what"),
    [
        ((TaylorSeer(), Gate()), "both own 'schedule'"),
        ((RowSelector(), TaylorSeer()), "both own 'schedule'"),
        ((RowSelector(), BandReuse()), "both own 'rows'"),
        ((BandReuse(), BandReuse(0.5)), "both own 'rows'"),
    ],
)
def test_two_owners_are_refused_before_the_first_step(policies: Sequence[Policy], what: str) -> None:
    with pytest.raises(ConflictError, match=what):
        Trajectory(model().sites(), policies, STEPS)


def test_sites_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Tap: unknown site 'blocks\.9\.mlp'; did you mean"):
        Trajectory(model().sites(), [Tap(("blocks.9.mlp",))], STEPS)
    with pytest.raises(NoEffectError, match="BandReuse: this model has no site"):
        Trajectory([site for site in model().sites() if site.kind != "core"], [BandReuse()], STEPS)


@pytest.mark.parametrize("name", ["forecast", "rows", "band", "gate"])
def test_an_interrupted_call_leaves_no_trace(name: str) -> None:
    """Stopped in block 2 of a call and then repeated, a trajectory goes on as if nothing had happened."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def steps(interrupted: frozenset[int]) -> Tensor:
        trajectory = Trajectory(model().sites(), [ACTIVE[name]], STEPS)
        x = noise()
        for i in range(STEPS):
            call = call_at(i)
            if i in interrupted:
                hook = model().blocks[2].register_forward_pre_hook(interrupt)
                try:
                    evaluate(x + 1, call.t, 0, trajectory.run(call))
                except KeyboardInterrupt:
                    stopped.append(i)
                finally:
                    hook.remove()
            v = trajectory.leave(call, evaluate(x, call.t, 0, trajectory.run(call)))
            x = x - trajectory.guided(call, v) / STEPS
        return x

    stopped: list[int] = []
    assert torch.equal(steps(frozenset(range(STEPS))), steps(frozenset()))
    assert 0 in stopped
