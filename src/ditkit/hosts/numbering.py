"""Numbers of blocks in the names of tensors: exports of pruned transformers keep the old ones, or begin anew."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor


def numbers_of(names: Iterable[str], path: str) -> list[int]:
    """Return the numbers of the blocks that tensors are of, ascending."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    return sorted({int(match[1]) for match in map(pattern.match, names) if match})


def without_gaps(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return tensors whose blocks are numbered from 0 on: one public export keeps the old numbers, with gaps."""
    place = {n: j for j, n in enumerate(numbers_of(state, path))}
    pattern = re.compile("^" + re.escape(path) + r"\.(\d+)\.")
    return {
        pattern.sub(lambda match: f"{path}.{place[int(match[1])]}.", name): v for name, v in state.items()
    }
