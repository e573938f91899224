"""A cache in one file: every branch's last output again, in all evaluations but one in `interval`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from ditkit.caching import BranchCache
from ditkit.core.config import Count


@dataclass(frozen=True)
class EveryOther(BranchCache):
    """Reuse every branch in every second evaluation.

    Args:
        interval: evaluations from one that is computed to the next.
    """

    interval: Count = 2

    def decide(self, step: int) -> bool:
        return step % self.interval == 0

    def exact(self) -> Self:
        return replace(self, interval=1)
