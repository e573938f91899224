"""Patches of a window of events: tokens, edges and structural counts, before any network (Todyformer, 2402.05944).

E events of a window, M patches, N nodes of the window, S tokens (a node in a patch), D width.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ditkit.core.errors import DataError, ShapeError

COUNTS = 3
"""Structural counts of an edge: events of the receiver, events of the sender, common neighbours."""


class Patches(NamedTuple):
    """A window of events cut into patches of equal counts, as one disjoint graph of tokens.

    Tokens are sorted by node, then by patch; edges by their receiver, then by event. Every event is two edges.

    Args:
        nodes: [N] ids of the window's nodes, ascending.
        node, patch: [S] of each token, its row of `nodes` and its patch.
        receiver, sender: [2 E] tokens. event: [2 E], the event of each edge.
        age: [E] seconds from each event to the window's last one. features: [E, F].
        structure: [2 E, COUNTS], counted in the edge's own patch.
        stamp: [M] age of each patch's latest event.
        last: [N] each node's token in its last patch.
        node_features: [N, F], of the window's nodes.
    """

    nodes: Tensor
    node: Tensor
    patch: Tensor
    receiver: Tensor
    sender: Tensor
    event: Tensor
    age: Tensor
    features: Tensor
    structure: Tensor
    stamp: Tensor
    last: Tensor
    node_features: Tensor

    @property
    def length(self) -> int:
        """Patches of the window, M: how long the sequence of a node is."""
        return len(self.stamp)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to `device`, floating-point tensors in `dtype`."""
        return type(self)(*(v.to(device, dtype if v.is_floating_point() else None) for v in self))

    @property
    def slot(self) -> Tensor:
        """[S] index of each token in the packed layout, with nodes and patches flattened."""
        return self.node * self.length + self.patch

    def present(self) -> Tensor:
        """Return [N, M] bool, true where a node occurs in a patch."""
        empty = torch.zeros(len(self.nodes) * self.length, dtype=torch.bool, device=self.node.device)
        return empty.index_fill(0, self.slot, True).view(len(self.nodes), self.length)

    def pack(self, x: Tensor) -> Tensor:
        """Put tokens [S, D] into sequences of the nodes, [N, M, D], zero in padded slots."""
        empty = x.new_zeros(len(self.nodes) * self.length, x.shape[-1])
        return empty.index_copy(0, self.slot, x).view(len(self.nodes), self.length, -1)

    def unpack(self, x: Tensor) -> Tensor:
        """Undo `pack`: [N, M, D] to [S, D]."""
        return x.flatten(0, 1).index_select(0, self.slot)

    def row_of(self, ids: Tensor) -> Tensor:
        """Find the rows of `nodes` for ids of any shape; N, one past the last, for a node outside of the window."""
        row = torch.searchsorted(self.nodes, ids.contiguous()).clamp_max(len(self.nodes) - 1)
        return torch.where(self.nodes[row] == ids, row, len(self.nodes))


def patchify(
    source: Tensor,
    destination: Tensor,
    age: Tensor,
    features: Tensor,
    node_features: Tensor,
    count: int,
    neighbours: int = 0,
) -> Patches:
    """Cut a window of E events, which stand in the order of time, into `count` patches of ceil(E / count) events.

    The last patch may be shorter; where E is hardly more than `count`, there may be fewer patches.

    Args:
        source, destination: [E] node ids. age: [E] float32. features: [E, F].
        node_features: [all nodes, F]; those of the window's nodes are taken.
        neighbours: of each token only the edges of the most recent events are kept; 0 for all.

    Raises:
        DataError: fewer events than patches.
        ShapeError: lengths that differ.
    """
    events = len(source)
    if not len(destination) == len(age) == len(features) == events:
        lengths = [len(v) for v in (source, destination, age, features)]
        raise ShapeError(
            f"patchify: source, destination, age and features have lengths {lengths}, expected one"
        )
    if events < count:
        raise DataError(f"a window of {events} events, expected at least {count}, one a patch")
    size = -(-events // count)
    count = -(-events // size)
    patch = torch.arange(events, device=source.device) // size
    nodes, ends = torch.unique(torch.stack([source, destination]), return_inverse=True)
    slots, tokens = torch.unique(ends * count + patch, return_inverse=True)
    receiver, sender = torch.cat([tokens[0], tokens[1]]), torch.cat([tokens[1], tokens[0]])
    event = torch.arange(events, device=source.device).repeat(2)
    order = torch.argsort(receiver * events + event, stable=True)
    receiver, sender, event = receiver[order], sender[order], event[order]
    structure = structural_counts(receiver, sender, len(slots))
    if neighbours:
        recent = _from_the_end(receiver, len(slots)) < neighbours
        receiver, sender, event, structure = (v[recent] for v in (receiver, sender, event, structure))
    node = slots // count
    return Patches(
        nodes=nodes,
        node=node,
        patch=slots % count,
        receiver=receiver,
        sender=sender,
        event=event,
        age=age,
        features=features,
        structure=structure,
        stamp=age[torch.arange(1, count + 1, device=age.device).mul(size).clamp_max(events) - 1],
        last=torch.bincount(node, minlength=len(nodes)).cumsum(0) - 1,
        node_features=node_features[nodes],
    )


def structural_counts(receiver: Tensor, sender: Tensor, tokens: int) -> Tensor:
    """Count, for each edge [E], events of the receiver, of the sender, and common neighbours: float32 [E, COUNTS].

    `receiver` is sorted, and every edge is there in both directions.
    """
    degree = torch.bincount(receiver, minlength=tokens)
    pairs, edge = torch.unique(receiver * tokens + sender, return_inverse=True)
    common = _common_neighbours(pairs, tokens)[edge]
    return torch.stack([degree[receiver], degree[sender], common], 1).float()


def _common_neighbours(pairs: Tensor, tokens: int) -> Tensor:
    """Count common neighbours [P] of the two ends of each pair u * tokens + v, sorted, in both directions.

    Every neighbour w of the end with fewer neighbours is looked up beside the other end: sum of min(degree) steps.
    """
    u, v = pairs // tokens, pairs % tokens
    degree = torch.bincount(u, minlength=tokens)
    first = degree.cumsum(0) - degree
    fewer, other = torch.where(degree[u] <= degree[v], u, v), torch.where(degree[u] <= degree[v], v, u)
    steps = degree[fewer]
    pair = torch.repeat_interleave(torch.arange(len(pairs), device=pairs.device), steps)
    nth = torch.arange(len(pair), device=pairs.device) - (steps.cumsum(0) - steps)[pair]
    key = other[pair] * tokens + v[first[fewer[pair]] + nth]
    found = pairs[torch.searchsorted(pairs, key).clamp_max(len(pairs) - 1)] == key
    return torch.bincount(pair[found], minlength=len(pairs))


def _from_the_end(receiver: Tensor, tokens: int) -> Tensor:
    """Count, for each edge [E], the later ones of the same receiver; `receiver` is sorted."""
    stop = torch.bincount(receiver, minlength=tokens).cumsum(0)
    return stop[receiver] - 1 - torch.arange(len(receiver), device=receiver.device)
