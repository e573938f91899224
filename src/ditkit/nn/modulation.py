"""adaLN-Zero (DiT, section 3.2): each branch's shift, scale and gate, projected from c where they are used.

One layer makes six parts: shift, scale and gate of a block's attention, then of its MLP. Blocks of another number of
branches have three parts for each.

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


class Parts:
    """The function of a `modulation` site: a block's parts, each projected where it is asked for.

    A branch that is forecast never asks for its shift and scale, whose weights are most of what its step would read.

    Args:
        layer: [B, 1, D] to [B, 1, 6 D], or 3 D for each branch of the block. c: [B, 1, D].
    """

    __slots__ = ("_whole", "c", "layer")

    def __init__(self, layer: nn.Module, c: Tensor) -> None:
        self.layer, self.c = layer, c
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """All side by side, [B, 1, 6 D], computed once: what a handler of the site may return instead."""
        if self._whole is None:
            self._whole = self.layer(self.c)
        return self._whole


def affine(parts: Parts | Tensor, branch: int, branches: int = 2) -> tuple[Tensor, ...]:
    """Shift and scale of one of a block's branches, [B, 1, D] each."""
    return _some(parts, 3 * branch, 3 * branch + 2, 3 * branches).chunk(2, -1)


def gate(parts: Parts | Tensor, branch: int, branches: int = 2) -> Tensor:
    """Return the gate of one of a block's branches, [B, 1, D]."""
    return _some(parts, 3 * branch + 2, 3 * branch + 3, 3 * branches)


def _some(parts: Parts | Tensor, start: int, stop: int, count: int) -> Tensor:
    """Only these of `count` parts, side by side; of a layer that is wrapped, quantised or hooked all are projected."""
    if isinstance(parts, Tensor):
        width = parts.shape[-1] // count
        return parts[..., start * width : stop * width]
    layer, width = parts.layer, parts.c.shape[-1]
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooks:
        rows = slice(start * width, stop * width)
        return F.linear(parts.c, layer.weight[rows], layer.bias[rows])
    return parts.whole()[..., start * width : stop * width]
