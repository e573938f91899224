"""Attention of a node over its edges: softmax over segments of a sorted list (DyG2Vec's layer, arXiv 2210.16906).

E edges sorted by receiver, S rows that receive, N heads, K head width, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditkit.core.errors import ShapeError


def segment_sum(x: Tensor, receiver: Tensor, rows: int) -> Tensor:
    """Add x [E, ...] up over the edges of each receiver, [rows, ...]; on every device in a fixed order."""
    return (sorted_sum if x.device.type == "cuda" else scattered_sum)(x, receiver, rows)


def scattered_sum(x: Tensor, receiver: Tensor, rows: int) -> Tensor:
    """Add one edge after the other: the faster `segment_sum` on a CPU; on a GPU its atomics add in any order."""
    return x.new_zeros(rows, *x.shape[1:]).index_add(0, receiver, x)


def sorted_sum(x: Tensor, receiver: Tensor, rows: int) -> Tensor:
    """Add segments of the sorted list: `segment_sum` without atomics."""
    lengths = torch.bincount(receiver, minlength=rows)
    return torch.segment_reduce(x.contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)


def segment_softmax(scores_EN: Tensor, receiver: Tensor, rows: int) -> Tensor:
    """Take the softmax of scores [E, N] over the edges of each receiver; the largest is taken off first."""
    with torch.no_grad():
        index = receiver[:, None].expand_as(scores_EN)
        highest = scores_EN.new_zeros(rows, scores_EN.shape[1])
        highest = highest.scatter_reduce(0, index, scores_EN, "amax", include_self=False)
    weight = (scores_EN - highest[receiver]).exp()
    return weight / segment_sum(weight, receiver, rows)[receiver]


def edge_attention(q_SNK: Tensor, k_ENK: Tensor, v_ENK: Tensor, receiver: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v over the edges of each row, [S, N, K]; zero for a row without edges.

    Args:
        receiver: [E] row of each edge, sorted.
    """
    scores_EN = (q_SNK[receiver] * k_ENK).sum(-1) * q_SNK.shape[-1] ** -0.5
    weight = segment_softmax(scores_EN, receiver, len(q_SNK))
    return segment_sum(weight[..., None] * v_ENK, receiver, len(q_SNK))


class EdgeAttention(nn.Module):
    """One DyG2Vec layer: relu(h_u + sum_j softmax(q_u k_j) v_j), where k_j, v_j = W [h_j | e_uj].

    W is kept as its two halves, so that what a node says is computed once a token and not once an edge.
    """

    def __init__(self, width: int, heads: int) -> None:
        if width % heads:
            raise ShapeError(f"EdgeAttention: width={width} does not divide into heads={heads}")
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.node = nn.Linear(width, 2 * width, bias=False)
        self.edge = nn.Linear(width, 2 * width)

    def forward(self, h_SD: Tensor, e_ED: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """Gather over the edges of each token [S, D], with their tokens [E, D]: the branch beside the skip."""
        q_SNK = self.q(h_SD).unflatten(-1, (self.heads, -1))
        kv_END = self.node(h_SD)[sender] + self.edge(e_ED)
        k_ENK, v_ENK = kv_END.unflatten(-1, (2, self.heads, -1)).unbind(1)
        return edge_attention(q_SNK, k_ENK, v_ENK, receiver).flatten(1)
