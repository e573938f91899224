"""Small policies that probe the contract: a row selector, a statistics-reusing core, a gate, and a tap.

They act where RAS, Re-ttention and CG-Taylor act, and are no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core.grid import Segment, patchify
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named


@dataclass(frozen=True)
class RowSelector(Policy):
    """From `start_at` on, only the most uncertain `ratio` of image rows is computed, against all keys.

    Args:
        resets: evaluations that compute all rows.
        keep_keys: attend to the kept keys of rows that are not computed; without it the method is wrong.
    """

    ratio: float = 0.5
    start_at: int = 2
    resets: tuple[int, ...] = ()
    keep_keys: bool = True

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        owned: dict[str, Claim] = dict.fromkeys(("schedule", "rows", "solver"), "own")
        wrapped: dict[str, Claim] = dict.fromkeys(named(sites, "tokens", "core", "head"), "wrap")
        return owned | wrapped

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> SelectedRows:
        return SelectedRows(self, named(sites, "core"), named(sites, "tokens")[0], named(sites, "head")[0])

    def exact(self) -> RowSelector:
        return replace(self, ratio=1.0)

    def selects(self, index: int) -> bool:
        return self.ratio < 1 and index >= self.start_at and index not in self.resets


class SelectedRows(Session):
    def __init__(self, policy: RowSelector, cores: list[str], tokens: str, head: str) -> None:
        super().__init__()
        self.policy, self.cores, self.tokens, self.head = policy, cores, tokens, head
        self.active: Tensor | None = None
        self.stale: Tensor | None = None
        self.dropped: Tensor | None = None

    def enter(self, call: Call) -> Mapping[str, Handler]:
        rows = self.active if self.policy.selects(call.index) else None
        first, image = place(call.layout)
        table: dict[str, Handler] = {
            core: partial(self.core, (call.net, call.lane, core), rows, first) for core in self.cores
        }
        if rows is not None:
            table[self.tokens] = lambda fn, *args: fn(*args).rows("image", rows)
            table[self.head] = lambda fn, *args: scattered(fn(*args), rows, image.length)
        return table

    def core(
        self,
        key: object,
        rows: Tensor | None,
        first: int,
        fn: Handler,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *mask: Any,
    ) -> Tensor:
        if rows is not None and self.policy.keep_keys:
            whole_k, whole_v = self.state[key]
            after = torch.arange(first + rows.numel(), k.shape[2]) - k.shape[2] + whole_k.shape[2]
            at = torch.cat([torch.arange(first), first + rows, after])
            mask = tuple(widened(one, at, k.shape[2], whole_k.shape[2]) for one in mask)
            k, v = whole_k.index_copy(2, at, k), whole_v.index_copy(2, at, v)
        self.put(key, (k, v))
        return fn(q, k, v, *mask)

    def guided(self, call: Call, v: Tensor) -> Tensor:
        _, image = place(call.layout)
        if self.policy.selects(call.index) and self.active is not None and self.stale is not None:
            fresh = torch.zeros(image.length, dtype=torch.bool)
            fresh[self.active] = True
            v = torch.where(by_row(fresh, image, v), v, self.stale)
        dropped = torch.zeros(image.length) if self.dropped is None else self.dropped
        if self.policy.selects(call.index + 1):
            rows = v if v.ndim == 3 else patchify(v, patch_of(v, image))
            priority = dropped.exp() / rows.std(-1).mean(0).clamp_min(1e-9)
            count = int(self.policy.ratio * image.length)
            self.active = priority.argsort(descending=True)[:count].sort().values
            dropped = (dropped + 1).index_fill(0, self.active, 0.0)
        self.stale, self.dropped = v, dropped
        return v


def widened(mask: Tensor, at: Tensor, keys: int, length: int) -> Tensor:
    """A mask of all computed keys, made one of all; those that were not computed are seen."""
    if mask.shape[-1] != keys:
        return mask
    return mask.new_ones(*mask.shape[:-1], length).index_copy(-1, at, mask)


def place(layout: Sequence[Segment]) -> tuple[int, Segment]:
    """Where the image rows begin in the joint sequence, and their segment."""
    first = 0
    for segment in layout:
        if segment.stream == "image":
            return first, segment
        first += segment.length
    raise AssertionError("no image in this layout")


def scattered(out: Tensor, rows: Tensor, length: int) -> Tensor:
    """[B, R, C] at `rows` of zeros [B, length, C]."""
    return out.new_zeros(out.shape[0], length, out.shape[-1]).index_copy(1, rows, out)


def patch_of(v: Tensor, image: Segment) -> tuple[int, ...]:
    """Sides of a token of a picture [B, C, H, W] or a clip [B, C, T, H, W]."""
    size = v.shape[2:]
    return tuple(n // count for n, count in zip(size, image.grid.shape[-len(size) :], strict=True))


def by_row(mask: Tensor, image: Segment, v: Tensor) -> Tensor:
    """A row mask [L] that broadcasts to a sample [B, L, C], [B, C, H, W] or [B, C, T, H, W]."""
    if v.ndim == 3:
        return mask[:, None]
    cells = mask.reshape(image.grid.shape[2 - v.ndim :])
    for axis, side in enumerate(patch_of(v, image)):
        cells = cells.repeat_interleave(side, axis)
    return cells


@dataclass(frozen=True)
class BandReuse(Policy):
    """Attention in a band, put right with the softmax mass and the residual that a dense evaluation measured.

    Args:
        keep: share of keys in the band. warmup: dense evaluations. every: period of those that measure.
        ramp: added to the mass at each reuse.
    """

    keep: float = 0.25
    warmup: int = 1
    every: int = 3
    ramp: float = 0.0

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        owned: dict[str, Claim] = dict.fromkeys(("rows", *named(sites, "core")), "own")
        return owned

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Band:
        return Band(self, named(sites, "core"))

    def exact(self) -> BandReuse:
        return replace(self, every=1)


class Band(Session):
    verb = "banded"

    def __init__(self, policy: BandReuse, cores: list[str]) -> None:
        super().__init__()
        self.policy, self.cores = policy, cores

    def enter(self, call: Call) -> Mapping[str, Handler]:
        p = self.policy
        if call.index < p.warmup:
            return {}
        measures = (call.index - p.warmup) % p.every == 0
        return {core: partial(self.core, (call.net, call.lane, core), measures) for core in self.cores}

    def core(
        self, key: object, measures: bool, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *mask: Any
    ) -> Tensor:
        near = torch.arange(q.shape[2])
        band = (near[:, None] - near).abs() <= max(1, int(q.shape[2] * self.policy.keep)) // 2
        score = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
        banded = score.masked_fill(~band, float("-inf"))
        out = torch.softmax(banded, -1).to(v.dtype) @ v
        if measures or key not in self.state:
            dense = fn(q, k, v, *mask)
            mass = (banded.logsumexp(-1) - score.logsumexp(-1)).exp()[..., None]
            self.put(key, (mass, dense - mass * out))
            return dense
        mass, residual = self.state[key]
        self.put(key, (mass + self.policy.ramp, residual))
        return (mass * out + residual).to(v.dtype)


@dataclass(frozen=True)
class Gate(Policy):
    """Runs the first block, and the others only if its output moved by `threshold` or more (relative L1)."""

    threshold: float = 0.1
    warmup: int = 2

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        owned: dict[str, Claim] = dict.fromkeys(("schedule", *named(sites, "stack")), "own")
        return owned

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Gated:
        return Gated(self, named(sites, "stack")[0])

    def exact(self) -> Gate:
        return replace(self, threshold=0.0)


class Gated(Session):
    def __init__(self, policy: Gate, stack: str) -> None:
        super().__init__()
        self.policy, self.stack = policy, stack
        self.log: list[str] = []

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {self.stack: partial(self.gate, call)}

    def gate(self, call: Call, fn: Handler, x: Any, *args: Any) -> Any:
        lane = (call.net, call.lane)
        first = fn(x, *args, 0, 1)
        before, last = self.state.get(lane, (None, None))
        if before is not None and call.index >= self.policy.warmup and call.index < call.total - 1:
            now, then = (tree if isinstance(tree, Tensor) else tree.image for tree in (first, before))
            if (now - then).abs().mean() < self.policy.threshold * then.abs().mean():
                self.log.append("skipped")
                return last
        self.log.append("computed")
        out = fn(first, *args, 1)
        self.put(lane, (first, out))
        return out


@dataclass(frozen=True)
class Tap(Policy):
    """Keeps arguments and output of the first call of each named site in `seen`."""

    names: tuple[str, ...] = ()
    seen: dict[str, tuple[tuple[Any, ...], Any]] = field(default_factory=dict, compare=False)

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        seen: dict[str, Claim] = dict.fromkeys(self.names, "see")
        return seen

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Tapped:
        return Tapped(self)

    def exact(self) -> Tap:
        return self


class Tapped(Session):
    def __init__(self, policy: Tap) -> None:
        super().__init__()
        self.policy = policy

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {name: partial(self.watch, name) for name in self.policy.names}

    def watch(self, name: str, fn: Handler, *args: Any) -> Any:
        out = fn(*args)
        self.policy.seen.setdefault(name, (args, out))
        return out


def captions(*lengths: int, rows: int = 9) -> Tensor:
    """Mask [B, S] of captions that end in padding."""
    return (torch.arange(rows) < torch.tensor(lengths)[:, None]).long()
