"""Block-sparse attention on a processor against dense attention, forward and backward, and FlexAttention beside it.

    python benchmarks/block_sparse_attention.py

Random FULL blocks, as many for each query block, every head with lists of its own. All are run in turns, and a
speed-up is the median over the rounds of the ratio to the dense run of the same round. FlexAttention is compiled
before, and on a processor has no backward pass. `deviation` is the greatest difference from the definition, on
one head. Gates (float32): block 128 forward >= 5.5 at density 0.1 and >= 2 at 0.25, backward >= 4 at 0.1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from rich.progress import track
from torch import Tensor

from common import record, show
from ditkit.ops.block_sparse_attention import BlockPlan, attend, attend_reference, block_map, build_plan
from ditkit.ops.block_sparse_attention.flex import flex_out

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        length: queries and keys. width: of a head.
        flex: measure FlexAttention too, which takes minutes to compile.
        rounds: runs of each kind. threads: of torch.
    """

    length: int = 8192
    width: int = 64
    heads: int = 4
    blocks: tuple[int, ...] = (128, 64)
    densities: tuple[float, ...] = (0.1, 0.25, 0.5)
    types: tuple[str, ...] = ("float32", "bfloat16")
    flex: bool = True
    rounds: int = 5
    threads: int = 2


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    settings = [(t, b, d) for t in arguments.types for b in arguments.blocks for d in arguments.densities]
    rows = [measure(arguments, *setting) for setting in track(settings, description="plans")]
    show(
        f"L = {arguments.length}, d = {arguments.width}, {arguments.heads} heads, {arguments.threads} threads",
        rows,
    )
    record("block_sparse_attention", rows)


def random_plan(length: int, block: int, heads: int, density: float) -> BlockPlan:
    """The nearest number of blocks to the density, random for each query block of each head."""
    blocks = length // block
    count = round(density * blocks)
    index = torch.rand(heads, blocks, blocks).topk(count, -1).indices
    kept = block_map(index, torch.full((heads, blocks), count), blocks)
    return build_plan(length, block=block, kept=kept, heads=heads)


def measure(arguments: Arguments, dtype: str, block: int, density: float) -> dict[str, object]:
    torch.manual_seed(0)
    shape = (1, arguments.heads, arguments.length, arguments.width)
    q, k, v = (torch.randn(shape).to(TYPES[dtype]).requires_grad_() for _ in range(3))
    plan = random_plan(arguments.length, block, arguments.heads, density)
    kinds: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "ours": lambda: attend(q, k, v, plan).out,
    }
    if arguments.flex:
        kinds["flex"] = lambda: flex_out(q, k, v, plan, arguments.width**-0.5)
    forward: dict[str, list[float]] = {name: [] for name in kinds}
    backward: dict[str, list[float]] = {"dense": [], "ours": []}
    seed = torch.randn_like(q)
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, kind in kinds.items():
            with torch.no_grad():
                seconds = timed(kind)
            if turn:
                forward[name].append(seconds)
        for name, times in backward.items():
            out = kinds[name]()
            seconds = timed(lambda out=out: torch.autograd.grad(out, (q, k, v), seed))
            if turn:
                times.append(seconds)
    return {
        "type": dtype,
        "block": block,
        "density": plan.density,
        "dense_ms": 1e3 * median(forward["dense"]),
        "ours_ms": 1e3 * median(forward["ours"]),
        "speedup": ratio(forward, "ours"),
        "flex_speedup": ratio(forward, "flex") if arguments.flex else None,
        "dense_backward_ms": 1e3 * median(backward["dense"]),
        "ours_backward_ms": 1e3 * median(backward["ours"]),
        "backward_speedup": ratio(backward, "ours"),
        "deviation": deviation(q, k, v, plan),
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(times: dict[str, list[float]], name: str) -> float:
    """How many times faster than dense attention, in the median round."""
    return median(a / b for a, b in zip(times["dense"], times[name], strict=True))


@torch.no_grad()
def deviation(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> float:
    ours = attend(q, k, v, plan).out[:, :1]
    exact = attend_reference(*(x[:, :1].float() for x in (q, k, v)), plan.mask()[:, :1]).out
    return float((ours - exact).abs().max())


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
