"""Forecasts from what full evaluations returned (TaylorSeer, arXiv 2503.06923), as weighted sums of it.

A forecast is linear in the outputs of the latest full evaluations, so these are kept as the model made them: nothing
is computed when they are recorded, nothing is lost to their type, and differences exist as coefficients only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from math import isnan
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ditkit.core.config import Count, Natural
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named

Geometry = tuple[tuple[str, Grid, int, int], ...]
"""Stream, grid and length of each segment: what must not change between the anchors of a forecast."""


Coefficients = tuple[tuple[float, ...], ...]
"""Row i: what each kept output counts in the difference g_i, latest first."""


class Branch(NamedTuple):
    """What a branch returned in its latest full evaluations, latest first: a list for each tensor of its output."""

    outputs: list[list[Tensor]]
    spec: TreeSpec

    def forecast(self, weights: Sequence[float]) -> Any:
        """What the branch would return; `weights` of its outputs, which sum to 1."""
        leaves = [_combined(kept, weights) for kept in self.outputs]
        return leaves[0] if self.spec.is_leaf() else tree_unflatten(leaves, self.spec)

    @property
    def depth(self) -> int:
        return len(self.outputs[0])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for kept in self.outputs for t in kept)


def update_coefficients(old: Coefficients, spans: Sequence[float]) -> Coefficients:
    """The differences one full evaluation later: g_0 = F, and g_{i+1} = (g_i - f_i) / span_i for each old f_i."""
    rows: list[tuple[float, ...]] = [(1.0,)]
    for f, span in zip(old, spans, strict=False):
        pairs = zip_longest(rows[-1], (0.0, *f), fillvalue=0.0)
        rows.append(tuple((g - earlier) / span for g, earlier in pairs))
    return tuple(rows)


def output_weights(weights: Sequence[float], differences: Coefficients) -> list[float]:
    """What each kept output counts where each difference counts `weights`."""
    counts = [0.0] * len(differences)
    for weight, row in zip(weights, differences, strict=True):
        for place, coefficient in enumerate(row):
            counts[place] += weight * coefficient
    return counts


def push(out: Any, old: Branch | None, keep: int) -> Branch:
    """The branch after a full evaluation that returned `out`, with at most `keep` outputs."""
    leaves, spec = tree_flatten(out)
    earlier: list[list[Tensor]] = [[] for _ in leaves] if old is None else old.outputs
    return Branch([[_kept(leaf), *kept][:keep] for leaf, kept in zip(leaves, earlier, strict=True)], spec)


def replace_latest(out: Any, old: Branch) -> Branch:
    """The branch after the evaluation that it knows best was made again: a newer value in the place of the latest."""
    leaves, spec = tree_flatten(out)
    return Branch([[_kept(leaf), *kept[1:]] for leaf, kept in zip(leaves, old.outputs, strict=True)], spec)


def _combined(outputs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i F_i, in float32 or more and rounded once to their type; a single output is returned as it is."""
    if len(outputs) == 1:
        return outputs[0]
    if len(outputs) == 2 or outputs[0].dtype.itemsize >= 4:
        return _interpolated(outputs, weights)
    out = outputs[0].float() * weights[0]
    for kept, weight in zip(outputs[1:], weights[1:], strict=True):
        out.add_(kept, alpha=weight)
    return out.to(outputs[0].dtype)


def _interpolated(outputs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The same as nested steps between two tensors, one pass over memory each.

    The least weight goes last: the others sum to at least a half, so scaling them to sum to 1 is harmless.
    """
    last = min(range(len(weights)), key=weights.__getitem__)
    rest = [
        (kept, weight) for i, (kept, weight) in enumerate(zip(outputs, weights, strict=True)) if i != last
    ]
    if len(rest) == 1:
        return torch.lerp(rest[0][0], outputs[last], weights[last])
    whole = 1 - weights[last]
    out = _interpolated([kept for kept, _ in rest], [weight / whole for _, weight in rest])
    return out.lerp_(outputs[last], weights[last])


def _kept(leaf: Tensor) -> Tensor:
    """Cut from autograd."""
    kept = leaf.detach()
    is_part = kept.untyped_storage().nbytes() > kept.nbytes
    return kept.clone() if is_part else kept  # a part would keep the whole alive


def geometry_of(call: Call) -> Geometry:
    return tuple((s.stream, s.grid, s.length, s.stage) for s in call.layout)


def feature_bytes(branches: Sequence[Site], tokens: Any, layout: Sequence[Segment]) -> int:
    """Memory of what all branches return, where a `tokens` site returned `tokens`.

    A branch that says its width returns that of each row of its stage and stream; one that does not, as much as the
    tokens of its stream. Under autocast that is in its type, even where positions made the tokens float32.
    """
    leaves = tree_leaves(getattr(tokens, "x", tokens))
    device, batch = leaves[0].device.type, len(leaves[0])
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else leaves[0].dtype
    alike = {} if all(site.width for site in branches) and layout else _values(tokens, layout)
    numbers = (
        alike[site.stream] if alike else batch * _rows(layout, site.stream, site.stage) * site.width
        for site in branches
    )
    return dtype.itemsize * sum(numbers)


def _rows(layout: Sequence[Segment], stream: str, stage: int) -> int:
    """Of a stage, those of its text, of all else ("image"), or all ("joint")."""
    inside = [segment for segment in layout if segment.stage == stage]
    return sum(s.length for s in inside if stream == "joint" or (s.stream == "text") == (stream == "text"))


def _values(tokens: Any, layout: Sequence[Segment]) -> Counter[str]:
    """Numbers in the tokens of each stream; "joint" is all."""
    x = getattr(tokens, "x", tokens)
    leaves = tree_leaves(x)
    whole = sum(leaf.numel() for leaf in leaves)
    if isinstance(x, Tensor):
        rows = sum(segment.length for segment in layout if segment.stream == "text")
        text = whole * rows // x.shape[1] if sum(s.length for s in layout) == x.shape[1] else 0
    else:
        text = x.text.numel()
    return Counter({"joint": whole, "text": text, "image": whole - text})


Axis = Literal["call", "sigma"]
Basis = Literal["taylor", "newton"]


@dataclass(frozen=True)
class TaylorSeer(Policy):
    """Compute one evaluation in `interval`, and forecast every branch in the others.

    A full evaluation at s, d after the full one before it, turns a branch's factors f into g_0 = F(s) and
    g_{i+1} = (g_i - f_i) / d. A skipped one, k after s, uses sum_i g_i k^i / i! with i up to `order`.

    Args:
        interval: evaluations from one full one to the next; 1 computes all of them.
        order: highest difference kept; 0 is plain reuse (FORA).
        warmup: evaluations at the start that are all full.
        axis: distances in evaluations ("call", the paper's) or in noise-time ("sigma").
        basis: "taylor" is the paper's series. "newton" is not: it extrapolates the polynomial through the
            latest `order + 1` full evaluations.
    """

    interval: Count = 4
    order: Natural = 2
    warmup: Count = 2
    axis: Axis = "call"
    basis: Basis = "taylor"

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(interval=3, order=1)

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return {"schedule": "own", **dict.fromkeys(named(sites, "branch"), "own")}

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Forecaster:
        if self.warmup > total:
            raise ConfigError(f"TaylorSeer: warmup={self.warmup}, expected at most total={total} evaluations")
        return Forecaster(self, [site for site in sites if site.kind == "branch"], total)

    def exact(self) -> TaylorSeer:
        return replace(self, interval=1)

    def is_full(self, step: int) -> bool:
        """Whether the schedule computes evaluation `step`, counted from the first one of its network."""
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0

    def full_steps(self, total: int) -> list[int]:
        """The evaluations of a trajectory of `total` that are computed."""
        return [step for step in range(total) if self.is_full(step)]

    def spans(self, place: float, anchors: Sequence[float]) -> list[float]:
        """Divisors of the differences taken at `place`, after full evaluations at `anchors`, latest first."""
        nearest = anchors[: self.order]
        return [place - (anchor if self.basis == "newton" else anchors[0]) for anchor in nearest]

    def weights(self, place: float, anchors: Sequence[float]) -> list[float]:
        """What each factor counts in a forecast at `place`; the first always counts 1."""
        weights = [1.0]
        for i in range(1, len(anchors)):
            last, by = (anchors[i - 1], 1) if self.basis == "newton" else (anchors[0], i)
            weights.append(weights[-1] * (place - last) / by)
        return weights


class Ladder(NamedTuple):
    """The factors of all branches of one lane, all of the same age."""

    first: int
    last: int
    """Indices of the first and the latest full evaluation."""
    anchors: tuple[float, ...]
    """Places of the full evaluations kept on the axis, latest first."""
    differences: Coefficients
    geometry: Geometry
    tokens: list[torch.Size]
    branches: dict[str, Branch]
    bytes: int


class Evaluation:
    """What one model call does at its branches: record their outputs, or forecast them from a ladder."""

    def __init__(self, call: Call, place: float, ladder: Ladder | None, weights: Sequence[float]) -> None:
        self.call, self.place, self.weights = call, place, weights
        self.known = None if ladder is None else ladder.branches
        self.expected = None if ladder is None else ladder.tokens
        self.tokens: list[torch.Size] = []
        self.outputs: dict[str, Any] = {}

    def branch(self, name: str, fn: Callable[..., Any], x: Any, *args: Any) -> Any:
        """The handler of branch `name`."""
        if not self.tokens:
            self.tokens = [t.shape for t in tree_leaves(x)]
            if self.tokens != self.expected:
                self.known = (
                    None  # another batch size: seen at the first branch, before anything was forecast
                )
        if self.known is None:
            out = self.outputs[name] = fn(x, *args)
            return out
        branch = self.known.get(name)
        if branch is None or branch.depth < len(self.weights):
            return fn(x, *args)  # met later than the others
        return branch.forecast(self.weights)


class Forecaster(Session):
    """A ladder for each (net, lane); a lane that is new, has another shape or was away is computed."""

    verb: ClassVar[str] = "forecast"

    def __init__(self, policy: TaylorSeer, branches: Sequence[Site], total: int) -> None:
        super().__init__()
        self.policy, self.branches = policy, branches
        self.most_factors = min(policy.order + 1, len(policy.full_steps(total)))

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.interval == 1:
            return {}  # nothing will be forecast, so nothing is recorded
        lane, place = (call.net, call.lane), self._place(call)
        ladder: Ladder | None = self.state.get(lane)
        if ladder is not None and self._is_full(call, ladder):
            ladder = None
        weights: Sequence[float] = ()
        if ladder is not None:
            weights = output_weights(self.policy.weights(place, ladder.anchors), ladder.differences)
        evaluation = Evaluation(call, place, ladder, weights)
        self.put(lane, evaluation)
        return {site.name: partial(evaluation.branch, site.name) for site in self.branches}

    def commit(self) -> None:
        """After a full evaluation, climb the lane's ladder."""
        for lane, evaluation in self.staged.items():
            if evaluation.outputs and evaluation.known is None:
                self.state[lane] = _climbed(self.policy, self.state.get(lane), evaluation)
        self.staged.clear()

    def bytes(self) -> int:
        return sum(ladder.bytes for ladder in self.state.values())

    def projected_bytes(self) -> int:
        """With all orders filled, for the lanes seen so far; each joins with a full evaluation."""
        return sum(ladder.bytes // len(ladder.anchors) * self.most_factors for ladder in self.state.values())

    def foreseen_bytes(self, call: Call, tokens: Any) -> int:
        """Before anything is kept: a branch returns as much as the tokens of its stream."""
        if self.policy.interval == 1 or self.state:
            return self.projected_bytes()  # a later lane may skip layers
        return feature_bytes(self.branches, tokens, call.layout) * self.most_factors

    def fitting(self, need: int, allowed: int) -> str:
        """The highest order that fits; each takes as much as the others."""
        factor = need // self.most_factors
        order = allowed // factor - 1
        return f"order={order} would fit" if order >= 0 else f"order=0 would hold {factor:,}"

    def _place(self, call: Call) -> float:
        if self.policy.axis == "call":
            return call.index
        if isnan(call.t):
            raise ConfigError(
                "TaylorSeer: axis='sigma' expected one noise-time a call, got t=nan (one a token)"
            )
        return call.t

    def _is_full(self, call: Call, ladder: Ladder) -> bool:
        # One counter a network, shared by its lanes: a lane that joins late keeps step with the others.
        origin = min(other.first for lane, other in self.state.items() if lane[0] == call.net)
        away = not 0 <= call.index - ladder.last < self.policy.interval
        return away or ladder.geometry != geometry_of(call) or self.policy.is_full(call.index - origin)


def _climbed(policy: TaylorSeer, old: Ladder | None, evaluation: Evaluation) -> Ladder:
    """The ladder one full evaluation later."""
    call, place, geometry = evaluation.call, evaluation.place, geometry_of(evaluation.call)
    first = call.index if old is None else old.first
    if old is not None and (old.geometry != geometry or old.tokens != evaluation.tokens):
        old = None
    anchors, differences = ((), ()) if old is None else (old.anchors, old.differences)
    earlier = {} if old is None else old.branches
    if anchors[:1] == (place,):  # Heun visits a noise-time twice
        known = {name: out for name, out in evaluation.outputs.items() if name in earlier}
        branches = {name: replace_latest(out, earlier[name]) for name, out in known.items()}
    else:
        differences = update_coefficients(differences, policy.spans(place, anchors))
        anchors = (place, *anchors)[: len(differences)]
        keep = len(anchors)
        branches = {name: push(out, earlier.get(name), keep) for name, out in evaluation.outputs.items()}
    held = sum(branch.bytes for branch in branches.values())
    return Ladder(first, call.index, anchors, differences, geometry, evaluation.tokens, branches, held)
