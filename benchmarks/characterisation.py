"""Profiles of a DiT and of a factorised video transformer at real shapes on a GPU, math and fused attention in turns.

    python benchmarks/characterisation.py

Expected on an H100: attention's share falls with fused attention and linear layers come first; temporal attention's
share of the time is at least 3 times its share of MACs. Needs a CUDA device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import record, show
from ditkit.api.profile import profile
from ditkit.core.model import Denoiser
from ditkit.models.dit import DiT
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.sample import Unguided

BACKENDS = {"math": SDPBackend.MATH, "fused": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        steps: forward passes of each profile. side: of a frame of the clip, in latents.
    """

    steps: int = 10
    side: int = 64


def main(arguments: Arguments) -> None:
    if not torch.cuda.is_available():
        sys.exit("characterisation: needs a CUDA device, and there is none here")
    device = torch.device("cuda")
    clip = VDTConfig(size=arguments.side, frames=16, patch=2, channels=4, width=1152, depth=28, heads=16)
    with device:
        models = {"DiT-XL/2": DiT.preset("XL/2"), "VDT, 16 frames": VDT(clip)}
    rows = [
        row
        for name, model in models.items()
        for backend in BACKENDS
        for row in measure(name, model.eval().bfloat16(), backend, arguments)
    ]
    show("characterisation, bf16", rows)
    record("characterisation", rows)


def measure(name: str, model: Denoiser, backend: str, arguments: Arguments) -> list[dict[str, object]]:
    """Return a row a part with its share of time and of MACs."""
    with sdpa_kernel(BACKENDS[backend]):
        found = profile(model, steps=arguments.steps, seeds=range(4), guidance=Unguided())
    return [
        {
            "model": name,
            "attention": backend,
            "part": part,
            "time_share": entry.seconds / found.wall_seconds,
            "macs_share": entry.macs / found.macs,
        }
        for part, entry in found.by("part").items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
