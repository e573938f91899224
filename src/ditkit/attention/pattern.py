"""Attention patterns: tokens put in the order of their blocks once, lists of key blocks, a schedule.

B batch, N heads, K head width, S slots: the image's rows in the order of blocks, some of them padding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditkit.core.config import Natural
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, Segment, image_of, sequence, take_rows
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended, moving, named
from ditkit.ops.block_sparse_attention import Attended, BlockPlan, attend, choose, pays

Execution = Literal["auto", "cpu", "triton", "flex", "reference", "none"]
HIDES = -1e4
"""The additive mask that hides a key, or less: exp(-10000) is 0 in every type, and float16 has no -1e5."""


@dataclass(frozen=True, kw_only=True)
class Pattern(Policy):
    """A sparse attention: the keys each query sees, in all evaluations and layers that are not dense.

    Args:
        block: slots of a block of queries, and of keys: what a kernel visits or leaves out.
        warmup: evaluations at the start in which attention is dense.
        dense: attentions that stay dense, by their place in the model.
        kernel: "auto" is the device's fastest, and dense where skipping does not pay; a named one skips always;
            "none" never does: the neutral setting.
    """

    block: Literal[8, 16, 32, 64, 128, 256] = 128
    warmup: Natural = 0
    dense: tuple[Natural, ...] = ()
    kernel: Execution = "auto"

    @abstractmethod
    def plan(self, grid: Grid, others: int) -> BlockPlan:
        """Plan the image's slots, a whole number of blocks, then `others` rows, which see all and are seen by all.

        Tokens are numbered as the model has them, the image's first. Made once for each layout.
        """

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        cores = sparse_sites(sites)
        owned: dict[str, Claim] = dict.fromkeys(("rows", *cores), "own")
        if not cores:
            return {"rows": "own"}
        inside = moving(sites, cores, type(self).__name__)
        return owned | dict.fromkeys(named(inside, "tokens", "head"), "wrap")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Sparse:
        self._check(sites, total)
        return Sparse(self, sites)

    def exact(self) -> Self:
        return replace(self, kernel="none")

    def _check(self, sites: Sequence[Site], total: int) -> None:
        name, cores = type(self).__name__, len(sparse_sites(sites))
        if self.kernel == "none":
            return
        if self.warmup >= total:
            raise ConfigError(f"{name}: warmup={self.warmup}, expected fewer than total={total} evaluations")
        if set(self.dense) >= set(range(cores)):
            raise ConfigError(f"{name}: dense={self.dense} names all {cores} attentions, expected fewer")
        if beyond := [place for place in self.dense if place >= cores]:
            raise ConfigError(f"{name}: dense={beyond[0]}, expected a place among {cores} attentions")


def sparse_sites(sites: Sequence[Site]) -> dict[str, str]:
    """Streams of the attentions that a kernel can take the place of, by their names."""
    scaled = {site.name for site in sites if site.attention == "scaled"}
    return {name: stream for name, stream in attended(sites).items() if name not in scaled}


@lru_cache(maxsize=64)
def cached_plan(pattern: Pattern, grid: Grid, others: int) -> BlockPlan:
    """Return the plan of a layout, kept by value: all trajectories with this layout share it."""
    plan = pattern.plan(grid, others)
    if (plan.queries - others) % plan.block[0]:
        raise ShapeError(
            f"{type(pattern).__name__}: {plan.queries - others} slots, expected whole blocks of {plan.block[0]}"
        )
    return plan


class SequencePlan(NamedTuple):
    """A plan, and where the rows of its sequence stand: `before` others, the image's slots, more others."""

    plan: BlockPlan
    before: int
    slots: int
    image: Tensor
    """The slot of each token of the image, int64 [L]."""
    real: Tensor | None
    """The rows of the sequence that are no padding; None where all are."""
    grid: Grid
    """Of the image."""


@lru_cache(maxsize=64)
def place_plan(pattern: Pattern, grid: Grid, lengths: tuple[tuple[str, int], ...]) -> SequencePlan:
    """Place the plan in a sequence of segments of these streams and lengths, kept by value as plans are."""
    place = [name for name, _ in lengths].index("image")
    before, others = sum(n for _, n in lengths[:place]), sum(n for name, n in lengths if name != "image")
    plan = cached_plan(pattern, grid, others)
    real = None
    if plan.order is not None and bool((plan.order < 0).any()):
        rows = torch.cat((plan.order.new_zeros(before), plan.order))[: plan.queries]
        real = (rows >= 0).nonzero().squeeze(1)
    return SequencePlan(plan, before, plan.queries - others, plan.inverse[: grid.length], real, grid)


def append_dense_rows(
    slots: Tensor, kept: Tensor, others: int, block: int, pooled: int = 0
) -> tuple[Tensor | None, Tensor]:
    """Append, to the image's slots [S] and blocks, rows of others that see all and are seen by all.

    Args:
        pooled: further keys, behind these rows.

    Returns:
        The token in each slot, None where that is the model's order; and the blocks that may be visited.
    """
    tokens, rows, columns = int(slots.max()) + 1, -(-others // block), -(-(others + pooled) // block)
    order = torch.cat((slots, torch.arange(tokens, tokens + others)))
    is_in_order = torch.equal(order, torch.arange(len(order)))
    return None if is_in_order else order, F.pad(kept, (0, columns, 0, rows), value=True)


class Layout:
    """Plans of a call's layout by stream, and the order of the image's rows.

    Args:
        streams: of the attentions. stage: in which they are.
    """

    def __init__(
        self, pattern: Pattern, layout: Sequence[Segment], streams: Sequence[str], stage: int = 0
    ) -> None:
        self.image = image_of(layout, stage)
        self.length = sum(segment.length for segment in sequence(layout, "image", stage))
        """Rows of the image's stream: its own, and pictures that it refers to."""
        lengths = {
            s: tuple((part.stream, part.length) for part in sequence(layout, s, stage)) for s in streams
        }
        self.seats = {stream: place_plan(pattern, self.image.grid, lengths[stream]) for stream in streams}

    @cached_property
    def order(self) -> Tensor | None:
        """The token of the image in each of its slots, -1 for padding; None for the model's order."""
        placed = next(iter(self.seats.values()))
        return None if placed.plan.order is None else placed.plan.order[: placed.slots]

    def rows(self, stream: str) -> Tensor:
        """Return the positions of the rows of a sequence, in the model's order, int64 [rows]."""
        placed = self.seats[stream]
        before, after = torch.arange(placed.plan.queries - placed.slots).tensor_split((placed.before,))
        return torch.cat((before, placed.before + placed.image, placed.slots + after))

    def tokens(self, fn: Handler, *args: Any) -> Any:
        """Embed the tokens and all that is aligned with them, the image's in its slots."""
        out = fn(*args)
        assert self.order is not None
        rows = torch.cat((self.order.clamp(min=0), torch.arange(self.image.length, self.length)))
        return out.rows("image", rows.to(tree_leaves(out.x)[0].device))

    def head(self, fn: Handler, *args: Any) -> Tensor:
        """Return the prediction of all rows, in the model's order."""
        out = fn(*args)
        placed = next(iter(self.seats.values()))
        others = torch.arange(placed.slots, out.shape[1])
        return take_rows(out, torch.cat((placed.image, others)).to(out.device))


class Sparse(Session):
    """Attention by the plan of each call's layout; it keeps nothing between calls."""

    verb: ClassVar[str] = "sparse"

    def __init__(self, policy: Pattern, sites: Sequence[Site]) -> None:
        super().__init__()
        self.policy, self.streams = policy, sparse_sites(sites)
        self.places = {name: place for place, name in enumerate(self.streams)}
        inside = moving(sites, self.streams, type(policy).__name__)
        self.stage = inside[0].stage if inside else 0
        self.tokens, self.heads = named(inside, "tokens"), named(inside, "head")

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.kernel == "none":
            return {}
        layout = self.layout(call)
        self.remark(layout)
        if "off" in self.remarks:
            return {}
        cores = {name: self.handler(call, name, layout.seats[at]) for name, at in self.streams.items()}
        cores |= dict.fromkeys(self.tokens, partial(self.accept, layout))
        return cores if layout.order is None else cores | dict.fromkeys(self.heads, layout.head)

    def remark(self, layout: Layout) -> None:
        """Write the receipt's remarks on this layout.

        That of the kernel stays, as calls that a cache forecasts run none.
        """
        plans = [placed.plan for placed in layout.seats.values()]
        rows, visited = max(plan.rows_ratio for plan in plans), max(map(self.density, layout.seats.values()))
        shown_values = {"visited": round(visited, 4), "rows": round(rows, 4) if rows > 1 else 0}
        kept = {name: self.remarks[name] for name in ("kernel",) if name in self.remarks}
        self.remarks = {
            name: value for name, value in {**shown_values, "off": self.off(layout)}.items() if value
        } | kept

    def accept(self, layout: Layout, fn: Handler, *args: Any) -> Any:
        """Put the embedded tokens in their slots.

        Refuse before any block if their device and type lack the kernel.
        """
        out = fn(*args) if layout.order is None else layout.tokens(fn, *args)
        features = tree_leaves(out.x)[0]
        for placed in layout.seats.values():
            choose(features.new_empty(0, 1), placed.plan, self.kernel)  # the width of heads is not known yet
        return out

    def rows(self, call: Call) -> Mapping[str, Tensor]:
        layout = self.layout(call)
        if self.policy.kernel == "none" or layout.order is None or self.off(layout):
            return {}
        return {name: layout.rows(at) for name, at in self.streams.items()}

    def layout(self, call: Call) -> Layout:
        return Layout(self.policy, call.layout, sorted(set(self.streams.values())), self.stage)

    def off(self, layout: Layout) -> str:
        """Why skipping does not pay with this layout; empty if it does, or if a kernel is named."""
        if self.policy.kernel != "auto":
            return ""
        seats = layout.seats.values()
        return next(filter(None, (pays(placed.plan, self.density(placed)) for placed in seats)), "")

    def density(self, placed: SequencePlan) -> float:
        """Return the share of dense attention's blocks that will be visited."""
        return placed.plan.density

    def is_dense(self, call: Call, name: str) -> bool:
        """Return whether an attention sees all keys in this call."""
        return call.index < self.policy.warmup or self.places[name] in self.policy.dense

    def handler(self, call: Call, name: str, placed: SequencePlan) -> Handler:
        """Return the handler of an attention in this call.

        Whatever differs from call to call is decided here, outside of graphs.
        """
        if self.is_dense(call, name):
            return partial(run_dense, placed)
        return partial(run_sparse, placed, self.attending(call, name, placed))

    def attending(self, call: Call, name: str, placed: SequencePlan) -> Callable[..., Tensor]:
        """Return the function of an attention that is not dense: `(q, k, v, valid)`, rows in the plan's order.

        A method with a correction adds it here.
        """
        return partial(self.attend, placed.plan)

    def attend(self, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Attention as the plan has it."""
        return self.execute(plan, q, k, v, valid).out

    def execute(self, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Attended:
        """Execute the plan, by the kernel that the policy names or the device has."""
        if not torch.compiler.is_compiling():
            self.remarks["kernel"] = choose(q, plan, self.kernel).kernel
        return attend(q, k, v, plan, kernel=self.kernel, valid=valid)

    @property
    def kernel(self) -> Any:
        return self.policy.kernel


def run_dense(placed: SequencePlan, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
    """Run the model's own attention on the rows that are no padding; q, k, v [B, N, rows of the sequence, K]."""
    if placed.real is None:
        return fn(q, k, v, *masks)
    real = placed.real.to(q.device)
    visible = (mask[..., real] if mask.shape[-1] == k.shape[2] else mask for mask in masks)
    out: Tensor = fn(*(x[:, :, real] for x in (q, k, v)), *visible)
    return out.new_zeros(*out.shape[:2], q.shape[2], out.shape[3]).index_copy(2, real, out)


def run_sparse(
    placed: SequencePlan,
    attend: Callable[..., Tensor],
    fn: Handler,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *masks: Tensor,
) -> Tensor:
    """`attend` in place of it: the rows that stand before the image go behind it, as in the plan, and back."""
    valid = _valid(placed, k.shape[2], *masks)
    q, k, v = (x.roll(-placed.before, 2) if placed.before else x for x in (q, k, v))
    out = attend(q, k, v, valid)
    return out.roll(placed.before, 2) if placed.before else out


def _valid(placed: SequencePlan, keys: int, *masks: Tensor) -> Tensor | None:
    """Return the key tokens that no mask hides, bool [B, tokens], in the plan's numbers; None for all.

    Masks are [B, 1, 1, M]: bool, true for what is seen, or added to scores; for the first M rows of the sequence.

    Raises:
        ShapeError: a mask that differs from query to query, or weighs keys instead of hiding them.
    """
    if not masks:
        return None
    (mask,) = masks
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise ShapeError(f"attention pattern: a mask of {list(mask.shape)}, expected [B, 1, 1, keys]")
    visible = mask[:, 0, 0] if mask.dtype == torch.bool else _kept(mask[:, 0, 0])
    visible = F.pad(visible, (0, keys - visible.shape[1]), value=True)
    before, image, after = visible.tensor_split((placed.before, placed.before + placed.slots), 1)
    return torch.cat((image[:, placed.image.to(image.device)], after, before), 1)


def _kept(added: Tensor) -> Tensor:
    """Return the positions at which a mask that is added to scores hides nothing.

    Raises:
        ShapeError: it weighs keys, which no kernel does.
    """
    if not torch.compiler.is_compiling():
        weighing = added[(added != 0) & ~(added <= HIDES)]
        if weighing.numel():
            raise ShapeError(
                f"attention pattern: a mask that adds {weighing[0].item():g} to scores, "
                f"expected 0 or at most {HIDES:g}"
            )
    return added > HIDES
