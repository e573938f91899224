"""The kernel of a selective scan, chosen before the work."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.ops.selective_scan.operation import selective_scan_op
from ditkit.ops.selective_scan.reference import scan_reference

Kernel = Literal["auto", "cpu", "triton", "reference"]
KERNELS = get_args(Kernel)
HAS_TRITON = find_spec("triton") is not None


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    kernel: Kernel = "auto",
) -> Tensor:
    """y_l = <C_l, h_l> + D x_l of h_l = exp(Delta_l A) h_{l-1} + Delta_l B_l x_l, h = 0 before the first token.

    K sequences a sample, each with parameters of its own: four paths through a picture, or one. All arithmetic is
    float32, float64 for float64: a state that is rounded to 16 bits drifts over a long sequence.

    Args:
        x: [B, K, L, D]. delta: [B, K, L, D] before its bias and softplus.
        A: [K, D, S], negative. B, C: [B, K, L, S]. D, bias: [K, D].
        kernel: "auto" for that of the device.

    Returns:
        [B, K, L, D], float32 or float64.

    Raises:
        ShapeError: shapes that do not fit, or no tokens.
        ConfigError: an unknown kernel, or one that this device cannot have.
    """
    _check(x, delta, A, B, C, D, bias)
    if kernel not in KERNELS:
        raise ConfigError(unknown("kernel", kernel, KERNELS))
    chosen = kernel if kernel != "auto" else ("triton" if x.device.type == "cuda" else "cpu")
    if why_not := _refusal(chosen, x, A.shape[2]):
        raise ConfigError(f"kernel {chosen}: {why_not}; kernel='reference' is a loop over tokens")
    if chosen == "reference":
        return scan_reference(x, delta, A, B, C, D, bias)
    inputs = (x, delta, A, B, C, D, bias)
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in inputs)
    return selective_scan_op(*inputs, keep, chosen)[0]


def _refusal(kernel: str, x: Tensor, states: int) -> str:
    """Why this kernel cannot take the tensors; empty if it can."""
    if kernel == "cpu" and x.device.type not in ("cpu", "meta"):
        return f"tensors are on {x.device.type}, expected cpu"
    if kernel != "triton":
        return ""
    if not HAS_TRITON:
        return "the package triton is not installed"
    from ditkit.ops.selective_scan.triton import refusal

    return refusal(x, states)


def _check(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> None:
    if x.ndim != 4 or A.ndim != 3:
        raise ShapeError(
            f"selective_scan: x {list(x.shape)} and A {list(A.shape)}, expected [B, K, L, D] and [K, D, S]"
        )
    samples, groups, length, width = x.shape
    if not length:
        raise ShapeError(f"selective_scan: x {list(x.shape)} has no tokens to scan")
    of_tokens = (samples, groups, length, A.shape[2])
    expected = {
        "delta": (delta, x.shape),
        "A": (A, (groups, width, A.shape[2])),
        "B": (B, of_tokens),
        "C": (C, of_tokens),
        "D": (D, (groups, width)),
        "bias": (bias, (groups, width)),
    }
    for name, (given, shape) in expected.items():
        if tuple(given.shape) != tuple(shape):
            raise ShapeError(
                f"selective_scan: {name} {list(given.shape)} for x {list(x.shape)}, expected {list(shape)}"
            )
