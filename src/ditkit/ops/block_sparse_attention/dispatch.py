"""Dispatch: the kernel that executes a plan, and whether skipping pays at all, decided before the work."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.ops.block_sparse_attention.chosen import chooser_of, chosen_attention, chosen_plan, measures
from ditkit.ops.block_sparse_attention.mapped import mapped_attention, mapped_plan
from ditkit.ops.block_sparse_attention.operation import block_sparse_attention, for_valid
from ditkit.ops.block_sparse_attention.plan import BlockPlan
from ditkit.ops.block_sparse_attention.reference import Attended, attend_reference

Kernel = Literal["auto", "cpu", "triton", "flex", "reference"]
KERNELS = get_args(Kernel)
HAS_TRITON = find_spec("triton") is not None

PAYS_BELOW = 0.4
"""Density up to which a kernel beats dense attention, forward and backward: on two cores, d = 64, at 0.25 by 2.4 to 3
times forward; at 0.5 by 1.3 to 1.4 in float32, and not in bf16 (`benchmarks/block_sparse_attention.py`). Not measured
on a GPU."""

SHORTEST = 256
"""Keys below which dense attention takes so little that lists cannot pay."""

MOST_ROWS = 1.5
"""Rows, padding included, over tokens up to which a pattern may pay. A bound, not measured: each row costs a block of
width D about 12 D^2 MACs and each pair 2 D, so that skipping pays up to 1 + L (1 - density) / (6 D)."""


class Choice(NamedTuple):
    """The kernel that will execute a plan, exactly; `pays` False says that plain dense attention would be faster."""

    kernel: Kernel
    pays: bool
    reason: str


def choose(q: Tensor, plan: BlockPlan, kernel: Kernel = "auto") -> Choice:
    """Choose the kernel for queries like `q`, with the reason; a pattern that does not pay switches itself off.

    Raises:
        ConfigError: an unknown kernel, or one that this device, type or plan cannot have.
    """
    chosen = _kernel(q, plan, kernel)
    if chosen == "reference":
        return Choice(chosen, False, "the reference makes all scores")
    why_not = pays(plan)
    return Choice(chosen, not why_not, why_not or f"{_visited(plan.density)} on {q.device.type}")


def pays(plan: BlockPlan, density: float | None = None) -> str:
    """Why skipping does not pay with this plan, whatever the tensors; empty if it does.

    Args:
        density: of what will be visited, where the plan is a bound; the plan's own unless said.
    """
    density = plan.density if density is None else density
    if plan.tokens < SHORTEST:
        return f"{plan.tokens} keys, dense attention is faster below {SHORTEST}"
    if plan.rows_ratio > MOST_ROWS:
        return (
            f"padding makes {plan.rows_ratio:.3g} times the rows, dense attention is faster above {MOST_ROWS}"
        )
    if density > PAYS_BELOW:
        return f"{_visited(density)}, dense attention is faster above {PAYS_BELOW}"
    return ""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    kernel: Kernel = "auto",
) -> Attended:
    """Attention of queries [B, N, L, K] over keys and values [B, N, M, K], each query over those its plan lets it see.

    Differentiable in the output and in the log-sum-exp. All kernels compute the same, to rounding. Those of ours are
    one node of a compiled graph, whatever the plan and `valid`.

    Args:
        valid: bool [B, M'], which of the first M' key tokens are real, as in `with_valid`, whose plans are kept. Best
            on the CPU: with one on a GPU each call waits for the GPU.
        scale: of the scores, 1 / sqrt(K) unless said.
        kernel: "auto" for what `choose` says.

    Raises:
        ShapeError: tensors that do not fit each other or the plan, or a query sees no key.
        ConfigError: see `choose`.
    """
    _check(q, k, v, plan, valid)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _kernel(q, plan, kernel)
    if chosen in ("cpu", "triton"):
        return Attended(*block_sparse_attention(q, k, v, valid, plan.handle, scale, chosen))
    plan = for_valid(plan, valid).to(q.device)
    if chosen == "flex":
        from ditkit.ops.block_sparse_attention.flex import attend_flex

        return Attended(*attend_flex(q, k, v, plan, scale))
    return attend_reference(q, k, v, plan.mask(), scale)


def attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    chooser: int,
    image: int,
    *,
    valid: Tensor | None = None,
    kernel: Kernel = "auto",
) -> tuple[Attended, Tensor]:
    """Attention over those blocks of a plan that a chooser keeps for these queries and keys, and `measures` of them.

    Args:
        chooser: its `chooser_handle`.
        image: slots of the image, which come first and fill whole blocks.
        valid, kernel: as in `attend`.

    Raises:
        ShapeError, ConfigError: as `attend` does.
    """
    _check(q, k, v, plan, valid)
    chosen = _kernel(q, plan, kernel)
    if chosen in ("cpu", "triton"):
        scale = q.shape[-1] ** -0.5
        out, lse, measured = chosen_attention(q, k, v, valid, plan.handle, chooser, image, scale, chosen)
        return Attended(out, lse), measured
    narrow = chosen_plan(plan, chooser_of(chooser), image, q, k, valid)
    return attend(q, k, v, narrow, kernel=chosen), measures(narrow)


def attend_mapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    kept: Tensor,
    *,
    valid: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Attended:
    """Attention over those blocks of a plan that are `kept`, bool [B, N, query blocks, key blocks].

    Args:
        valid, kernel: as in `attend`.

    Raises:
        ShapeError, ConfigError: as `attend` does.
    """
    _check(q, k, v, plan, valid)
    chosen = _kernel(q, plan, kernel)
    if chosen in ("cpu", "triton"):
        scale = q.shape[-1] ** -0.5
        return Attended(*mapped_attention(q, k, v, kept, valid, plan.handle, scale, chosen))
    return attend(q, k, v, mapped_plan(plan, kept, valid), kernel=chosen)


def _kernel(q: Tensor, plan: BlockPlan, kernel: Kernel) -> Kernel:
    """Resolve the kernel that is meant, which can execute the plan."""
    if kernel not in KERNELS:
        raise ConfigError(unknown("kernel", kernel, KERNELS))
    chosen = kernel if kernel != "auto" else _automatic(q, plan)
    why_not = _refusal(chosen, q, plan)
    if why_not:
        raise ConfigError(f"kernel {chosen}: {why_not}")
    return chosen


def _visited(density: float) -> str:
    return f"{density:.1%} of dense attention's blocks visited"


def _automatic(q: Tensor, plan: BlockPlan) -> Kernel:
    """Choose the first kernel of the device that takes this type and plan; the reference where it has none."""
    preferred: tuple[Kernel, ...] = ("cpu",) if q.device.type == "cpu" else ("triton", "flex")
    refusals = {name: _refusal(name, q, plan) for name in preferred}
    for name, why_not in refusals.items():
        if not why_not:
            return name
    reasons = "; ".join(f"{name}: {why_not}" for name, why_not in refusals.items())
    raise ConfigError(f"no block-sparse kernel here ({reasons}); kernel='reference' makes all scores")


def _refusal(kernel: Kernel, q: Tensor, plan: BlockPlan) -> str:
    """Why this kernel cannot execute the plan; empty if it can."""
    device = q.device.type
    if kernel == "cpu" and device != "cpu":
        return f"queries are on {device}, expected cpu"
    if kernel == "flex" and device != "cuda":
        return f"queries are on {device}, expected cuda: FlexAttention has no log-sum-exp elsewhere"
    if kernel == "flex" and q.dtype == torch.float64:
        return "got torch.float64, expected float32 or less"
    return _triton_refusal(q, plan) if kernel == "triton" else ""


def _triton_refusal(q: Tensor, plan: BlockPlan) -> str:
    if not HAS_TRITON:
        return "the package triton is not installed"
    from ditkit.ops.block_sparse_attention.triton import refusal

    return refusal(q, plan)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, valid: Tensor | None) -> None:
    B, N, L, K = q.shape
    if plan.queries != L or k.shape != (B, N, plan.keys, K) or v.shape[:3] != k.shape[:3]:
        raise ShapeError(
            f"attend: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} for a plan of {plan.queries} queries and "
            f"{plan.keys} keys"
        )
    if plan.batches not in (1, B) or plan.heads not in (1, N):
        raise ShapeError(
            f"attend: q {list(q.shape)} for a plan with lists for {plan.batches} batch rows and {plan.heads} heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"attend: q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one type")
    if valid is not None and (valid.dtype != torch.bool or valid.dim() != 2 or len(valid) != B):
        raise ShapeError(
            f"attend: valid {valid.dtype} {list(valid.shape)}, expected torch.bool [{B}, tokens]"
        )
