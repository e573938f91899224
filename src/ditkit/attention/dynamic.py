"""Patterns that look at queries and keys: which blocks are visited differs by evaluation, sample and head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ditkit.attention.pattern import Layout, Pattern, SequencePlan, Sparse
from ditkit.core.policy import Key
from ditkit.core.run import Call, Site
from ditkit.ops.block_sparse_attention import BlockPlan, attend_chosen, choose, chooser_handle


@dataclass(frozen=True, kw_only=True)
class Dynamic(Pattern):
    """A pattern whose `plan` is a bound, within which `kept` chooses for each attention of each evaluation."""

    @abstractmethod
    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        """Return the visited blocks of the plan, bool [B, N, query blocks, key blocks]; others do not count.

        Args:
            plan: with what is padding of these prompts left out.
            image: slots of the image, which come first and fill whole blocks; rows of others follow.
            q, k: [B, N, slots, K], in the plan's order.
        """

    @abstractmethod
    def share(self, plan: BlockPlan, image: int) -> float:
        """Estimate the share of dense attention's blocks that `kept` leaves, by which skipping is judged to pay."""

    def choosing_macs(self, image: int, q: Tensor) -> int:
        """MACs that `kept` takes for queries like q."""
        return 0

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Selecting:
        self._check(sites, total)
        return Selecting(self, sites)


class Selecting(Sparse):
    """Attention by a plan that is made anew at every attention; the receipt says what they visited on the average."""

    policy: Dynamic

    def __init__(self, policy: Dynamic, sites: Sequence[Site]) -> None:
        super().__init__(policy, sites)
        self.visited: list[float] = []
        self.empty: list[float] = []

    def remark(self, layout: Layout) -> None:
        super().remark(layout)
        self._remark_means()

    def density(self, seat: SequencePlan) -> float:
        return self.policy.share(seat.plan, seat.slots)

    def attending(self, call: Call, name: str, seat: SequencePlan) -> Callable[..., Tensor]:
        handle = chooser_handle(self.policy)
        return partial(self.select, (call.net, call.lane, name), handle, seat.plan, seat.slots)

    def select(
        self,
        key: Key,
        chooser: int,
        plan: BlockPlan,
        image: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """Attention over the blocks that are chosen for these queries and keys; notes how many those were."""
        if not torch.compiler.is_compiling():
            self.remarks["kernel"] = choose(q, plan, self.kernel).kernel
        found, measured = attend_chosen(q, k, v, plan, chooser, image, valid=valid, kernel=self.kernel)
        self.put(key, measured)
        return found.out

    def commit(self) -> None:
        """Numbers are kept of the measures, no tensors."""
        for measured in self.staged.values():
            density, empty, _ = measured.tolist()
            self.visited.append(density)
            self.empty.append(empty)
        self.staged.clear()
        self._remark_means()

    def _remark_means(self) -> None:
        """Report the visited share, and the share of query blocks that saw no key, on the average of all attentions."""
        if self.visited:
            self.remarks["visited"] = round(sum(self.visited) / len(self.visited), 4)
        if any(self.empty):
            self.remarks["empty"] = round(sum(self.empty) / len(self.empty), 4)
