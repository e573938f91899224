"""Multiply-accumulates over the shapes that really ran.

torch's own counter knows no fused attention of the CPU and then counts zero for it. Here attention is counted
at its core from shapes, whichever kernel runs it: B N Lq Lk (K + Kv), also under a mask, because a dense
kernel computes what it masks; a block-sparse kernel computes the blocks that its plan visits. A selective scan has nine
for each state of a token, and one. What a policy skips never runs and is not counted.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ditkit.ops.block_sparse_attention.chosen import chosen_backward_macs, chosen_macs
from ditkit.ops.block_sparse_attention.mapped import mapped_backward_macs, mapped_macs
from ditkit.ops.block_sparse_attention.operation import backward_macs, forward_macs
from ditkit.ops.linear_attention.operation import sums_backward_macs, sums_macs
from ditkit.ops.routed_linear import operation as routed
from ditkit.ops.selective_scan.operation import scan_backward_macs, scan_macs

aten = torch.ops.aten
Formula = Callable[..., int]
Listener = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, int], None]

# Names of operations that multiply matrices: those without a formula are reported as uncounted.
HEAVY = re.compile(r"mm(_|$)|matmul|convolution|conv_|attention|rnn|lstm|gru|encoder_layer|trilinear|_c?dist")


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates by kind (linear, matmul, attention, convolution); operations without a formula."""

    by_kind: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


class MacCounter:
    """Context manager that counts what runs inside it, forward and backward, on any device.

    Compiled functions run eagerly inside it; torch refuses `flex_attention` there (measured on 2.13).

    >>> with MacCounter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> counter.total
    30

    Args:
        listener: called after each operation with (operation, arguments, keywords, result, multiply-accumulates).
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._mode = _CountingMode(listener)

    def __enter__(self) -> Self:
        # nn.TransformerEncoderLayer has a fused inference path, one opaque operation; the plain one is equal.
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        # Left to itself, torch would refuse a full graph here, and never compile again what it met here first.
        # Without this module nothing is compiled yet, and importing it takes a second.
        compiler = "torch._dynamo" in sys.modules
        self._stance = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
        self._stance.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        self._stance.__exit__(kind, error, trace)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)

    @property
    def count(self) -> MacCount:
        return MacCount(dict(self._mode.macs), tuple(sorted(self._mode.uncounted)))

    @property
    def total(self) -> int:
        return self.count.total


def count_macs(fn: Callable[..., object], *args: Any, **kwargs: Any) -> MacCount:
    """Call `fn(*args, **kwargs)` once and say what it multiplied."""
    with MacCounter() as counter:
        fn(*args, **kwargs)
    return counter.count


class _CountingMode(TorchDispatchMode):
    def __init__(self, listener: Listener | None = None) -> None:
        super().__init__()
        self.listener = listener
        self.macs: Counter[str] = Counter()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in FORMULAS:
            # Inference mode hands over composite operations whole: count the parts that have formulas.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        macs = 0
        if packet in FORMULAS:
            kind, formula = FORMULAS[packet]
            macs = formula(*args, out_val=out, **kwargs)
            self.macs[kind] += macs
        elif _looks_heavy(func):
            self.uncounted.add(str(packet))
        if self.listener is not None:
            self.listener(func, args, kwargs, out, macs)
        return out


def _looks_heavy(func: Any) -> bool:
    """Return whether an operation is a foreign kernel, or one of torch's named like a matrix product."""
    return func.namespace not in ("aten", "prims", "prim") or bool(HEAVY.search(func.overloadpacket.__name__))


def _half(flops: Formula) -> Formula:
    """Halve torch's own formula, which counts two operations for each multiply-accumulate."""
    return lambda *args, **kwargs: flops(*args, **kwargs) // 2


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and weighted sum, [B, N, Lq, K] x [B, N', Lk, K] x [B, N', Lk, Kv]; N' < N are grouped heads."""
    *batch, length, width = query.shape
    return math.prod(batch) * length * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Count the scores once more, then the gradients of query, key, weights and value: 3 K + 2 Kv for each pair."""
    *batch, length, width = query.shape
    return math.prod(batch) * length * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """[..., M, K] x [..., K, N]."""
    return a.numel() * b.shape[-1]


def _product_with_vector(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """[M, K] x [K] or [K] x [K]."""
    return a.numel()


def _added(formula: Formula) -> Formula:
    """Shift a formula to operations whose first argument is what the product is added to."""
    return lambda bias, a, b, *_, **__: formula(a, b)


def _rnn_layer(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    """[T, B, D]: each step multiplies the input and the hidden state once."""
    return math.prod(x.shape[:-1]) * (w_input.numel() + w_hidden.numel())


def _outputs(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """[M, K] to [M, N], by weights that do not tell their shape."""
    return x.numel() * out_val.shape[-1]


def _kind(packet: Any) -> str:
    name = getattr(packet, "__name__", str(packet))
    if "attention" in name:
        return "attention"
    if "conv" in name:
        return "convolution"
    return "matmul" if "bmm" in name else "linear"


# Operations that torch's registry leaves out, hence counts as nothing.
_OURS: dict[str, Formula] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mv": _product_with_vector,
    "dot": _product_with_vector,
    "vdot": _product_with_vector,
    "addmv": _added(_product_with_vector),
    "addmv_": _added(_product_with_vector),
    "addmm_": _added(_product),
    "addbmm": _added(_product),
    "addbmm_": _added(_product),
    "baddbmm_": _added(_product),
    "_int_mm": _product,
    "mkldnn_rnn_layer": _rnn_layer,
}

FORMULAS: Mapping[Any, tuple[str, Formula]] = {
    **{packet: (_kind(packet), _half(flops)) for packet, flops in flop_registry.items()},
    **{getattr(aten, name): (_kind(getattr(aten, name)), formula) for name, formula in _OURS.items()},
    torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32: ("linear", _outputs),
    torch.ops.ditkit.block_sparse_attention: ("attention", forward_macs),
    torch.ops.ditkit.block_sparse_attention_backward: ("attention", backward_macs),
    torch.ops.ditkit.chosen_attention: ("attention", chosen_macs),
    torch.ops.ditkit.chosen_attention_backward: ("attention", chosen_backward_macs),
    torch.ops.ditkit.mapped_attention: ("attention", mapped_macs),
    torch.ops.ditkit.mapped_attention_backward: ("attention", mapped_backward_macs),
    torch.ops.ditkit.linear_sums: ("attention", sums_macs),
    torch.ops.ditkit.linear_sums_backward: ("attention", sums_backward_macs),
    torch.ops.ditkit.selective_scan: ("scan", scan_macs),
    torch.ops.ditkit.selective_scan_backward: ("scan", scan_backward_macs),
    torch.ops.ditkit.routed_linear: ("linear", routed.forward_macs),
    torch.ops.ditkit.routed_linear_backward: ("linear", routed.backward_macs),
}
