"""Time of LiT's attention against softmax attention on a GPU, 256 to 16,384 tokens, with the memory that each takes.

python benchmarks/lit_layer.py      prints a row for each number of tokens; not run yet, for want of a GPU
"""

from __future__ import annotations

import sys

import torch

from ditkit.attention.linear import ReluLinear, attend
from ditkit.bench.timing import alternated
from ditkit.core.grid import Grid
from ditkit.nn.blocks import attention
from ditkit.nn.linear_attention import ValueConv

WIDTH, HEADS = 1152, 16
"""Of DiT-XL/2, whose LiT has 4 heads."""


@torch.inference_mode()
def main() -> None:
    """Print milliseconds and peak megabytes of both, in bfloat16, 4 pictures."""
    if not torch.cuda.is_available():
        sys.exit("lit_layer: no GPU")
    policy, conv = ReluLinear(heads=4), ValueConv(WIDTH, 4).cuda().bfloat16()
    for side in (16, 32, 64, 128):
        q, k, v = torch.randn(3, 4, HEADS, side * side, WIDTH // HEADS, device="cuda").bfloat16()

        grid = Grid(1, side, side)

        def linear(given: tuple[torch.Tensor, ...] = (q, k, v), grid: Grid = grid) -> None:
            attend(policy, conv, grid, attention, *given)
            torch.cuda.synchronize()

        def softmax(given: tuple[torch.Tensor, ...] = (q, k, v)) -> None:
            attention(*given)
            torch.cuda.synchronize()

        calls = {"linear": linear, "softmax": softmax}
        peaks = {}
        for name, one in calls.items():
            torch.cuda.reset_peak_memory_stats()
            one()
            peaks[name] = torch.cuda.max_memory_allocated() / 1e6
        seconds = {name: torch.tensor(s).median() for name, s in alternated(calls, 21).items()}
        shown = "  ".join(f"{name} {1e3 * s:.3f} ms {peaks[name]:.0f} MB" for name, s in seconds.items())
        print(f"{side * side:>6} tokens  {shown}  {seconds['softmax'] / seconds['linear']:.2f} times")


if __name__ == "__main__":
    main()
