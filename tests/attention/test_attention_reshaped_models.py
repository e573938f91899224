"""Models under Re-ttention: its equations over all pairs, caches beside it, diffusers' transformers, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention import Reshaped, ReshapedGrouped
from ditkit.attention.reshaped import Reshape
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.view import view
from ditkit.models.video_dit import VideoDiT
from hosts_support import EVERY, run_steps
from patterns_support import Masked, MaskedSession, band_meets, tiny_clip_model

GRID = Grid(4, 6, 10)
POLICY = Reshaped(keep=0.1, block=8, warmup=2, every=3, kernel="cpu")


@dataclass(frozen=True)
class Explicit(Masked):
    """The method by its equations: all weights, in the model's order, one state for each attention."""

    of: Reshape

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> ExplicitSession:
        return ExplicitSession(self, attended(sites))


class ExplicitSession(MaskedSession):
    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {
            name: partial(handler, call.index, name)  # type: ignore[call-arg]
            for name, handler in super().enter(call).items()
        }

    def core(  # type: ignore[override]
        self,
        pairs: Tensor,
        index: int,
        name: str,
        fn: Handler,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *masks: Tensor,
    ) -> Tensor:
        of = self.policy.of  # type: ignore[attr-defined]
        seen = torch.ones_like(pairs)
        for mask in masks:
            seen = seen & F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=True)
        weight = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        if index < of.warmup:
            return weight @ v
        if (index - of.warmup) % of.every == 0:
            self.state["c", name] = [(weight * pairs).sum(-1, keepdim=True), (weight * ~pairs) @ v]
            return weight @ v
        ratio, residual = self.state["c", name]
        self.state["c", name][0] = ratio + of.ramp
        masked = weight * pairs
        return ratio * (masked / masked.sum(-1, keepdim=True)) @ v + residual


def sampled(
    model: VideoDiT, policies: Sequence[Policy], cond: Cond, total: int = 9
) -> tuple[list[Tensor], Trajectory]:
    trajectory = Trajectory(model.sites(), policies, total)
    x, steps = torch.randn(3, 2, 4, 12, 20, generator=torch.Generator().manual_seed(1)).double(), []
    with torch.no_grad():
        for index in range(total):
            call = Call(index, total, 1 - index / total, layout=model.layout((2, 4, 12, 20)))
            t = torch.full((3,), call.t).double()
            x = x - trajectory.leave(call, model(x, t, cond, trajectory.run(call))) / total
            steps.append(x)
    return steps, trajectory


def prompt() -> Cond:
    text = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2)).double()
    return Cond(text=text, text_mask=torch.arange(7) < torch.tensor((7, 3, 1))[:, None])


@pytest.mark.parametrize("text", [0, 7])
def test_a_trajectory_is_that_of_the_equations(text: int) -> None:
    """The grid is 4 x 6 x 10, so that blocks of 64 are padded; prompts stand first and differ in length."""
    model, cond = tiny_clip_model(text), prompt() if text else Cond()
    dense, _ = sampled(model, [], cond)
    for keep, block in ((0.1, 8), (0.4, 64)):
        policy = Reshaped(keep=keep, block=block, warmup=2, every=3, kernel="cpu")
        expected, _ = sampled(model, [Explicit(band_meets(policy, GRID), policy)], cond)
        steps, _ = sampled(model, [policy], cond)
        torch.testing.assert_close(steps, expected, rtol=0, atol=1e-10)
        assert not torch.allclose(steps[-1], dense[-1], atol=1e-4)


def test_a_skipped_attention_makes_up_for_what_was_due() -> None:
    """TaylorSeer computes 0, 1, 4, 7, 10, 13: of 3, 6, 9 and 12 the next ones are cached, and rho stays in between."""
    model, seer = tiny_clip_model(), TaylorSeer(interval=3, order=1, warmup=2)
    policies = [Reshaped(keep=0.1, block=8, warmup=3, every=every, kernel="cpu") for every in (3, 9)]
    _, trajectory = sampled(model, [seer, policies[0]], Cond(), 14)
    assert trajectory.receipts[1].as_dict()["lanes"]["cond"] == {"computed": "0-1 4 7 10 13", "sparse": ""}
    _, trajectory = sampled(model, [seer, policies[1]], Cond(), 14)
    assert trajectory.receipts[1].as_dict()["lanes"]["cond"]["sparse"] == "7 10"
    _, trajectory = sampled(model, [seer, policies[1]], Cond(), 12)
    states = trajectory.sessions[1].state.values()
    assert len(states) == 2 and {(state.place, state.uses) for state in states} == {(4, (7, 10))}


@pytest.mark.parametrize("name", ["pixart", "cogvideox rotary"])
def test_transformers_of_diffusers(name: str) -> None:
    """PixArt's rows are its image's; CogVideoX's have the text before the clip."""
    family = EVERY[name]
    model, inputs = family.transformer(), family.inputs()
    view(model)
    exact, _ = run_steps(family, model, inputs, [])
    given = {"warmup": 1, "every": 3, "block": 8, "kernel": "cpu"}
    everything = ReshapedGrouped(group=(2, 4), reach=9, ramp=0.0, **given)  # type: ignore[arg-type]
    out, _ = run_steps(family, model, inputs, [everything])
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-4)
    apart = {}
    for residual in ("model", "none"):
        policy = Reshaped(keep=0.3, residual=residual, **given)  # type: ignore[arg-type]
        out, trajectory = run_steps(family, model, inputs, [policy])
        (receipt,) = trajectory.finish()
        assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-1 4 7", "sparse": "2-3 5-6"}
        apart[residual] = float((out - exact).norm())
    assert 0 < 2 * apart["model"] < apart["none"]


def test_memory_is_refused_before_the_first_block() -> None:
    """240 tokens in 240 slots of width 24, two attentions, float64."""
    model = tiny_clip_model()
    residuals, ratios = 2 * 3 * 240 * 24 * 8, 2 * 3 * 240 * 2 * 8
    _, trajectory = sampled(model, [POLICY], Cond())
    (session,) = trajectory.sessions
    assert session.bytes() == session.projected_bytes() == residuals + ratios
    assert session.fitting(0, ratios) == "residual='none' would fit"
    assert session.fitting(0, ratios - 1) == f"residual='none' would hold {ratios:,}"
    blocks: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: blocks.append(1))
    for allowed, said in ((residuals - 1, f"would hold {residuals:,} bytes"), (residuals, "")):
        call = Call(0, 9, 1.0, layout=model.layout((2, 4, 12, 20)))
        bounded = Trajectory(model.sites(), [POLICY], 9, max_bytes=allowed)
        args = torch.zeros(3, 2, 4, 12, 20).double(), torch.ones(3).double(), Cond()
        if said:
            with pytest.raises(ConfigError, match=said):
                model(*args, bounded.run(call))
            assert not blocks
        else:
            model(*args, bounded.run(call))
            assert blocks
