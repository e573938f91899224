"""Section 2 of the DiT and SiT specification on toy latents: minutes on one core.

python benchmarks/baselines.py            prints a table and writes benchmarks/results/baselines.json
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
import tyro
from torch import Tensor

from common import record, show
from ditkit.bench.macs import count_macs
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.model import Model
from ditkit.models.dit import DiT, DiTConfig
from ditkit.sample import ClassifierFree, sample
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings

SIZE, CHANNELS, CLASSES = 16, 4, 4


class Waves:
    """Latents [4, 16, 16]: a wave whose direction is the class, a weaker one of another class, and fine noise.

    The phases vary, so that no two are alike; the weaker wave makes classes overlap.
    """

    def __init__(self, count: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.label = torch.randint(CLASSES, (count,), generator=g)
        other = (self.label + torch.randint(1, CLASSES, (count,), generator=g)) % CLASSES
        strength = 0.5 + 0.5 * torch.rand(2, count, 1, 1, 1, generator=g)
        phase = 0.5 * torch.randn(2, count, CHANNELS, generator=g)
        own, stray = (_waves(c)[:, None] for c in (self.label, other))
        self.data = strength[0] * torch.cos(own + phase[0, :, :, None, None])
        self.data += 0.8 * strength[1] * torch.cos(stray + phase[1, :, :, None, None])
        self.data += 0.1 * torch.randn(self.data.shape, generator=g)

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, chance: SampleRNG | None = None) -> tuple[Tensor, Cond]:
        return self.data[indices], Cond(label=self.label[indices])


def _waves(label: Tensor) -> Tensor:
    """Phases [B, 16, 16] of waves of period 4 in four directions."""
    angle = math.pi * label[:, None, None] / CLASSES
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return 2 * math.pi / 4 * (column * angle.cos() + row * angle.sin())


def recognised(samples: Tensor) -> Tensor:
    """The class whose wave has most energy, [B]."""
    every = torch.exp(1j * _waves(torch.arange(CLASSES)).to(torch.complex64))
    energy = torch.einsum("bchw,khw->bck", samples.to(torch.complex64), every).abs().square().sum(1)
    return energy.argmax(1)


@torch.no_grad()
def held_out_loss(model: Model) -> float:
    """Flow-matching loss on 512 latents never trained on, with fixed noise and times."""
    g = torch.Generator().manual_seed(9)
    data, told = (held := Waves(512, seed=2)).batch(torch.arange(len(held)))
    noise, t = torch.randn(data.shape, generator=g), (torch.arange(512) + 0.5) / 512
    path = model.config.convention.make_path()
    losses = Denoising().at(model.eval(), model, path=path, data=data, noise=noise, t=t, cond=told)
    return losses["loss"].item()


def accuracy(model: Model, scale: float, count: int = 256) -> float:
    """Share of guided samples that are recognised as the class asked for."""
    label = torch.arange(count) % CLASSES
    drawn = sample(model, Cond(label=label), range(count), steps=20, guidance=ClassifierFree(scale))
    return (recognised(drawn.samples) == label).float().mean().item()


def trained(patch: int, steps: int) -> tuple[DiT, Model]:
    """A small DiT after training: its last weights, and their average."""
    torch.manual_seed(0)
    model = DiT(
        DiTConfig(
            size=SIZE,
            patch=patch,
            channels=CHANNELS,
            width=64,
            depth=4,
            heads=2,
            classes=CLASSES,
            convention=Convention(),
        )
    )
    settings = Settings(
        steps=steps, batch=32, learning_rate=2e-3, warmup=20, averages=(Power(0.1),), save_every=0
    )
    with tempfile.TemporaryDirectory() as folder:
        return model, train(model, Waves(4096, seed=1), Denoising(), settings, Path(folder))


def forward_macs(model: DiT) -> int:
    told = Cond(label=torch.zeros(1, dtype=torch.long))
    return count_macs(model, torch.zeros(1, *model.sample_shape), torch.zeros(1), told).total


def rows(steps: int) -> list[dict[str, float]]:
    """One row a patch size: its cost, its held-out losses, and how often guided samples are recognised."""
    found = []
    for patch in (8, 4, 2):
        raw, averaged = trained(patch, steps)
        found.append(
            {
                "patch": patch,
                "steps": steps,
                "macs": forward_macs(raw),
                "loss": held_out_loss(raw),
                "loss_averaged": held_out_loss(averaged),
                **{f"accuracy_guidance_{scale}": accuracy(averaged, scale) for scale in (1.0, 2.0, 4.0)},
            }
        )
    return found


def main(steps: int = 1500) -> None:
    """Train patches 8, 4 and 2 alike; compare losses, averages and guidance.

    Args:
        steps: of each of the three trainings.
    """
    real = Waves(512, seed=2)
    share = (recognised(real.data) == real.label).float().mean().item()
    found = rows(steps)
    show(f"toy latents, {steps} steps; {share:.3f} of the real ones are recognised", found)
    record("baselines", found)


if __name__ == "__main__":
    tyro.cli(main)
