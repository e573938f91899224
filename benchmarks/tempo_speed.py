"""Series a second of TEMPO at the paper's size, random weights: python benchmarks/tempo_speed.py (a CUDA device).

Prints one line for float32 and one for bfloat16 autocast: median of 20 passes of 256 windows of 336 steps to 96.
"""

from __future__ import annotations

import statistics
import time

import torch

from ditkit.models.tempo import Tempo
from ditkit.recipes.tempo import PUBLISHED_LORA

BATCH, PASSES, WARM = 256, 20, 3


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Tempo.preset("gpt2-6")
    model.transform(PUBLISHED_LORA)
    model = model.eval().to(device)
    x = torch.randn(BATCH, 1, model.config.frames, 1, 1, device=device)
    exact = model(x)
    for name, enabled in (("float32", False), ("bfloat16", True)):
        seconds = []
        for _ in range(WARM + PASSES):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
                out = model(x)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        error = ((out - exact).norm() / exact.norm()).item()
        rate = BATCH / statistics.median(seconds[WARM:])
        print(f"{device} {name}: {rate:.0f} series a second, relative error {error:.2e}")


if __name__ == "__main__":
    main()
