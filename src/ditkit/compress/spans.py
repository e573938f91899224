"""Contiguous spans of blocks that are nearly linear, found by probes and linear CKA (PPCL, arXiv 2511.16156).

A span [u, v] is to become one block: what blocks u + 1 to v do to the state after block u is nearly an affine map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.compress.calibration import Calibration, some_rows
from ditkit.compress.cka import Affine, fit_affine, linear_cka
from ditkit.compress.states import evaluating, record, rows_of, some, streams_in
from ditkit.core.errors import ConfigError
from ditkit.core.run import Handler, Run

Span = tuple[int, int]
TIE = 1e-5
"""By how much a difference may rise and count as equal: what rounding does to CKA."""
TOKENS = 4096
"""Tokens of each time from which CKA is taken."""
FEW = 4
"""Samples of each call, from which CKA of the network's output is taken."""


class Found(NamedTuple):
    """A span, and by how much its last block lowered CKA."""

    first: int
    last: int
    rise: float


def find_spans(
    cka: Callable[[int, int], float],
    depth: int,
    floor: float = 0.9,
    fixed: Collection[int] = (),
    tie: float = TIE,
) -> list[Found]:
    """Find spans by the first difference of CKA, D(u, k) = cka(u, k - 1) - cka(u, k), with cka(u, u) = 1.

    From u on a span takes in the next block as long as D does not rise; it ends before the block at which D does, or
    at which CKA is under the floor, and the next span begins after it.

    Args:
        cka: cka(u, k) of the state after block k with blocks u + 1 to k replaced by probes, and as it is.
        fixed: blocks that belong to no span.
        tie: up to which a difference does not rise.
    """
    found: list[Found] = []
    u = 0
    while u < depth - 1:
        before, v, last = float("inf"), u, 1.0
        for k in range(u + 1, depth) if u not in fixed else ():
            if k in fixed:
                break
            now = cka(u, k)
            difference = last - now
            if difference > before + tie or now < floor:
                break
            before, v, last = difference, k, now
        if v > u:
            found.append(Found(u, v, before))
        u = v + 1
    return found


def choose(found: Sequence[Found], remove: int) -> tuple[Span, ...]:
    """Return the spans whose last blocks lowered CKA least, of which `remove` blocks go in all; the last is shortened.

    Raises:
        ConfigError: the spans have not so many.
    """
    spare = sum(span.last - span.first for span in found)
    if spare < remove:
        spans = ", ".join(f"{span.first}-{span.last}" for span in found) or "none"
        raise ConfigError(
            f"Contiguous: remove={remove}, expected at most the {spare} blocks of the spans that were found ({spans}); "
            "a lower floor finds more"
        )
    chosen: list[Span] = []
    for span in sorted(found, key=lambda one: (one.rise, one.first)):
        length = min(span.last - span.first, remove)
        if length:
            chosen.append((span.first, span.first + length))
            remove -= length
    return tuple(sorted(chosen))


@dataclass
class Probes:
    """Affine maps h_i = h_{i-1} + l_i(h_{i-1}) for the blocks of a stack, each fitted to the network's own states.

    Args:
        maps: by block and stream; block 0 has one, too. states: of each time, the image's rows after each block.
            Both are on the CPU.
    """

    stack: str
    maps: list[dict[str, Affine]]
    states: list[list[Tensor]]
    known: dict[Span, float] = field(default_factory=dict)
    chains: dict[Span, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def fit(cls, model: Any, calibration: Calibration, stack: str, depth: int) -> Probes:
        """Fit them by least squares: the minimum of the loss that the paper trains them on, for this calibration."""
        names = [f"{stack}.0:in", *(f"{stack}.{i}" for i in range(depth))]
        rows: list[dict[str, list[Tensor]]] = [{} for _ in names]
        states: list[list[Tensor]] = []
        with evaluating(model):
            for time in calibration.times:
                calls = calibration.at(time)
                of_time: list[list[Tensor]] = [[] for _ in names]
                for call in calls:
                    found = record(model, call, names)
                    for place, name in enumerate(names):
                        for stream, value in streams_in(found[name]).items():
                            part = some(rows_of(value), max(1, TOKENS // len(calls))).cpu()
                            rows[place].setdefault(stream, []).append(part)
                            if stream == "image":
                                of_time[place].append(part)
                states.append([torch.cat(parts) for parts in of_time[1:]])
        whole = [{stream: torch.cat(parts) for stream, parts in one.items()} for one in rows]
        maps = [
            {stream: fit_affine(x, after[stream] - x) for stream, x in before.items()}
            for before, after in pairwise(whole)
        ]
        return cls(stack, maps, states)

    def cka(self, u: int, k: int) -> float:
        """Compute CKA after block k with probes in the place of blocks u + 1 to k, the mean over times."""
        if u == k:
            return 1.0
        if (u, k) not in self.known:
            pairs = zip(self._chain(u, k), (state[k] for state in self.states), strict=True)
            values = [linear_cka(own, full) for own, full in pairs]
            self.known[u, k] = sum(values) / len(values)
        return self.known[u, k]

    def final_cka(self, model: Any, calibration: Calibration, span: Span) -> float:
        """Compute CKA of the network's output with probes in the place of a span's blocks but the first."""
        handlers = {f"{self.stack}.{i}": partial(self._stand_in, i) for i in range(span[0] + 1, span[1] + 1)}
        values = []
        with evaluating(model), torch.no_grad():
            for whole in calibration.calls:
                call = some_rows(whole, 0, FEW)
                head = next(site.name for site in model.sites() if site.kind == "head")
                full = record(model, call, [head])[head]
                kept: list[Tensor] = []
                model(**call, run=Run({**handlers, head: partial(_keeping, kept)}))
                values.append(linear_cka(rows_of(kept[0]), rows_of(full)))
        return sum(values) / len(values)

    def _stand_in(self, block: int, _: Handler, x: Any, *args: Any) -> Any:
        streams = streams_in(x)
        new = {
            name: v + self.maps[block][name](v.to(self.maps[block][name].weight)).to(v)
            for name, v in streams.items()
        }
        return new["image"] if isinstance(x, Tensor) else x._replace(**new)

    def _chain(self, u: int, k: int) -> list[Tensor]:
        if u == k:
            return [state[u] for state in self.states]
        if (u, k) not in self.chains:
            step = self.maps[k]["image"]
            self.chains[u, k] = [h + step(h) for h in self._chain(u, k - 1)]
            self.chains.pop((u, k - 1), None)  # the rule looks ahead only
        return self.chains[u, k]


def _keeping(kept: list[Tensor], fn: Handler, *args: Any) -> Any:
    kept.append(fn(*args))
    return kept[-1]
