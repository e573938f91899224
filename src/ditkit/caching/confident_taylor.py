"""CG-Taylor: the first block's forecast says whether to trust the last block's (arXiv 2508.02240).

B batch, R rows, D width. Both forecasts are of hidden states, h_1 and h_L, not of what the blocks add to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import factorial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ditkit.caching.branch_cache import Branch, Geometry, geometry_of, push, replace_latest
from ditkit.caching.taylorseer import Coefficients, output_weights, update_coefficients
from ditkit.core.config import Natural
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named

Decider = Literal["first", "each"]
LISTED = (0, 1, 2, 4)
"""The full evaluations that an `interval` starts with."""


@dataclass(frozen=True)
class ConfidentTaylor(Policy):
    """Run the first block always, and the others only where it was not forecast well.

    With f the forecast of h_1, e = mean|f - h_1| / mean|h_1| in float32 over all samples and image rows. Where
    e < `threshold`, h_L is forecast and both ladders stay as they are; else the evaluation is full, and both
    climb. The first evaluations and the last one are always full. With a list instead of the gate, only `last_order`
    of the other fields is read.

    Args:
        threshold: of e; 0 computes every evaluation. Published for 50 steps: 0.008 for DiT-XL/2, 0.03 and 0.13
            (with both orders 1) for FLUX.1-dev; 0.18 and 0.36 (with `warmup` 5) for Wan 2.1.
        first_order, last_order: highest differences kept of h_1 and of h_L.
        warmup: the gate is first asked in evaluation `warmup` + 1, counted from 0.
        decider: which guidance lane is gated, where they are separate calls. "first" is the one evaluated first,
            and the others do as it did, without running any block; "each" gates each on its own.
        per_sample_gate: decide for each sample of a batch alone (ours). Blocks then run where any sample needs
            them, and the others still take their forecasts.
        interval: in place of the gate a list for any number of evaluations: full at 0, 1, 2, 4 and each `interval`
            from there, counted from the first one of a network. In the others no block runs. 0 asks the gate. Not
            the paper's.
        schedule: a list of one's own in place of the gate, of indices from 0 upwards.

    Raises:
        ConfigError: a field is out of range.
    """

    threshold: Annotated[float, Ge(0)] = 0.008
    first_order: Natural = 3
    last_order: Natural = 1
    warmup: Natural = 2
    decider: Decider = "first"
    per_sample_gate: bool = False
    interval: Natural = 0
    schedule: tuple[Natural, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule and tuple(sorted({0, *self.schedule})) != self.schedule:
            raise ConfigError(f"ConfidentTaylor: schedule={self.schedule}, expected indices from 0 upwards")
        listed = [f"{name}={given}" for name in ("interval", "schedule") if (given := getattr(self, name))]
        if len(listed) > 1:
            raise ConfigError(f"ConfidentTaylor: {' and '.join(listed)}, expected one of the two")
        if listed and self.per_sample_gate:
            raise ConfigError(f"ConfidentTaylor: {listed[0]} asks no gate, expected per_sample_gate=False")

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(threshold=0.5, warmup=1)

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        stacks = named(sites, "stack")
        gated = not (self.interval or self.schedule)  # by the first block, so there must be others
        fits = len(stacks) == 1 and len(named(sites, "block")) > gated
        return {"schedule": "own", **dict.fromkeys(stacks if fits else (), "own")}

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> GatedForecaster:
        if self.schedule and self.schedule[-1] >= total:
            raise ConfigError(
                f"ConfidentTaylor: schedule={self.schedule}, expected indices below total={total} evaluations"
            )
        if self.interval and len(self.full_steps(total)) == total:
            raise ConfigError(
                f"ConfidentTaylor: interval={self.interval} forecasts none of total={total} evaluations, expected more"
            )
        return GatedForecaster(self, named(sites, "stack")[0], total)

    def exact(self) -> ConfidentTaylor:
        return replace(self, threshold=0.0, interval=0, schedule=())

    def full_steps(self, total: int) -> tuple[int, ...]:
        """List the full evaluations of a trajectory of `total`, where no gate decides; else none."""
        listed = (
            (*LISTED, *range(LISTED[-1] + self.interval, total, self.interval))
            if self.interval
            else self.schedule
        )
        return tuple(index for index in listed if index < total)


class Series(NamedTuple):
    """The ladder of one hidden state: its values at full evaluations, the latest at `anchor`."""

    anchor: int
    differences: Coefficients
    branch: Branch

    def at(self, index: int) -> Any:
        """Forecast evaluation `index`: sum_i f_i k^i / i!, k after the anchor."""
        k = index - self.anchor
        weights = [k**i / factorial(i) for i in range(len(self.differences))]
        return self.branch.forecast(output_weights(weights, self.differences))

    def most_bytes(self, factors: int) -> int:
        """Its memory once it has so many factors."""
        return sum(tensors[0].nbytes for tensors in self.branch.outputs) * factors


class BranchState(NamedTuple):
    """The state of one lane.

    With `per_sample_gate` there is one part a sample, else one for the batch.
    """

    start: int
    latest: int
    """Indices of its first and its latest evaluation."""
    geometry: Geometry
    tokens: list[torch.Size]
    trusted: tuple[bool, ...] = ()
    """The parts that took forecasts in the latest evaluation, one value a part."""
    first: tuple[Series, ...] = ()
    """The series of h_1, one a part; none in a lane that does as another did."""
    last: tuple[Series, ...] = ()


class Evaluated(NamedTuple):
    """A lane as it was before, and what its ladders climb to, h_1 and h_L of each part; no h_L if all were trusted."""

    lane: BranchState
    features: list[Tensor]
    parts: list[Any]


class GatedForecaster(Session):
    """Two ladders for each (net, lane); a lane that is new or has another shape is computed."""

    verb: ClassVar[str] = "forecast"

    def __init__(self, policy: ConfidentTaylor, stack: str, total: int) -> None:
        super().__init__()
        self.policy, self.stack, self.total = policy, stack, total
        self.listed = policy.full_steps(total)

    def enter(self, call: Call) -> Mapping[str, Handler]:
        is_neutral = not self.listed and not self.policy.threshold
        return {} if is_neutral else {self.stack: partial(self.through, call)}

    def through(self, call: Call, fn: Callable[..., Any], x: Any, *args: Any) -> Any:
        """Handle the stack: its first block, then the others or the forecast of what they give."""
        lane = self._lane(call, x)
        trusted = self._given(call, lane)
        features: list[Tensor] = []
        if trusted is not None:
            rest = partial(fn, x, *args)
        else:
            h = fn(x, *args, 0, 1)
            features = self._parts(image_rows(h, call.layout).float())
            trusted, rest = self._trusted(call, lane, features), partial(fn, h, *args, 1)
        parts: list[Any] = []
        if all(trusted):
            out = _joined([series.at(call.index) for series in lane.last])
        else:
            out = rest()
            parts = self._parts(out)
            if any(trusted):
                known = zip(trusted, lane.last, parts, strict=True)
                out = _joined([series.at(call.index) if sure else part for sure, series, part in known])
        lane = lane._replace(latest=call.index, trusted=trusted)
        self.put((call.net, call.lane), Evaluated(lane, features, parts))
        return out

    def commit(self) -> None:
        """After a full evaluation, climb the lane's ladders."""
        for key, evaluated in self.staged.items():
            self.state[key] = self._advanced(*evaluated)
        self.staged.clear()

    def projected_bytes(self) -> int:
        """With all orders filled, for the lanes seen so far."""
        orders = (self.policy.first_order, self.policy.last_order)
        most = len(self.listed) or self.total
        return sum(
            one.most_bytes(min(order + 1, most))
            for lane in self.state.values()
            for order, series in zip(orders, (lane.first, lane.last), strict=True)
            for one in series
        )

    def _advanced(self, lane: BranchState, features: Sequence[Tensor], parts: Sequence[Any]) -> BranchState:
        if not parts:
            return lane
        return lane._replace(
            first=_advanced(lane.first, lane.trusted, features, lane.latest, self.policy.first_order),
            last=_advanced(lane.last, lane.trusted, parts, lane.latest, self.policy.last_order),
        )

    def _lane(self, call: Call, x: Any) -> BranchState:
        tokens, geometry = [t.shape for t in tree_leaves(x)], geometry_of(call)
        lane: BranchState | None = self.state.get((call.net, call.lane))
        if lane is None or call.index < lane.latest or (lane.geometry, lane.tokens) != (geometry, tokens):
            return BranchState(call.index, call.index, geometry, tokens)
        return lane

    def _given(self, call: Call, lane: BranchState) -> tuple[bool, ...] | None:
        """Return what is trusted without a gate, by the schedule or another lane; None where the gate is asked."""
        if self.listed:
            origin = self._origin(call, lane) if self.policy.interval else 0
            due = max(origin + step for step in self.listed if origin + step <= call.index)
            return (call.index > due and bool(lane.last) and lane.last[0].anchor >= due,)
        leader = self._leader(call, lane)
        return None if leader is None else _followed(leader, lane)

    def _origin(self, call: Call, lane: BranchState) -> int:
        """Return the first evaluation of a network: its lanes keep step, also one that joins late."""
        return min((lane.start, *(other.start for key, other in self.state.items() if key[0] == call.net)))

    def _leader(self, call: Call, lane: BranchState) -> BranchState | None:
        """Return the lane of the same network that was gated in this evaluation already."""
        if self.policy.decider == "each":
            return None
        others = [other for key, other in self.state.items() if key[0] == call.net and key[1] != call.lane]
        gated = [other for other in others if other.first and other.latest == call.index]
        return next((other for other in gated if other.tokens == lane.tokens), None)

    def _trusted(self, call: Call, lane: BranchState, features: Sequence[Tensor]) -> tuple[bool, ...]:
        if not lane.first or not lane.start + self.policy.warmup < call.index < self.total - 1:
            return (False,) * len(features)
        errors = [
            relative_error(series.at(call.index), h) for series, h in zip(lane.first, features, strict=True)
        ]
        return tuple(e < self.policy.threshold for e in torch.stack(errors).tolist())

    def _parts(self, tree: Any) -> list[Any]:
        """Split into what is decided alone: each sample, or the batch."""
        if not self.policy.per_sample_gate:
            return [tree]
        return [tree_map(lambda t, i=i: t[i : i + 1], tree) for i in range(len(tree_leaves(tree)[0]))]


def image_rows(tokens: Any, layout: Sequence[Segment]) -> Tensor:
    """Rows [B, R, D] that the model makes, of `tokens` [B, L, D] or of their `image`: text dilutes e, padding too.

    Padded rows are 0. Without a layout that fits, all rows.
    """
    x: Tensor = tokens if isinstance(tokens, Tensor) else tokens.image
    segments = [s for s in layout if isinstance(tokens, Tensor) or s.stream != "text"]
    lengths = [s.length for s in segments]
    if sum(lengths) != x.shape[1]:
        return x
    parts = [
        part if s.valid is None else part.masked_fill(~s.valid[..., None], 0)
        for s, part in zip(segments, x.split(lengths, 1), strict=True)
        if s.stream not in ("text", "context")
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def relative_error(forecast: Tensor, h: Tensor) -> Tensor:
    """mean|forecast - h| / mean|h|, a scalar."""
    return (forecast - h).abs().mean() / h.abs().mean()


def _followed(leader: BranchState, lane: BranchState) -> tuple[bool, ...]:
    """Return the leader's decisions, where what the lane keeps is not older than what the leader keeps."""
    if not lane.last:
        return (False,) * len(leader.trusted)
    kept = zip(leader.trusted, lane.last, leader.last, strict=True)
    return tuple(sure and own.anchor >= others.anchor for sure, own, others in kept)


def _advanced(
    series: Sequence[Series], trusted: Sequence[bool], parts: Sequence[Any], index: int, order: int
) -> tuple[Series, ...]:
    """Advance the series by one full evaluation, those of trusted parts unchanged; no part, no series."""
    known: Sequence[Series | None] = series or [None] * len(parts)
    return tuple(
        old if sure and old is not None else _extended(old, index, part, order)
        for old, sure, part in zip(known, trusted, parts, strict=False)
    )


def _extended(old: Series | None, index: int, value: Any, order: int) -> Series:
    if old is not None and index == old.anchor:  # evaluated again
        return old._replace(branch=replace_latest(value, old.branch))
    known, spans = ((), []) if old is None else (old.differences, [index - old.anchor] * order)
    differences = update_coefficients(known, spans)
    return Series(index, differences, push(value, old and old.branch, len(differences)))


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tree_map(lambda *leaves: torch.cat(leaves), *parts)
