"""Routes: which heads, channel groups and rows a branch computes, asked at its `choice` site.

A branch of two layers (queries, keys and values, then the output; or the two of an MLP) has groups between them: heads,
or equal parts of its hidden channels. What is sliced is not computed; what is masked is, and multiplied.

B batch, L rows, N groups, D width, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.run import Site


class Update(NamedTuple):
    """A low-rank update of a layer: W + up down.

    Args:
        down: [r, in]. up: [1, out, r] of all samples, or [B, out, r] of each.
    """

    down: Tensor
    up: Tensor

    def added(self, x: Tensor) -> Tensor:
        """Compute up (down x) of x [B, L, in], apart from the layer."""
        low = F.linear(x, self.down)
        return F.linear(low, self.up[0]) if len(self.up) == 1 else low @ self.up.mT


class Route(NamedTuple):
    """The part of a branch that is computed; None in a place: all of it.

    Args:
        of: the number N of groups; heads say it themselves.
        groups: int64 [n], those computed, the same for all samples. rows: int64, those of the flattened B L.
        group_mask: [B, N] and row_mask: [B, L, 1], of zeros and ones that multiply, with gradients.
        first, second: updates of the two layers.
    """

    of: int = 1
    groups: Tensor | None = None
    rows: Tensor | None = None
    group_mask: Tensor | None = None
    row_mask: Tensor | None = None
    first: Update | None = None
    second: Update | None = None

    @property
    def is_whole(self) -> bool:
        """Return whether all of the branch is computed as it is."""
        return all(part is None for part in self[1:])


def everything(x: Tensor, first: nn.Module, second: nn.Module) -> Route | None:
    """Compute all of a branch of x [B, L, D] with its two layers: the function of a `choice` site."""
    return None


def into_groups(layer: nn.Linear, x: Tensor, route: Route, parts: int, groups: int) -> Tensor:
    """Compute the first layer, [..., in] to [..., parts, n, out / parts / groups]: the n groups of the route."""
    shape = (parts, groups, layer.out_features // (parts * groups))
    if not is_plain(layer):
        out = layer(x) if route.first is None else layer(x) + route.first.added(x)
        out = out.unflatten(-1, shape)
        return out if route.groups is None else out.index_select(-2, route.groups)
    weight, apart = _merged(layer, route.first)
    bias: Tensor | None = layer.bias
    if route.groups is not None:
        weight = weight.unflatten(0, shape).index_select(1, route.groups).flatten(0, 2)
        bias = None if bias is None else bias.view(shape).index_select(1, route.groups).flatten()
        shape = (parts, len(route.groups), shape[2])
    out = F.linear(x, weight, bias).unflatten(-1, shape)
    if apart is None:
        return out
    added = apart.added(x).unflatten(-1, (parts, groups, -1))
    return out + (added if route.groups is None else added.index_select(-2, route.groups))


def out_of_groups(layer: nn.Linear, h: Tensor, route: Route, groups: int) -> Tensor:
    """Compute the second layer, [..., n in / groups] to [..., out], from the n groups of the route."""
    chosen, each = route.groups, layer.in_features // groups
    if chosen is not None and not is_plain(layer):
        whole = h.new_zeros(*h.shape[:-1], groups, each)
        h = whole.index_copy(-2, chosen, h.unflatten(-1, (len(chosen), each))).flatten(-2)
    if not is_plain(layer):
        return layer(h) if route.second is None else layer(h) + route.second.added(h)
    weight, apart = _merged(layer, route.second)
    if chosen is not None:
        weight = weight.unflatten(1, (groups, each)).index_select(1, chosen).flatten(1)
    out = F.linear(h, weight, layer.bias)
    return out if apart is None else out + apart.added(h)


def masked(h: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply h [B, ..., N, K] by a mask [B, N] of its groups."""
    if mask is None:
        return h
    return h * mask.to(h.dtype).view(len(h), *[1] * (h.ndim - 3), -1, 1)


def _merged(layer: nn.Linear, update: Update | None) -> tuple[Tensor, Update | None]:
    """Return a layer's weight, with an update that all samples share; and one that they do not, apart."""
    if update is None or len(update.up) > 1:
        return layer.weight, update
    return layer.weight + update.up[0] @ update.down, None


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer's tensors may be cut: it is not wrapped, quantised or hooked."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooked


class Routed(NamedTuple):
    """The `choice` sites of a block's attention and MLP, and the channels inside the MLP."""

    attn: Site
    mlp: Site
    hidden: int

    @property
    def width(self) -> int:
        return self.attn.width

    @property
    def heads(self) -> int:
        return self.attn.heads

    def parts(self, tokens: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """MACs of attention and of MLP of a sample, each those of its first layer, inside, and of its second."""
        L, D = tokens, self.width
        return (3 * L * D**2, 2 * L**2 * D, L * D**2), (L * D * self.hidden, 0, L * D * self.hidden)

    def work(self, tokens: int) -> tuple[int, int]:
        """MACs of attention and MLP of a sample: 4 L D^2 + 2 L^2 D, and 2 L D times the hidden channels."""
        attn, mlp = self.parts(tokens)
        return sum(attn), sum(mlp)


def routed_blocks(sites: Sequence[Site]) -> list[Routed]:
    """Pair the routes of an attention and of the MLP after it, with the channels of its `inner` site."""
    found: list[Routed] = []
    attn: Site | None = None
    mlp: Site | None = None
    for site in sites:
        if site.kind == "choice":
            attn, mlp = (site, None) if site.heads else (attn, site)
        elif site.kind == "inner" and attn is not None and mlp is not None:
            found.append(Routed(attn, mlp, site.width))
            attn = mlp = None
    return found
