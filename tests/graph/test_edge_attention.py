"""Softmax over the edges of a node against a dense masked softmax."""

from __future__ import annotations

import pytest
import torch

from ditkit.nn.edge_attention import edge_attention, segment_softmax

NODES = 6
RECEIVER = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5])
SENDER = torch.tensor([1, 4, 0, 2, 3, 1, 1, 4, 0, 3, 5])


def dense(q, k, v):
    """The same edges as a masked matrix [nodes, edges]: softmax(q k^T / sqrt(K)) v."""
    mask = RECEIVER[None] == torch.arange(NODES)[:, None]
    scores = torch.einsum("snk,enk->nse", q, k) / k.shape[-1] ** 0.5
    weight = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("nse,enk->snk", weight, v)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_edge_attention_is_a_dense_masked_softmax_and_so_are_its_gradients(scale):
    q, k, v = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (NODES, len(RECEIVER), len(RECEIVER)))
    given = [(scale * x).requires_grad_() for x in (q, k, v)]
    ours, twin = edge_attention(*given, RECEIVER), dense(*given)
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((twin * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_duplicate_edges_count_twice():
    scores = torch.zeros(3, 1)
    assert segment_softmax(scores, torch.tensor([0, 0, 0]), 1).flatten().tolist() == pytest.approx(
        [1 / 3] * 3
    )
    q, v = torch.zeros(1, 1, 1), torch.tensor([[[1.0]], [[1.0]], [[4.0]]])
    assert edge_attention(
        q, torch.zeros(3, 1, 1), v, torch.zeros(3, dtype=torch.long)
    ).item() == pytest.approx(2.0)


def test_a_row_without_edges_is_zero_and_not_nan():
    out = edge_attention(
        torch.randn(3, 1, 2), torch.randn(2, 1, 2), torch.randn(2, 1, 2), torch.tensor([0, 2])
    )
    assert out.isfinite().all() and not out[1].any()


def test_the_sorted_sum_equals_the_scattered_one():
    from ditkit.nn.edge_attention import scattered_sum, sorted_sum

    x = torch.randn(len(RECEIVER), 2, 3, dtype=torch.float64, requires_grad=True)
    one, two = scattered_sum(x, RECEIVER, NODES + 1), sorted_sum(x, RECEIVER, NODES + 1)
    torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-14)
    w = torch.randn_like(one)
    (a,), (b,) = (torch.autograd.grad((y * w).sum(), x) for y in (one, two))
    assert torch.equal(a, b)
