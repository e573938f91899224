"""RAS: what a dense evaluation does to how often each row was left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.caching import RAS
from ditkit.caching.regional import Regions
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory

PART = (Site("tokens", "tokens"), Site("core", "core"), Site("head", "head"))
ROWS, TOTAL = 15, 20
IMAGE = Segment("image", Grid(1, 3, 5), ROWS)


def counts(policy: RAS) -> list[Tensor | None]:
    """How often each row was left out, as it stands after each evaluation chose the rows of the next."""
    trajectory = Trajectory(PART, [policy], TOTAL)
    (session,) = trajectory.sessions
    assert isinstance(session, Regions)
    seen = []
    for i in range(TOTAL):
        trajectory.guided(Call(i, TOTAL, 1 - i / TOTAL, layout=(IMAGE,)), torch.randn(2, ROWS, 4))
        seen.append(session.drops)
    return seen


@pytest.mark.parametrize("selection", ["low", "high"])
def test_a_dense_evaluation_starts_all_counts_again(selection: Any) -> None:
    """The corrected D is 0 wherever a row was computed; the reset at 8 computes all of them."""
    drops = counts(RAS(0.4, warmup=2, reset_every=6, selection=selection))
    before, after = drops[6], drops[7]
    assert before is not None and after is not None
    assert before.any() and not after.any()


def test_published_counts_are_never_taken_back() -> None:
    policy = RAS(0.4, warmup=2, reset_every=6, high_ratio=1.0)
    drops = counts(policy)
    before, after, last = drops[6], drops[7], drops[-1]
    assert before is not None and after is not None and last is not None
    assert torch.equal(before, after)
    assert last.sum(1).tolist() == [sum(policy.skipped(TOTAL, ROWS))] * 2
