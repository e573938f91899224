"""DiT-XL/2's forward pass in bf16 at 256 and 1024 tokens: pictures a second and share of the GPU's peak.

    python benchmarks/dit_xl_forward.py --peak-tflops 989

The denominator of every speed-up on a GPU (baselines specification, check 3). Needs a CUDA device; the peak is the
device's dense bf16 rate (H100 SXM: 989, H200: 989 TFLOP/s). A multiply-accumulate counts as two FLOPs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
import tyro

from common import record, show
from ditkit.bench.macs import count_macs
from ditkit.bench.timing import alternated, medians
from ditkit.core.cond import Cond
from ditkit.models.dit import DiT


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        batch: pictures a call. rounds: alternated runs of each row. peak_tflops: of the device, dense bf16.
    """

    batch: int = 64
    rounds: int = 20
    peak_tflops: float = 989.0


def main(arguments: Arguments) -> None:
    if not torch.cuda.is_available():
        sys.exit("dit_xl_forward: needs a CUDA device, and there is none here")
    device = torch.device("cuda")
    rows = [row for size in (32, 64) for row in measure(size, arguments, device)]
    show("DiT-XL/2 forward, bf16", rows)
    record("dit_xl_forward", rows)


@torch.no_grad()
def measure(size: int, arguments: Arguments, device: torch.device) -> list[dict[str, object]]:
    """Eager and compiled, alternated, on latents of `size` x `size`."""
    with torch.device("meta"):
        config = replace(DiT.preset("XL/2").config, size=size)
    model = DiT(config).to(device, torch.bfloat16).eval()
    x = torch.randn(arguments.batch, 4, size, size, device=device, dtype=torch.bfloat16)
    t = torch.randint(0, 1000, (arguments.batch,), device=device)
    cond = Cond(label=torch.randint(0, 1000, (arguments.batch,), device=device))
    macs = count_macs(model, x, t, cond).total
    compiled = torch.compile(model, mode="max-autotune-no-cudagraphs")
    seconds = medians(
        alternated(
            {"eager": lambda: model(x, t, cond), "compiled": lambda: compiled(x, t, cond)},
            arguments.rounds,
            warmup=5,
        )
    )
    return [
        {
            "tokens": (size // 2) ** 2,
            "mode": mode,
            "seconds": taken,
            "images_per_second": arguments.batch / taken,
            "tflops": 2 * macs / taken / 1e12,
            "share_of_peak": 2 * macs / taken / 1e12 / arguments.peak_tflops,
        }
        for mode, taken in seconds.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
