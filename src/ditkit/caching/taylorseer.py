"""TaylorSeer: skipped branches are forecast from the differences of computed ones (arXiv 2503.06923).

A branch is kept as it is before its gate: gates, shifts and scales are always those of the current step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ditkit.caching.ladder import (
    Branch,
    Coefficients,
    Geometry,
    climbed,
    feature_bytes,
    geometry_of,
    output_weights,
    recorded,
    renewed,
)
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named

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

    interval: int = 4
    order: int = 2
    warmup: int = 2
    axis: Axis = "call"
    basis: Basis = "taylor"

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("order", 0), ("warmup", 1)):
            given = getattr(self, name)
            if type(given) is not int or given < least:
                raise ConfigError(f"TaylorSeer: {name}={given!r}, expected an integer of at least {least}")
        for name, choices in (("axis", get_args(Axis)), ("basis", get_args(Basis))):
            if getattr(self, name) not in choices:
                raise ConfigError("TaylorSeer: " + unknown(name, getattr(self, name), choices))

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
        sizes = feature_bytes(tokens, call.layout)
        return sum(sizes[site.stream] for site in self.branches) * self.most_factors

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
        branches = {name: renewed(out, earlier[name]) for name, out in known.items()}
    else:
        differences = climbed(differences, policy.spans(place, anchors))
        anchors = (place, *anchors)[: len(differences)]
        keep = len(anchors)
        branches = {name: recorded(out, earlier.get(name), keep) for name, out in evaluation.outputs.items()}
    held = sum(branch.bytes for branch in branches.values())
    return Ladder(first, call.index, anchors, differences, geometry, evaluation.tokens, branches, held)
