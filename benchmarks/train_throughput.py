"""Training throughput of the recipes, and of DiT-XL/2 where there is a GPU: images and multiply-adds a second.

python benchmarks/train_throughput.py
python benchmarks/train_throughput.py --steps 20 --batch 64
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

from common import device, record, show
from ditkit.core.cond import Cond
from ditkit.models.dit import DiT, DiTConfig
from ditkit.recipes.emoji import emoji
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.tasks.recipe import forward_macs
from ditkit.train.loop import train
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings


class Noise:
    """Random pictures in memory, and the moments at which the loop asked for them: once a step."""

    def __init__(self, config: DiTConfig, batch: int) -> None:
        self.data = torch.rand(batch, config.channels, config.size, config.size) * 2 - 1
        self.label = torch.randint(config.classes, (batch,))
        self.asked: list[float] = []

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, chance: SampleRNG) -> tuple[Tensor, Cond]:
        self.asked.append(time.perf_counter())
        return self.data[indices], Cond(label=self.label[indices])


def measure(name: str, recipe: ClassImageRecipe, settings: Settings) -> dict[str, object]:
    """Train; the median step of the second half. A step ends when its loss has arrived, so the GPU is waited for."""
    data = Noise(recipe.model, settings.batch)
    once = replace(settings, sheet_every=0, save_every=0, snapshot_every=0)
    with tempfile.TemporaryDirectory() as folder:
        train(DiT(recipe.model), data, recipe.objective, once, Path(folder))
    seconds = median(end - start for start, end in pairwise(data.asked[len(data.asked) // 2 :]))
    passes = 4 if settings.gradient_checkpointing else 3
    rate = settings.batch / seconds
    return {
        "recipe": name,
        "images_per_second": round(rate, 1),
        "step_seconds": round(seconds, 4),
        "tera_macs_per_second": round(passes * forward_macs(recipe) * rate / 1e12, 4),
    }


def main(steps: int = 12, batch: int = 64) -> None:
    """Print one table, and keep it in results/train_throughput.json.

    Args:
        steps: of each row, half of them measured. batch: images a step.
    """
    rows = []
    for name, recipe in (("emoji", emoji()), ("fashion-dit", fashion_dit())):
        for precision in ("float32", "bf16"):
            settings = replace(recipe.settings, steps=steps, warmup=0, batch=batch, precision=precision)
            rows.append(measure(f"{name} {precision}", recipe, settings))
    if torch.cuda.is_available():
        large = replace(fashion_dit(), model=DiT.preset("XL/2").config)
        plain = Settings(steps=steps, batch=batch, precision="bf16")
        rows.append(measure("XL/2 bf16", large, plain))
        rows.append(measure("XL/2 bf16 compiled", large, replace(plain, compile=True)))
        rows.append(measure("XL/2 bf16 checkpointed", large, replace(plain, gradient_checkpointing=True)))
    show(f"training on {device()}, batch {batch}", rows)
    record("train_throughput", rows)


if __name__ == "__main__":
    tyro.cli(main)
