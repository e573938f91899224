"""adaLN-Zero (DiT, section 3.2): each branch's shift, scale and gate, projected from c where they are used.

One layer makes six parts: shift, scale and gate of a block's attention, then of its MLP.

B batch, L tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part; shift and scale [B, 1, D]."""
    return x_BLD * (1 + scale) + shift


def activated(c_BD: Tensor) -> Tensor:
    """silu(c), [B, 1, D]: what is projected."""
    return F.silu(c_BD).unsqueeze(1)


def affine(layer: nn.Module, c_B1D: Tensor, branch: int) -> tuple[Tensor, ...]:
    """Shift and scale of a block's branch 0 or 1, [B, 1, D] each."""
    return _parts(layer, c_B1D, 3 * branch, 3 * branch + 2).chunk(2, -1)


def gate(layer: nn.Module, c_B1D: Tensor, branch: int) -> Tensor:
    """The gate of a block's branch 0 or 1, [B, 1, D]."""
    return _parts(layer, c_B1D, 3 * branch + 2, 3 * branch + 3)


def _parts(layer: nn.Module, c_B1D: Tensor, start: int, stop: int) -> Tensor:
    """Only these of the six that `layer` projects, side by side; all where it is wrapped, quantised or hooked.

    A branch that is forecast never asks for its shift and scale, whose weights are most of what its step would read.
    """
    width = c_B1D.shape[-1]
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooks:
        rows = slice(start * width, stop * width)
        return F.linear(c_B1D, layer.weight[rows], layer.bias[rows])
    return layer(c_B1D)[..., start * width : stop * width]
