"""A training run of seconds: a small DiT, random pictures. Or: `toy_run.py FOLDER SETTINGS_JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant, Power
from ditkit.train.loop import train
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound

DIFFUSION = Denoising((Regression(), VariationalBound()))
FLOW = Denoising((Regression(),))


class Pictures:
    """40 pictures whose brightness tells their class of four."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        self.label = torch.arange(40) % 4
        self.data = 0.3 * torch.randn(40, 1, 8, 8, generator=g) + (self.label[:, None, None, None] - 1.5) / 2

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, chance: SampleRNG | None = None) -> tuple[Tensor, Cond]:
        return self.data[indices], Cond(label=self.label[indices])


CLOCKED = ("samples_per_second", "processor_seconds")
"""What of a line is the machine's, and not the run's."""


def toy_model(convention: Convention = DDPM, **config: Any) -> DiT:
    """Width 32, depth 2, 16 tokens; no weight is zero, so that all learn from the first step."""
    sizes = {"size": 8, "patch": 2, "channels": 1, "width": 32, "depth": 2, "heads": 2, "classes": 4}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = DiT(DiTConfig(**sizes | config, convention=convention))
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def settings(**changed: Any) -> Settings:
    """20 steps of 8, clipped, two averages, a state after every second step."""
    given: dict[str, Any] = {
        "steps": 20,
        "batch": 8,
        "learning_rate": 2e-3,
        "warmup": 4,
        "clip": 1.0,
        "averages": (Power(0.1), Constant(0.9)),
        "save_every": 2,
        "sheet_every": 0,
    }
    return Settings(**given | changed)


def toy_run(folder: Path, resume: bool = False, **changed: Any) -> DiT:
    """Train the toy under DDPM's objective, with the learned variance."""
    return train(toy_model(), Pictures(), DIFFUSION, settings(**changed), folder, resume=resume)  # type: ignore[return-value]


def losses(folder: Path) -> list[dict[str, float]]:
    """The lines of losses.jsonl without what the clock says, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    toy_run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
