"""Linear layers chosen for each sample, as one operation of torch that computes the chosen ones only.

Samples are gathered by layer, so how many each takes only data say. Inside one operation that breaks no graph of
torch's compiler. Where all samples have one choice and one gate, as those of a sampler's step have, their layers are
merged first, W = sum_j gate_j W_j: one product instead of k.

B batch, L tokens, D width, E width of the output, M layers, k chosen of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("ditkit::routed_linear", mutates_args=())
def routed_linear(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """Compute y_b = sum_j gate_bj (x_b W_e + a_e), e = index_bj, [B, L, E]; differentiable in all but the index.

    Args:
        x: [B, L, D]. weight: [M, D, E]. bias: [M, E]. gate, index: [B, k], different layers in a row.
    """
    with torch.autocast(x.device.type, enabled=False):
        if _is_one_choice(gate, index):
            merged = (gate[0] @ weight[index[0]].flatten(1)).view(weight.shape[1:])
            return x @ merged + gate[0] @ bias[index[0]]
        out = x.new_zeros(*x.shape[:2], weight.shape[2])
        for e, rows, g in _by_layer(gate, index, len(weight)):
            # a product a sample: its bits are not those of how many others are gathered with it
            out.index_add_(0, rows, g * (torch.bmm(x[rows], weight[e].expand(len(rows), -1, -1)) + bias[e]))
        return out


@torch.library.custom_op("ditkit::routed_linear_backward", mutates_args=())
def routed_linear_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and gate; those of a layer that nobody chose are 0."""
    d_x, d_weight, d_bias, d_gate = (torch.zeros_like(v) for v in (x, weight, bias, gate))
    with torch.autocast(x.device.type, enabled=False):
        for e, rows, g in _by_layer(gate, index, len(weight)):
            d, own = d_out[rows], x[rows]
            back = torch.bmm(d, weight[e].mT.expand(len(rows), -1, -1))
            d_x.index_add_(0, rows, g * back)
            d_weight[e] = (g * own).flatten(0, 1).mT @ d.flatten(0, 1)
            of_rows = d.sum(1)
            d_bias[e] = (g[:, 0] * of_rows).sum(0)
            slots = (index[rows] == e).to(gate.dtype)
            d_gate[rows] += slots * ((back * own).sum((1, 2)) + of_rows @ bias[e])[:, None]
    return d_x, d_weight, d_bias, d_gate


def _by_layer(gate: Tensor, index: Tensor, layers: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each layer that was chosen, the samples that chose it, [n], and their gates, [n, 1, 1]."""
    for e in range(layers):
        rows, slots = (index == e).nonzero(as_tuple=True)
        if len(rows):
            yield e, rows, gate[rows, slots, None, None]


def _is_one_choice(gate: Tensor, index: Tensor) -> bool:
    """Return whether all samples have the same choice and gates."""
    return len(gate) == 1 or (
        torch.equal(index, index[:1].expand_as(index)) and bool((gate == gate[:1]).all())
    )


@routed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[2])


@routed_linear_backward.register_fake
def _(d_out: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(v) for v in given[:4])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *routed_linear_backward(d_out.contiguous(), *ctx.saved_tensors), None


routed_linear.register_autograd(_backward, setup_context=_keep)


def forward_macs(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, index: Tensor, *, out_val: Tensor
) -> int:
    """Count the MACs of `routed_linear`; on the meta device, which holds no choice, those of k products."""
    layer = weight[0].numel()
    if not index.is_meta and _is_one_choice(gate, index):
        return layer * (x.shape[0] * x.shape[1] + index.shape[1])
    return layer * x.shape[0] * x.shape[1] * index.shape[1]


def backward_macs(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, index: Tensor, *, out_val: Any
) -> int:
    """Count the MACs of `routed_linear_backward`: two products for each that was chosen."""
    return 2 * weight[0].numel() * x.shape[0] * x.shape[1] * index.shape[1]
