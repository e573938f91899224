"""RAS: evaluations that compute some rows of the image and keep the rest as it was (arXiv 2502.10389).

B batch, L rows of a sequence, N heads, K head width, R rows that are computed. Rows that are not computed go on
along their last known prediction, and the others see the keys and values that they last had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditkit.core.config import Count, Fraction, Natural
from ditkit.core.errors import ConfigError
from ditkit.core.grid import SEQUENCES, Grid, Segment, image_of, patchify, put_rows, sequence, unpatchify
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended, moving, named

Metric = Literal["std", "l2"]
Selection = Literal["published", "low", "high"]
QUANTUM = 64
"""Rows by which a schedule with a slope rounds down (the paper's code)."""


@dataclass(frozen=True)
class RAS(Policy):
    """From `warmup` on, compute the rows of the image where the last guided prediction asks for it.

    The defaults are the paper's for SD3; for Lumina-Next they are `reset_every=0, resets=(12, 22),
    high_ratio=1.0, slope=256`.

    Args:
        ratio: share of image rows that an evaluation computes; 1 computes all.
        warmup: evaluations at the start that compute all rows. end: the first one after RAS; none: there is none.
        reset_every: period, from `warmup`, of evaluations that compute all rows; 0: none but `resets`.
        resets: further evaluations that do.
        metric: q of a row, of the prediction's channels: "std" or their "l2" norm, averaged over its patch.
        starvation: k, what being left out counts.
        selection: "published" leaves out the ends of the order of q exp(k D), where D counts how often a row was
            left out; so a row at the high end starves there. In "low" and "high", which are not the code's, being
            left out always raises a row: those with the highest exp(k D) / q, or exp(k D) q, are computed, and D
            starts again at 0. "low" is what the paper's text says.
        high_ratio: share of the rows left out that "published" takes from the high end.
        slope, span: rows left out more in each next `span` evaluations, about the same mean; 0: always as many.
    """

    ratio: Annotated[float, Interval(gt=0, le=1)] = 0.5
    warmup: Count = 4
    end: Natural | None = None
    reset_every: Natural = 8
    resets: tuple[Natural, ...] = ()
    metric: Metric = "std"
    starvation: Annotated[float, Interval(ge=0, lt=inf)] = 0.1
    selection: Selection = "published"
    high_ratio: Fraction = 0.3
    slope: int = 0
    span: Count = 4

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(warmup=2)

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        tokens, cores, head = named(sites, "tokens"), attended(sites), named(sites, "head")
        owned: dict[str, Claim] = dict.fromkeys(("schedule", "rows", "solver"), "own")
        wrapped: dict[str, Claim] = dict.fromkeys((*tokens, *cores, *head), "wrap")
        return owned | (wrapped if tokens and cores and head else {})

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Regions:
        moving(sites, attended(sites), "RAS")
        if beyond := [site.stage for site in sites if site.stage]:
            raise ConfigError(
                f"RAS: the network has a stage {beyond[0]}, whose rows it cannot choose; expected one stage"
            )
        if self.warmup > total:
            raise ConfigError(f"RAS: warmup={self.warmup}, expected at most total={total} evaluations")
        return Regions(self, sites, total)

    def exact(self) -> RAS:
        return replace(self, ratio=1.0, slope=0)

    def skipped(self, total: int, rows: int) -> list[int]:
        """Count how many of `rows` each of `total` evaluations leaves out.

        Raises:
            ConfigError: the slope leaves out fewer than none or all of them.
        """
        counts = [self._skipped(index, total, rows) for index in range(total)]
        for index, count in enumerate(counts):
            if not 0 <= count < rows:
                raise ConfigError(
                    f"RAS: slope={self.slope} leaves out {count} of {rows} rows in evaluation {index} of {total}, "
                    f"expected 0 to {rows - 1}"
                )
        return counts

    def _skipped(self, index: int, total: int, rows: int) -> int:
        ended = self.end is not None and index >= self.end
        periodic = self.reset_every and (index - self.warmup) % self.reset_every == 0 and index > self.warmup
        if index < self.warmup or ended or periodic or index in self.resets:
            return 0
        mean = int((1 - self.ratio) * rows)
        if not self.slope:
            return mean
        middle = (total + self.warmup) // self.span // 2
        return (mean + self.slope * (index // self.span - middle)) // QUANTUM * QUANTUM

    def ends(self, skip: int) -> tuple[int, int]:
        """Rows left out at the low and at the high end of the order, together at times one fewer than `skip`."""
        high_ratio = self.high_ratio if self.selection == "published" else 0
        return int(skip * (1 - high_ratio)), int(skip * high_ratio)

    def chosen(self, q: Tensor, drops: Tensor, skip: int) -> Tensor:
        """Rows to compute, ascending [B, R], by their metric q and how often they were left out, both [B, L]."""
        # the logarithm orders as q exp(k D) does, and cannot overflow
        if self.selection == "published":
            order = (q.log() + self.starvation * drops).argsort(stable=True)
            low, high = self.ends(skip)
            return order[:, low : q.shape[1] - high].sort().values
        sign = -1 if self.selection == "low" else 1
        order = (sign * q.log() + self.starvation * drops).argsort(descending=True, stable=True)
        return order[:, : q.shape[1] - skip].sort().values

    def counted(self, drops: Tensor, rows: Tensor) -> Tensor:
        """Return `drops` [B, L] after all rows but `rows` [B, R] were left out once more."""
        # the code starts at -(T + 1), a factor common to all rows that no order sees
        kept = drops.gather(1, rows) if self.selection == "published" else torch.zeros_like(rows).to(drops)
        return (drops + 1).scatter(1, rows, kept)


class Choice(NamedTuple):
    """The [B, R] rows of the image that evaluation `place` computes, and the guided prediction before it."""

    place: int
    rows: Tensor
    stale: Tensor


class Kept(NamedTuple):
    """Keys and values of one lane by their `core` site, [B, L, N, K] each, as of evaluation `place`."""

    place: int
    layout: tuple[tuple[str, int], ...]
    keys: dict[str, tuple[Tensor, Tensor]]
    bytes: int
    """The bytes that they take once they are all there."""


class Evaluation:
    """The work of one model call at its sites: all rows, or those of `choice`.

    Args:
        kept: keys and values of the lane, written where they lie. An interrupted call is harmless: the next one
            of the lane has the same rows to compute, or all, and writes them before they are read.
        keeps: whether the next evaluation will need the keys of all rows.
    """

    def __init__(
        self, call: Call, streams: Mapping[str, str], choice: Choice | None, kept: Kept | None, keeps: bool
    ) -> None:
        self.call, self.streams, self.choice, self.kept, self.keeps = call, streams, choice, kept, keeps
        self.keys = {} if kept is None else kept.keys
        self.bytes: dict[str, int] = {}
        self.places: dict[str, Tensor] = {}
        """The positions of the rows to compute in the sequence of each stream; empty if all are computed."""

    def tokens(self, fn: Handler, *args: Any) -> Any:
        """Embed the tokens, of the image only the rows to compute."""
        out = fn(*args)
        if self.choice is None:
            return out
        batch = tree_leaves(out.x)[0].shape[0]
        rows = _each(self.choice.rows, batch, [k for k, _ in self.keys.values()])
        if rows is None:
            return out
        self.places = {stream: self._places(stream, rows) for stream in SEQUENCES}
        return out.rows("image", self.places["image"])

    def core(self, name: str, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        """Attention of the rows that are computed over the keys of all."""
        if not self.places:
            self._keep(name, k, v)
            return fn(q, k, v, *masks)
        at = self.places[self.streams[name]]
        whole_k, whole_v = self.keys[name]
        for whole, fresh in ((whole_k, k), (whole_v, v)):
            put_rows(whole, at, fresh.detach().transpose(1, 2))
        widened = (_widened(mask, at, whole_k.shape[1]) for mask in masks)
        return fn(q, whole_k.transpose(1, 2), whole_v.transpose(1, 2), *widened)

    def head(self, fn: Handler, *args: Any) -> Tensor:
        """Return the prediction of all rows, zero where none was made."""
        out = fn(*args)
        if not self.places:
            return out
        length = sum(segment.length for segment in sequence(self.call.layout, "image"))
        whole = out.new_zeros(out.shape[0], length, out.shape[2])
        return put_rows(whole, self.places["image"], out)

    def left(self, goes_on: bool) -> Kept:
        """Return what the lane keeps after this call; nothing if no later evaluation leaves out rows."""
        size = sum(self.bytes.values()) or (self.kept.bytes if self.kept else 0)
        keys, size = (self.keys, size) if goes_on else ({}, 0)
        return Kept(self.call.index, _lengths(self.call), keys, size)

    def _keep(self, name: str, k: Tensor, v: Tensor) -> None:
        length = sum(segment.length for segment in sequence(self.call.layout, self.streams[name]))
        if k.shape[2] != length:
            raise ConfigError(
                f"RAS: {name} has {k.shape[2]} keys, expected the {length} rows of its sequence: attention along "
                "some axes only cannot run on some rows"
            )
        self.bytes[name] = sum(t.numel() * t.element_size() for t in (k, v))
        if not self.keeps:
            return
        old, fresh = self.keys.get(name), (k.detach().transpose(1, 2), v.detach().transpose(1, 2))
        if old is None or old[0].shape != fresh[0].shape:
            self.keys[name] = fresh[0].clone(), fresh[1].clone()
        else:
            old[0].copy_(fresh[0])
            old[1].copy_(fresh[1])

    def _places(self, stream: str, rows: Tensor) -> Tensor:
        """Return the positions of the image's `rows`, and of all rows of the other segments, in a sequence."""
        parts, start = [], 0
        for segment in sequence(self.call.layout, stream):
            every = torch.arange(segment.length, device=rows.device).expand(*rows.shape[:-1], -1)
            parts.append(start + (rows if segment.stream == "image" else every))
            start += segment.length
        return torch.cat(parts, -1)


class Regions(Session):
    """The rows chosen after guidance, for all lanes, and the keys of each lane; a lane that was away is computed."""

    verb: ClassVar[str] = "partial"

    def __init__(self, policy: RAS, sites: Sequence[Site], total: int) -> None:
        super().__init__()
        self.policy, self.total = policy, total
        self.tokens, self.head = named(sites, "tokens"), named(sites, "head")
        self.streams = attended(sites)
        self.choice: Choice | None = None
        self.drops: Tensor | None = None
        self.chosen_bytes = 0
        """The bytes that the next choices will take: a prediction, the rows, and how often each was left out."""
        self.is_partial = False

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy == self.policy.exact():
            return {}
        ahead = self._skipped(call)[call.index + 1 :]
        lane, choice = (call.net, call.lane), self.choice
        kept: Kept | None = self.state.get(lane)
        if kept is not None and kept.layout != _lengths(call):
            kept = None
        fresh = kept is not None and kept.keys and call.index - kept.place in (0, 1)
        if choice is not None and (choice.place != call.index or not fresh):
            choice = None
        work = Evaluation(call, self.streams, choice, kept, any(ahead[:1]))
        self.put(lane, work)
        return {
            **dict.fromkeys(self.tokens, work.tokens),
            **{name: partial(work.core, name) for name in self.streams},
            **dict.fromkeys(self.head, work.head),
        }

    def commit(self) -> None:
        for lane, work in self.staged.items():
            self.is_partial = self.is_partial or bool(work.places)
            self.state[lane] = work.left(any(self._skipped(work.call)[work.call.index + 1 :]))
        self.staged.clear()

    def guided(self, call: Call, v: Tensor) -> Tensor:
        """`v` with the last known values of rows that were not computed; chooses the rows of the next one."""
        if self.policy == self.policy.exact():
            return v
        image = image_of(call.layout)
        if self.is_partial and self.choice is not None:
            v = torch.where(by_row(_marked(self.choice.rows, image.length), image, v), v, self.choice.stale)
        ahead = self._skipped(call)[call.index + 1 :]
        choice = None
        most = max((image.length - sum(self.policy.ends(skip)) for skip in ahead if skip), default=0)
        counts = v.new_empty((), dtype=torch.promote_types(v.dtype, torch.float32)).nbytes * image.length
        self.chosen_bytes = v.nbytes + len(v) * (8 * most + counts) if most else 0
        if any(ahead[:1]):
            q = row_metric(v.detach(), image, self.policy.metric)
            drops = torch.zeros_like(q) if self.drops is None or self.drops.shape != q.shape else self.drops
            rows = self.policy.chosen(q, drops, ahead[0])
            choice = Choice(call.index + 1, rows, v.detach().clone())
            self.drops = self.policy.counted(drops, rows)
        elif self.drops is not None:
            every = torch.arange(image.length, device=v.device).expand_as(self.drops)
            self.drops = self.policy.counted(self.drops, every)
        self.choice, self.is_partial = choice, False
        return v

    def bytes(self) -> int:
        kept = [keys for lane in self.state.values() for keys in lane.keys.values()]
        return _bytes((kept, self.choice, self.drops))

    def projected_bytes(self) -> int:
        """With the keys of all lanes seen so far and, once guidance was seen, with what is kept of it."""
        chosen = max(self.chosen_bytes, _bytes((self.choice, self.drops)))
        return sum(kept.bytes for kept in self.state.values()) + chosen

    def _skipped(self, call: Call) -> list[int]:
        return self.policy.skipped(self.total, image_of(call.layout).length)


def row_metric(v: Tensor, image: Segment, metric: Metric) -> Tensor:
    """Compute q of each row, [B, L], of a prediction [B, L, C], [B, C, H, W] or [B, C, T, H, W].

    Raises:
        ConfigError: the spread of a single channel is asked for.
    """
    axis = -1 if v.ndim == 3 else 1
    if metric == "std" and v.shape[axis] == 1:
        raise ConfigError("RAS: metric='std' of a prediction of 1 channel is 0, expected metric='l2'")
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    q = v.std(axis, correction=0) if metric == "std" else v.norm(dim=axis)
    return q if v.ndim == 3 else patchify(q[:, None], image.grid.sides(v.shape[2:])).mean(-1)


def by_row(mask: Tensor, image: Segment, v: Tensor) -> Tensor:
    """Shape a mask of rows [B, L] to broadcast to the prediction `v`, as in `row_metric`."""
    if v.ndim == 3:
        return mask[..., None]
    sides = image.grid.sides(v.shape[2:])
    return unpatchify(mask[..., None].expand(-1, -1, torch.Size(sides).numel()), image.grid, sides)


def _marked(rows: Tensor, length: int) -> Tensor:
    return torch.zeros(len(rows), length, dtype=torch.bool, device=rows.device).scatter(1, rows, True)


def _each(rows: Tensor, batch: int, keys: Sequence[Tensor]) -> Tensor | None:
    """`rows` for a call of `batch` samples, which may hold several branches; None if another batch was kept."""
    if batch % len(rows) or any(len(k) != batch for k in keys):
        return None
    return rows[0] if len(rows) == 1 else rows.repeat(batch // len(rows), 1)


def _widened(mask: Tensor, at: Tensor, length: int) -> Tensor:
    """Widen a mask over computed keys to all keys; rows that are left out are visible."""
    if mask.shape[-1] != at.shape[-1]:
        return mask
    whole = mask.new_full((*mask.shape[:-1], length), mask.dtype == torch.bool)
    index = at if at.ndim == 1 else at[:, None, None]
    return whole.scatter(-1, index.expand_as(mask), mask)


def _lengths(call: Call) -> tuple[tuple[str, int], ...]:
    return tuple((segment.stream, segment.length) for segment in call.layout)


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))
