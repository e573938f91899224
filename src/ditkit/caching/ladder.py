"""Differences of what full evaluations returned, and forecasts from them (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ditkit.core.grid import Grid
from ditkit.core.run import Call

Geometry = tuple[tuple[str, Grid, int], ...]
"""Stream, grid and length of each segment: what must not change between the anchors of a forecast."""


class Branch(NamedTuple):
    """The factors of one branch: a list for each tensor of its output, all float32."""

    factors: list[list[Tensor]]
    dtypes: list[torch.dtype]
    spec: TreeSpec

    def forecast(self, weights: Sequence[float]) -> Any:
        """What the branch would return, in its own dtype and structure."""
        leaves = [_combined(f, weights).to(dtype) for f, dtype in zip(self.factors, self.dtypes, strict=True)]
        return leaves[0] if self.spec.is_leaf() else tree_unflatten(leaves, self.spec)


def distances(scales: Sequence[float], spans: Sequence[float]) -> tuple[list[float], tuple[float, ...]]:
    """What old tensors count in the new differences, and the new scales.

    With g_i = s_i D_i and f_i = r_i E_i, g_{i+1} = (g_i - f_i) / d_i is s_i / d_i (D_i - r_i / s_i E_i).
    """
    ratios, fresh = [], [1.0]
    for scale, span in zip(scales, spans, strict=False):
        ratios.append(scale / fresh[-1])
        fresh.append(fresh[-1] / span)
    return ratios, tuple(fresh)


def scaled(weights: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Weights of the tensors kept, of those of the factors: a factor is its scale times its tensor."""
    return [weight * scale for weight, scale in zip(weights, scales, strict=True)]


def recorded(out: Any, old: Branch | None, ratios: Sequence[float] | None) -> Branch:
    """The branch's factors after a full evaluation that returned `out`."""
    leaves, spec = tree_flatten(out)
    earlier: list[list[Tensor]] = [[] for _ in leaves] if old is None else old.factors
    factors = [_differences(_kept(leaf), f, ratios) for leaf, f in zip(leaves, earlier, strict=True)]
    return Branch(factors, [leaf.dtype for leaf in leaves], spec)


def _differences(fresh: Tensor, earlier: Sequence[Tensor], ratios: Sequence[float] | None) -> list[Tensor]:
    """D_0 = `fresh`, D_{i+1} = D_i - ratio_i E_i for as many as there are; without ratios only D_0 is new.

    E_0 is a tensor that the model made, and others may hold it. The rest are the ladder's own: what comes after
    them takes their memory, unless a backward pass may want them yet.
    """
    if ratios is None:
        return [fresh, *earlier[1:]]
    factors = [fresh]
    for i, (f, ratio) in enumerate(zip(earlier, ratios, strict=False)):
        own = f if i and not torch.is_grad_enabled() else None
        factors.append(torch.sub(factors[-1], f, alpha=ratio, out=own))
    return factors


def _combined(factors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i f_i, where w_0 = 1; a single factor is returned as it is."""
    if len(factors) == 1:
        return factors[0]
    out = torch.add(factors[0], factors[1], alpha=weights[1])
    for f, weight in zip(factors[2:], weights[2:], strict=False):
        out.add_(f, alpha=weight)
    return out


def _kept(leaf: Tensor) -> Tensor:
    """Cut from autograd, in float32: digits that bfloat16 drops from a difference are then scaled by k^i."""
    kept = leaf.detach().float()
    is_part = kept.untyped_storage().nbytes() > kept.nbytes
    return kept.clone() if is_part else kept  # a part would keep the whole alive


def geometry_of(call: Call) -> Geometry:
    return tuple((segment.stream, segment.grid, segment.length) for segment in call.layout)
