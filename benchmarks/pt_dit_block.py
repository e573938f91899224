"""Time of a PT-DiT block on a GPU against a DiT block and full attention, pictures of 256 to 16,384 tokens and a clip.

python benchmarks/pt_dit_block.py      not run yet, for want of a GPU

Expected at 16,384 tokens of width 1152: attention 10 times as fast as full attention or more, the whole block 1.5 to
2.5 times as fast as DiT's; at 1,024 tokens slower than DiT's. Memory of a clip of 16 frames of 64 x 64 tokens beside
one of 4: as its rows, not as their pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from common import record, show
from ditkit.bench.timing import alternated, medians
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid
from ditkit.core.run import DIRECT
from ditkit.models.pt_dit import PTDiT, PTDiTConfig, VideoPTDiT, VideoPTDiTConfig
from ditkit.nn.blocks import Block

WIDTH, HEADS = 1152, 16
GRIDS = (
    Grid(1, 16, 16),
    Grid(1, 32, 32),
    Grid(1, 64, 64),
    Grid(1, 128, 128),
    Grid(4, 64, 64),
    Grid(16, 64, 64),
)


@torch.inference_mode()
def main() -> None:
    """Print a row for each grid, in bfloat16, one sample, blocks compiled."""
    if not torch.cuda.is_available():
        sys.exit("pt_dit_block: needs a CUDA device, and there is none here")
    rows = [measure(grid) for grid in GRIDS]
    show("blocks of width 1152, bf16", rows)
    record("pt_dit_block", rows)


def measure(grid: Grid) -> dict[str, object]:
    """Return milliseconds and peak bytes of a block, and of its attention, beside those of a DiT."""
    sizes: dict[str, Any] = {"width": WIDTH, "heads": HEADS, "depth": 1, "patch": 1, "classes": 0}
    model: PTDiT = (
        PTDiT(PTDiTConfig(size=grid.height, **sizes))
        if grid.frames == 1
        else VideoPTDiT(VideoPTDiTConfig(frames=grid.frames, size=grid.height, **sizes))
    )
    own, rival = (block.cuda().bfloat16().eval() for block in (model.blocks[0], Block(WIDTH, HEADS)))
    x = torch.randn(1, grid.length, WIDTH, device="cuda", dtype=torch.bfloat16)
    c = torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16)
    place = model.place(grid, torch.zeros(1), Cond(), x.device)
    parts = own.modulation(c)[:, None]

    def attentions() -> None:
        own.interact(DIRECT, "", x, parts, place)
        own.attend(DIRECT, "", x, parts, place)
        own.attend_shifted(DIRECT, "", x, parts, place)

    calls: dict[str, Callable[[], Any]] = {
        "block": partial(torch.compile(own), x, c, place),
        "DiT_block": partial(torch.compile(rival), x, c),
        "attention": attentions,
        "DiT_attention": partial(rival.attend, DIRECT, "", x, rival.modulation(c)[:, None]),
    }
    peaks = {}
    for name, one in calls.items():
        one()
        torch.cuda.reset_peak_memory_stats()
        one()
        peaks[name] = torch.cuda.max_memory_allocated()
    seconds = medians(alternated(calls, 21, warmup=5))
    return {
        "tokens": " x ".join(map(str, grid.shape)),
        **{f"{name}_ms": 1e3 * taken for name, taken in seconds.items()},
        "gain": seconds["DiT_block"] / seconds["block"],
        "gain_of_attention": seconds["DiT_attention"] / seconds["attention"],
        "block_bytes": peaks["block"],
        "DiT_block_bytes": peaks["DiT_block"],
    }


if __name__ == "__main__":
    main()
