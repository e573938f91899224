"""Every policy gives the same gradients where blocks are computed again, after its state was committed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import inherent_policies  # noqa: F401  two more that are found
from ditkit.compress import LearnedDepth
from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid
from ditkit.core.policy import Policy
from ditkit.core.trajectory import Trajectory
from rig import call_at, noise, tiny_dit

TOTAL = 6


def gradients(policy: Policy, checkpointing: bool) -> Tensor:
    """Two calls, each committed, then one backward pass through both."""
    model = tiny_dit().train()
    model.gradient_checkpointing = checkpointing
    trajectory, outs = Trajectory(model.sites(), [policy], TOTAL), []
    cond = Cond(label=torch.tensor([0, 1]), drop=torch.tensor([False, False]))
    for index in range(2):
        call = call_at(model, index, total=TOTAL)
        out = model(noise() + index, torch.full((2,), call.t), cond, trajectory.run(call))
        outs.append(trajectory.leave(call, out))
        trajectory.guided(call, outs[-1].detach())
    torch.stack(outs).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", every(Policy), ids=lambda kind: kind.__name__)
def test_blocks_computed_again_give_the_same_gradients(kind):
    policy = LearnedDepth(keep=(2,), of=()) if kind is LearnedDepth else kind.small(Grid(1, 4, 4))
    plain, again = gradients(policy, False), gradients(policy, True)
    assert torch.equal(plain, again)
