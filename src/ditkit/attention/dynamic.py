"""Patterns that look at queries and keys: which blocks are visited differs by evaluation, sample and head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditkit.attention.pattern import Layout, Pattern, Sparse
from ditkit.core.run import Site
from ditkit.ops.block_sparse_attention import Attended, BlockPlan, for_valid, narrowed


@dataclass(frozen=True, kw_only=True)
class Dynamic(Pattern):
    """A pattern whose `plan` is a bound, within which `kept` chooses for each attention of each evaluation.

    How many blocks that are only data say, so a compiler has to break its graph at each of these attentions.
    """

    @abstractmethod
    def kept(self, plan: BlockPlan, q: Tensor, k: Tensor) -> Tensor:
        """Return the visited blocks of the plan, bool [B, N, query blocks, key blocks]; others do not count.

        Args:
            plan: with what is padding of these prompts left out. q, k: [B, N, slots, K], in the plan's order.
        """

    @abstractmethod
    def share(self, plan: BlockPlan) -> float:
        """Estimate the share of dense attention's blocks that `kept` leaves, by which skipping is judged to pay."""

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Selecting:
        self._check(sites, total)
        return Selecting(self, sites)


class Selecting(Sparse):
    """Attention by a plan that is made anew at every attention; the receipt says what they visited on the average."""

    policy: Dynamic

    def __init__(self, policy: Dynamic, sites: Sequence[Site]) -> None:
        super().__init__(policy, sites)
        self.visited: list[float] = []

    def remark(self, layout: Layout) -> None:
        super().remark(layout)
        if self.visited:
            self.remarks["visited"] = round(sum(self.visited) / len(self.visited), 4)

    def density(self, plan: BlockPlan) -> float:
        return self.policy.share(plan)

    def execute(self, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Attended:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # how long the lists are is known from data only
        bound = for_valid(plan, valid).to(q.device)
        chosen = narrowed(bound, self.policy.kept(bound, q, k))
        self.visited.append(chosen.density)
        self.remarks["visited"] = round(sum(self.visited) / len(self.visited), 4)
        return super().execute(chosen, q, k, v, None)
