"""Caches of branches: computed in some evaluations, predicted in the others as weighted sums of what these returned.

A prediction is linear in the outputs of the latest computed evaluations, so these are kept as the model made them:
nothing is computed when they are recorded, and nothing is lost to their type.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named

Geometry = tuple[tuple[str, Grid, int, int], ...]
"""Stream, grid and length of each segment: what must not change between the anchors of a forecast."""


@dataclass(frozen=True)
class BranchCache(Policy):
    """Base of caches that compute every branch in some evaluations and predict it in the others.

    A subclass says in `decide` which evaluations are computed; with that alone, the others reuse the latest output.
    """

    kept: ClassVar[int] = 1
    """Outputs of each branch that are kept at most."""

    @abstractmethod
    def decide(self, step: int) -> bool:
        """Return whether evaluation `step`, counted from the first one of its network, is computed."""

    def predict(self, place: float, anchors: Sequence[float]) -> Sequence[float]:
        """Weight the kept outputs at `place`, of computed evaluations at `anchors`, latest first; the sum is 1."""
        return (1.0,)

    def place(self, call: Call) -> float:
        """Return the coordinate of an evaluation in `predict`."""
        return call.index

    def keep(self, step: int) -> int:
        """Return how many outputs of each branch are kept at most after computed evaluation `step`, as in `decide`."""
        return self.kept

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return {"schedule": "own", **dict.fromkeys(named(sites, "branch"), "own")}

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Cached:
        return Cached(self, sites, total)

    def full_steps(self, total: int) -> list[int]:
        """List the evaluations of a trajectory of `total` that are computed."""
        return [step for step in range(total) if self.decide(step)]


class Branch(NamedTuple):
    """The outputs of a branch in its latest full evaluations, latest first: a list for each tensor of its output."""

    outputs: list[list[Tensor]]
    spec: TreeSpec

    def forecast(self, weights: Sequence[float]) -> Any:
        """Forecast the branch's output; `weights` of its outputs, which sum to 1."""
        leaves = [_combined(kept, weights) for kept in self.outputs]
        return leaves[0] if self.spec.is_leaf() else tree_unflatten(leaves, self.spec)

    @property
    def depth(self) -> int:
        return len(self.outputs[0])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for kept in self.outputs for t in kept)


def push(out: Any, old: Branch | None, keep: int) -> Branch:
    """Return the branch after a full evaluation that returned `out`, with at most `keep` outputs."""
    leaves, spec = tree_flatten(out)
    earlier: list[list[Tensor]] = [[] for _ in leaves] if old is None else old.outputs
    return Branch([[_kept(leaf), *kept][:keep] for leaf, kept in zip(leaves, earlier, strict=True)], spec)


def replace_latest(out: Any, old: Branch) -> Branch:
    """Return the branch with a newer value for its latest evaluation, which was made again."""
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
    """Forecast by nested steps between two tensors, one pass over memory each.

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
    """Foresee the memory of what all branches return, where a `tokens` site returned `tokens`.

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
    """Count the rows of a stage: those of its text, of all else ("image"), or all ("joint")."""
    inside = [segment for segment in layout if segment.stage == stage]
    return sum(s.length for s in inside if stream == "joint" or (s.stream == "text") == (stream == "text"))


def _values(tokens: Any, layout: Sequence[Segment]) -> Counter[str]:
    """Count the numbers in the tokens of each stream; "joint" is all."""
    x = getattr(tokens, "x", tokens)
    leaves = tree_leaves(x)
    whole = sum(leaf.numel() for leaf in leaves)
    if isinstance(x, Tensor):
        rows = sum(segment.length for segment in layout if segment.stream == "text")
        text = whole * rows // x.shape[1] if sum(s.length for s in layout) == x.shape[1] else 0
    else:
        text = x.text.numel()
    return Counter({"joint": whole, "text": text, "image": whole - text})


class Lane(NamedTuple):
    """The outputs kept of all branches of one lane, all of the same age."""

    first: int
    last: int
    """Indices of the first and the latest computed evaluation."""
    anchors: tuple[float, ...]
    """Places of the computed evaluations kept, latest first."""
    geometry: Geometry
    tokens: list[torch.Size]
    branches: dict[str, Branch]
    bytes: int


class Evaluation:
    """The work of one model call at its branches: record outputs, or predict them from what its lane keeps."""

    def __init__(self, call: Call, place: float, lane: Lane | None, weights: Sequence[float]) -> None:
        self.call, self.place, self.weights = call, place, weights
        self.known = None if lane is None else lane.branches
        self.expected = None if lane is None else lane.tokens
        self.tokens: list[torch.Size] = []
        self.outputs: dict[str, Any] = {}

    def branch(self, name: str, fn: Callable[..., Any], x: Any, *args: Any) -> Any:
        """Handle branch `name`."""
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


class Cached(Session):
    """The state of each (net, lane); a lane that is new, has another shape or was away is computed."""

    verb: ClassVar[str] = "reused"

    def __init__(self, policy: BranchCache, sites: Sequence[Site], total: int) -> None:
        super().__init__()
        self.policy, self.branches = policy, [site for site in sites if site.kind == "branch"]
        self.is_neutral = policy == policy.exact()
        self.most_kept = most_kept(policy, total)

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.is_neutral:
            return {}  # nothing will be predicted, so nothing is recorded
        key, place = (call.net, call.lane), self.policy.place(call)
        lane: Lane | None = self.state.get(key)
        if lane is not None and self._is_computed(call, lane):
            lane = None
        weights = () if lane is None else self.policy.predict(place, lane.anchors)
        evaluation = Evaluation(call, place, lane, weights)
        self.put(key, evaluation)
        return {site.name: partial(evaluation.branch, site.name) for site in self.branches}

    def commit(self) -> None:
        """After a computed evaluation, record the lane's outputs."""
        for key, evaluation in self.staged.items():
            if evaluation.outputs and evaluation.known is None:
                keep = self.policy.keep(evaluation.call.index - self._origin(evaluation.call))
                self.state[key] = record(keep, self.state.get(key), evaluation)
        self.staged.clear()

    def bytes(self) -> int:
        return sum(lane.bytes for lane in self.state.values())

    def projected_bytes(self) -> int:
        """With all outputs that will be kept, for the lanes so far; each joins with a computed evaluation."""
        return sum(lane.bytes // len(lane.anchors) * self.most_kept for lane in self.state.values())

    def foreseen_bytes(self, call: Call, tokens: Any) -> int:
        """Before anything is kept: a branch returns as much as the tokens of its stream."""
        if self.is_neutral or self.state:
            return self.projected_bytes()  # a later lane may skip layers
        return feature_bytes(self.branches, tokens, call.layout) * self.most_kept

    def _is_computed(self, call: Call, lane: Lane) -> bool:
        origin = self._origin(call)
        since = range(
            min(lane.last + 1, call.index), call.index + 1
        )  # with what a lane that was away has missed
        away = call.index < lane.last or any(self.policy.decide(index - origin) for index in since)
        return away or lane.geometry != geometry_of(call)

    def _origin(self, call: Call) -> int:
        """Return the first evaluation of the network: a lane that joins late keeps step with the others."""
        return min((lane.first for key, lane in self.state.items() if key[0] == call.net), default=call.index)


def most_kept(policy: BranchCache, total: int) -> int:
    """Return the most outputs of a branch that are kept at once in a trajectory of `total` evaluations."""
    kept = most = 0
    for step in policy.full_steps(total):
        kept = min(kept + 1, policy.keep(step))
        most = max(most, kept)
    return most


def record(keep: int, old: Lane | None, evaluation: Evaluation) -> Lane:
    """Return the lane one computed evaluation later, with at most `keep` outputs of each branch."""
    call, place, geometry = evaluation.call, evaluation.place, geometry_of(evaluation.call)
    first = call.index if old is None else old.first
    if old is not None and (old.geometry != geometry or old.tokens != evaluation.tokens):
        old = None
    anchors = () if old is None else old.anchors
    earlier = {} if old is None else old.branches
    if anchors[:1] == (place,):  # Heun visits a noise-time twice
        known = {name: out for name, out in evaluation.outputs.items() if name in earlier}
        branches = {name: replace_latest(out, earlier[name]) for name, out in known.items()}
    else:
        anchors = (place, *anchors)[:keep]
        branches = {
            name: push(out, earlier.get(name), len(anchors)) for name, out in evaluation.outputs.items()
        }
    held = sum(branch.bytes for branch in branches.values())
    return Lane(first, call.index, anchors, geometry, evaluation.tokens, branches, held)
