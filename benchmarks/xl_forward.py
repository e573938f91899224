"""Forward passes of DiT-XL/2, DiCo-XL and DiMR-XL in bf16, in turns: pictures a second, and the gain over DiT.

    python benchmarks/xl_forward.py

Expected at 256 pixels (latents of 32): DiCo 2 to 3 times as fast as DiT, DiMR 0.63 to 0.75 times.
At 512 pixels: DiCo 2.5 times or more. Needs a CUDA device.
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
from ditkit.core.model import Denoiser
from ditkit.models.dico import DiCo
from ditkit.models.dimr import DiMR
from ditkit.models.dit import DiT


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        batch: pictures a call. rounds: alternated runs of each network.
    """

    batch: int = 64
    rounds: int = 20


def main(arguments: Arguments) -> None:
    if not torch.cuda.is_available():
        sys.exit("xl_forward: needs a CUDA device, and there is none here")
    rows = [row for size in (32, 64) for row in measure(size, arguments, torch.device("cuda"))]
    show("forward passes, bf16, compiled", rows)
    record("xl_forward", rows)


@torch.no_grad()
def measure(size: int, arguments: Arguments, device: torch.device) -> list[dict[str, object]]:
    """Return a row a network, on latents of `size` x `size`; weights are drawn, what they say is not asked."""
    with torch.device("meta"):
        dimr = DiMR.preset("XL/2R" if size == 32 else "XL/3R").config
        configs = {DiT: DiT.preset("XL/2").config, DiCo: DiCo.preset("XL").config, DiMR: dimr}
    models: dict[str, Denoiser] = {
        kind.__name__: kind(replace(config, size=size)).to(device, torch.bfloat16).eval()  # type: ignore[abstract]
        for kind, config in configs.items()
    }
    x = torch.randn(arguments.batch, 4, size, size, device=device, dtype=torch.bfloat16)
    t = torch.randint(0, 1000, (arguments.batch,), device=device)
    cond = Cond(label=torch.randint(0, 1000, (arguments.batch,), device=device))
    macs = {
        name: count_macs(model, x[:1], t[:1], cond.rows(slice(1))).total for name, model in models.items()
    }
    compiled = {name: torch.compile(model) for name, model in models.items()}
    calls = {name: (lambda network=network: network(x, t, cond)) for name, network in compiled.items()}
    seconds = medians(alternated(calls, arguments.rounds, warmup=5))
    return [
        {
            "network": name,
            "latents": size,
            "seconds": taken,
            "images_per_second": arguments.batch / taken,
            "gain_over_DiT": seconds["DiT"] / taken,
            "GMAC_of_a_picture": macs[name] / 1e9,
        }
        for name, taken in seconds.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
