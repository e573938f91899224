"""Sums of rows of a bank, one for each list of them: what SLA calls pre-aggregation (arXiv 2509.24006).

G heads of all samples, r lists, n rows of the bank, F numbers of a row.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ConfigError, unknown

Aggregation = Literal["auto", "product", "direct", "subtract", "segments"]
SEGMENT = 4
"""Rows of a segment, of whose 2^4 subsets the sums are tabulated."""
PRODUCT_PER_ADDITION = 16
"""Multiply-accumulates of a dense product in the time of one addition of a gathered row, on an AVX2 core: the
product reads its operands from the cache, the gather from memory."""


def aggregate(bank: Tensor, taken: Tensor, how: Aggregation = "auto") -> Tensor:
    """Sum, for each list, the rows of the bank that it takes.

    Args:
        bank: [G, n, F], float32 or float64.
        taken: bool [G, r, n].
        how: "direct" adds the rows that are taken; "subtract" takes those that are not from the sum of all;
            "segments" adds tabulated sums of subsets of four rows each (Four Russians), for about half of the rows;
            "product" multiplies by the map; "auto" is the cheapest of these by the number of additions. They differ
            in rounding only.

    Returns:
        [G, r, F]. A list that takes nothing gives 0 to the bit.

    Raises:
        ConfigError: an unknown way.
    """
    if how not in get_args(Aggregation):
        raise ConfigError(unknown("aggregation", how, get_args(Aggregation)))
    how = cheapest(taken) if how == "auto" else how
    if how == "product":
        return torch.bmm(taken.to(bank.dtype), bank)
    if how == "direct":
        return _listed(bank, taken)
    if how == "segments":
        return _segmented(bank, taken)
    wide = bank.double()  # what is added is taken away again, and what is left may be far smaller
    rest = wide.sum(1, keepdim=True) - _listed(wide, ~taken)
    return rest.masked_fill(~taken.any(2, keepdim=True), 0).to(bank.dtype)


def additions(taken: Tensor) -> dict[Aggregation, float]:
    """Count the rows of the bank that each way adds, those of building its tables among them."""
    heads, lists, rows = taken.shape
    held = int(taken.sum())
    segments = -(-rows // SEGMENT)
    return {
        "direct": held,
        "subtract": heads * rows + taken.numel() - held,
        "segments": heads * segments * (2**SEGMENT + lists),
        "product": taken.numel() / PRODUCT_PER_ADDITION,
    }


def cheapest(taken: Tensor) -> Aggregation:
    """Return the way with the fewest additions, a product's being cheaper ones."""
    counts = additions(taken)
    return min(counts, key=lambda name: counts[name])


def _listed(bank: Tensor, taken: Tensor) -> Tensor:
    """Add up the rows of each list, one after the other."""
    heads, lists, rows = taken.shape
    head, _, row = taken.nonzero(as_tuple=True)
    start = F.pad(taken.sum(2).flatten().cumsum(0), (1, 0))
    flat = bank.reshape(heads * rows, -1)
    found = F.embedding_bag(head * rows + row, flat, start, mode="sum", include_last_offset=True)
    return found.view(heads, lists, -1)


def _segmented(bank: Tensor, taken: Tensor) -> Tensor:
    """Add up, for each list, the tabulated sum of its subset of each segment."""
    spare = -bank.shape[1] % SEGMENT
    cut = F.pad(bank, (0, 0, 0, spare)).unflatten(1, (-1, SEGMENT))
    heads, segments = cut.shape[:2]
    table = cut.new_zeros(heads, segments, 2**SEGMENT, bank.shape[2])
    for bit in range(SEGMENT):  # the subsets with this row are those without any later one, and it
        table[:, :, 2**bit : 2 ** (bit + 1)] = table[:, :, : 2**bit] + cut[:, :, bit : bit + 1]
    bits = F.pad(taken, (0, spare)).unflatten(2, (-1, SEGMENT)).long()
    subset = (bits << torch.arange(SEGMENT, device=bits.device)).sum(-1)
    first = torch.arange(heads * segments, device=bits.device).view(heads, 1, segments) * 2**SEGMENT
    place = (first + subset).flatten(0, 1)
    found = F.embedding_bag(place, table.flatten(0, 2), mode="sum")
    return found.view(heads, taken.shape[1], -1)
