"""A small model that is not at its initial zero, the plainest sampling loop, and a model of one branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig

STEPS = 12
TINY = DiTConfig(size=8, patch=2, channels=3, width=32, depth=3, heads=2, classes=4, convention=Convention())


def tiny_dit(seed: int = 0) -> DiT:
    """Random everywhere: modulation and output are zero in a fresh DiT, and would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def noise(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def evaluate(model: DiT, trajectory: Trajectory, x: Tensor, call: Call) -> Tensor:
    """One model call of a lane, through the trajectory."""
    cond = Cond(label=torch.arange(x.shape[0]) % 4)
    if call.lane == "uncond":
        cond = model.unconditional(cond)
    t = torch.full((x.shape[0],), call.t)
    return trajectory.leave(call, model(x, t, cond, run=trajectory.run(call)))


def call_at(model: Denoiser, index: int, lane: str = "cond", total: int = STEPS, net: str = "main") -> Call:
    return Call(index, total, 1 - index / total, lane, net, model.layout(model.sample_shape))


def sample(
    model: DiT,
    policies: Sequence[Policy] = (),
    lanes: Sequence[str] = ("cond",),
    steps: int = STEPS,
    evaluate: Callable[[DiT, Trajectory, Tensor, Call], Tensor] = evaluate,
) -> dict[str, Tensor]:
    """Euler steps of each lane on its own, all through one trajectory; what guidance gives is the first lane's."""
    trajectory = Trajectory(model.sites(), policies, steps)
    xs = {lane: noise(seed=i) for i, lane in enumerate(lanes)}
    with torch.no_grad():
        for index in range(steps):
            calls = {lane: call_at(model, index, lane, steps) for lane in lanes}
            vs = {lane: evaluate(model, trajectory, xs[lane], call) for lane, call in calls.items()}
            vs[lanes[0]] = trajectory.guided(calls[lanes[0]], vs[lanes[0]])
            xs = {lane: xs[lane] - vs[lane] / steps for lane in lanes}
    trajectory.finish()
    return xs


BRANCH = (Site("b", "branch"),)


def play(
    policy: Policy,
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
