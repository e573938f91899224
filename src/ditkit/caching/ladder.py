"""Forecasts from what full evaluations returned (TaylorSeer, arXiv 2503.06923), as weighted sums of it.

A forecast is linear in the outputs of the latest full evaluations, so these are kept as the model made them: nothing
is computed when they are recorded, nothing is lost to their type, and differences exist as coefficients only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call

Geometry = tuple[tuple[str, Grid, int], ...]
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


def climbed(old: Coefficients, spans: Sequence[float]) -> Coefficients:
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


def recorded(out: Any, old: Branch | None, keep: int) -> Branch:
    """The branch after a full evaluation that returned `out`, with at most `keep` outputs."""
    leaves, spec = tree_flatten(out)
    earlier: list[list[Tensor]] = [[] for _ in leaves] if old is None else old.outputs
    return Branch([[_kept(leaf), *kept][:keep] for leaf, kept in zip(leaves, earlier, strict=True)], spec)


def renewed(out: Any, old: Branch) -> Branch:
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
    return tuple((segment.stream, segment.grid, segment.length) for segment in call.layout)


def feature_bytes(tokens: Any, layout: Sequence[Segment]) -> Counter[str]:
    """Memory of the tokens of each stream, as layers return them, of what a `tokens` site returned; "joint" is all.

    Under autocast that is in its type, even where positions made the tokens themselves float32.
    """
    x = getattr(tokens, "x", tokens)
    leaves = tree_leaves(x)
    whole = sum(leaf.numel() for leaf in leaves)
    if isinstance(x, Tensor):
        rows = sum(segment.length for segment in layout if segment.stream == "text")
        text = whole * rows // x.shape[1] if sum(s.length for s in layout) == x.shape[1] else 0
    else:
        text = x.text.numel()
    device = leaves[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else leaves[0].dtype
    counts = {"joint": whole, "text": text, "image": whole - text}
    return Counter({stream: dtype.itemsize * count for stream, count in counts.items()})
