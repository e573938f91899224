"""The compiled kernel for processors: built by the machine's own compiler when it is first needed, then kept.

It is in float32, with types below widened; where there is no compiler, and in float64, `cpu` goes on with torch's
operations.

B batch, N heads, L queries, M keys, K head width.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.ops.block_sparse_attention.plan import BlockPlan

LOG = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
SWITCH = "DITKIT_NATIVE"
"""Environment variable; 0 leaves the compiler alone."""
COMPILERS = ("c++", "g++", "clang++")


class Arguments(ctypes.Structure):
    """`struct Plan` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "heads", "own_heads", "batches", "rows", "columns", "query_side", "key_side", "width", "value_width",
            "threads",
        )),
        *((name, ctypes.c_void_p) for name in ("start", "index", "tile", "tiles")),
        ("scale", ctypes.c_float),
    )  # fmt: skip


def is_there(dtype: torch.dtype) -> bool:
    """Return whether queries of a type are the compiled kernel's; the first question takes the compiler seconds."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernel, compiled before if need be; None where that cannot be."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        LOG.info("block-sparse attention: no C++ compiler, so torch's operations are used")
        return None
    try:
        return ctypes.CDLL(str(built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        LOG.warning(
            "block-sparse attention: %s made no kernel, so torch's operations are used: %s", compiler, error
        )
        return None


def built(compiler: str) -> Path:
    """Return the library in the user's cache, by what went into it; a second process finds it or writes the same.

    Raises:
        OSError, SubprocessError: it cannot be compiled or written.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditkit" / "kernels"
    path = folder / f"block_sparse_attention-{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            compiled = Path(apart) / path.name
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(compiled)],
                capture_output=True,
                check=True,
                timeout=300,
            )
            compiled.replace(path)
    return path


def _processor() -> str:
    """Describe the processor that `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, L, Kv] and log-sum-exp [B, N, L] of a plan."""
    (bq, bk), native = plan.block, _loaded()
    queries, keys, values = _whole(q, bq), _whole(k, bk), _whole(v, bk)
    out = queries.new_empty(*queries.shape[:3], v.shape[-1])
    lse = queries.new_empty(queries.shape[:3])
    arguments = _arguments(q, v, plan, scale)
    _check(
        native.ditkit_forward(
            ctypes.byref(arguments), ctypes.c_int64(q.shape[1]), *map(_at, (queries, keys, values, out, lse))
        )
    )
    return out[:, :, : q.shape[2]].to(q.dtype), lse[:, :, : q.shape[2]]


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients; a score's is weight (d_out v^T - (d_out . out) + d_lse)."""
    (bq, bk), native = plan.block, _loaded()
    inner = (d_out.float() * out.float()).sum(-1, keepdim=True) - d_lse[..., None]
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    given = [_whole(q, bq), _whole(k, bk), _whole(v, bk)]
    rows = [_whole(x, bq) for x in (d_out, inner, shift)]
    grads = [torch.empty_like(x) for x in given]
    arguments = _arguments(q, v, plan, scale)
    _check(
        native.ditkit_backward(
            ctypes.byref(arguments), ctypes.c_int64(q.shape[1]), *map(_at, (*given, *rows, *grads))
        )
    )
    d_q, d_k, d_v = (grad[:, :, : x.shape[2]].to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _check(code: int) -> None:
    if code:
        raise MemoryError("block-sparse attention: no memory for the packed blocks of keys and values")


def _loaded() -> ctypes.CDLL:
    native = library()
    assert native is not None
    return native


def _whole(x: Tensor, side: int) -> Tensor:
    """Rows in memory as float32, with zeros up to whole blocks."""
    spare = -x.shape[2] % side
    return (F.pad(x, (0, 0, 0, spare)) if spare else x).float().contiguous()


def _arguments(q: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> Arguments:
    """`Plan` of the source; it holds addresses, which live as long as the plan."""
    sizes = (
        q.shape[0] * q.shape[1],
        plan.heads,
        plan.batches,
        *plan.blocks,
        *plan.block,
        q.shape[-1],
        v.shape[-1],
    )
    lists = (plan.start, plan.index, plan.tile, plan.tiles)
    assert all(part.is_contiguous() for part in lists)
    return Arguments(*sizes, torch.get_num_threads(), *(part.data_ptr() for part in lists), scale)


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
