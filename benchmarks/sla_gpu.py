"""SLA's two branches and its router against dense attention, forward and backward, in the shape of Wan2.1-1.3B's heads.

    python benchmarks/sla_gpu.py                      32,760 tokens, 12 heads of width 128, bf16, on a GPU
    python benchmarks/sla_gpu.py --device cpu --length 2048 --heads 2 --width 64 --dtype float32

All are run in turns; a time is the median over the rounds. TFLOPS are those of dense attention over the time, as is
usual of sparse kernels. Of an H100 the specification asks 8 to 12 times FlashAttention 2's speed forward and 4
to 6 times backward at critical=0.05, and a linear branch of at most 15 % of the sparse one. The end-to-end run is
`ditkit compare` with a fine-tuned model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from common import record, show
from ditkit.attention.sparse_linear import CRITICAL, MARGINAL, SparseLinear
from ditkit.core.grid import Grid
from ditkit.ops.block_sparse_attention import attend_mapped
from ditkit.ops.linear_attention import block_linear_attention, divide, feature_map

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        length: tokens, 21 frames of 30 x 52 for Wan at 480p. width: of a head.
        critical: shares of the key blocks.
    """

    length: int = 32_760
    heads: int = 12
    width: int = 128
    critical: tuple[float, ...] = (0.05, 0.1, 0.2)
    dtype: str = "bfloat16"
    device: str = "cuda"
    rounds: int = 10


def main(arguments: Arguments) -> None:
    rows = [measure(arguments, critical) for critical in arguments.critical]
    show(
        f"L = {arguments.length}, {arguments.heads} heads of width {arguments.width}, {arguments.dtype}", rows
    )
    record("sla_gpu", rows)


def measure(arguments: Arguments, critical: float) -> dict[str, object]:
    device = torch.device(arguments.device)
    kernel = "triton" if device.type == "cuda" else "cpu"
    policy = SparseLinear(critical=critical)
    grid = Grid(1, 1, arguments.length)
    plan = policy.plan(grid, 0).to(device)
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, arguments.heads, plan.queries, arguments.width)
    q, k, v, seed = (
        torch.randn(shape, generator=draw, device=device, dtype=TYPES[arguments.dtype]) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    classes = policy.classes(plan.queries, q, k, None)

    def sparse() -> Tensor:
        return attend_mapped(q, k, v, plan, classes == CRITICAL, kernel=kernel).out

    def linear() -> Tensor:
        a, b = (feature_map(x, policy.feature) for x in (q, k))
        return divide(block_linear_attention(a, b, v, classes == MARGINAL, plan.block, kernel=kernel)).to(
            v.dtype
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "sparse": sparse,
        "linear": linear,
        "router": lambda: policy.classes(plan.queries, q, k, None),
    }
    forward: dict[str, list[float]] = {name: [] for name in ways}
    backward: dict[str, list[float]] = {name: [] for name in ways if name != "router"}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, way in ways.items():
            with torch.no_grad():
                seconds = timed(way, device)
            if turn:
                forward[name].append(seconds)
        for name, times in backward.items():
            out = ways[name]()
            seconds = timed(lambda out=out: torch.autograd.grad(out, leaves, seed), device)
            if turn:
                times.append(seconds)
    flops = 4 * arguments.length**2 * arguments.width * arguments.heads
    there, back = ({name: median(times) for name, times in of.items()} for of in (forward, backward))
    return {
        "critical": critical,
        "density": policy.share(plan, plan.queries),
        **{f"{name}_ms": 1e3 * seconds for name, seconds in there.items()},
        **{f"{name}_backward_ms": 1e3 * seconds for name, seconds in back.items()},
        "sparse_tflops": flops / there["sparse"] / 1e12,
        "speedup": there["dense"] / (there["sparse"] + there["linear"] + there["router"]),
        "backward_speedup": back["dense"] / (back["sparse"] + back["linear"]),
        "linear_share": there["linear"] / there["sparse"],
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that it takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
