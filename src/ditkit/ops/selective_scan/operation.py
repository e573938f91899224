"""Kernels of the selective scan as one operation of torch: a single node for its compiler, autograd and counters."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("ditkit::selective_scan", mutates_args=())
def selective_scan_op(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    keep: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, K, L, D] in float32 or more, and the states that its backward pass reads, if `keep`."""
    with torch.autocast(x.device.type, enabled=False):
        return _module(kernel).forward(x, delta, A, B, C, D, bias, keep)


@torch.library.custom_op("ditkit::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    d_out: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    states: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven inputs."""
    with torch.autocast(x.device.type, enabled=False):
        return _module(kernel).backward(d_out, x, delta, A, B, C, D, bias, states)


@selective_scan_op.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide, keep = torch.promote_types(x.dtype, torch.float32), rest[-2]
    states = (*x.shape, A.shape[2]) if keep else (0,)
    return x.new_empty(x.shape, dtype=wide), x.new_empty(states, dtype=wide)


@selective_scan_backward.register_fake
def _(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(v.shape) for v in rest[:7])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *selective_scan_backward(d_out, *ctx.saved_tensors, ctx.kernel), None, None


selective_scan_op.register_autograd(_backward, setup_context=_keep)


def scan_macs(x: Tensor, delta: Tensor, A: Tensor, *_: Any, **__: Any) -> int:
    """Count 9 for each state of each token, as Mamba's own counters do, and 1 for D x."""
    return x.numel() * (9 * A.shape[-1] + 1)


def scan_backward_macs(d_out: Tensor, x: Tensor, delta: Tensor, A: Tensor, *_: Any, **__: Any) -> int:
    """Count the gradients as twice the scan."""
    return 2 * scan_macs(x, delta, A)


def _module(kernel: str) -> ModuleType:
    """Import the module of a kernel, with its `forward` and `backward`."""
    if kernel == "cpu":
        from ditkit.ops.selective_scan import cpu

        return cpu
    from ditkit.ops.selective_scan import triton

    return triton
