"""A tiny DiT with random weights, sampled in few steps, and every solver with a convention it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.time_grid import Shift
from ditkit.models.dit import DiT, DiTConfig
from ditkit.sample import Ancestral, Ddim, DpmSolverPP, Euler, EulerMaruyama, Heun, UniPc, sample

VELOCITY = Convention()
TINY = DiTConfig(size=4, patch=2, channels=4, width=32, depth=2, heads=2, classes=5)
COND = Cond(label=torch.tensor([1, 2, 4]))
SEEDS = [7, 3, 11]


def tiny(convention: Convention = VELOCITY, seed: int = 0, depth: int = 2) -> DiT:
    """A DiT with random weights, so that its output depends on everything."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(replace(TINY, convention=convention, depth=depth))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def draw(model: DiT, cond: Cond = COND, seeds: Sequence[int] = SEEDS, **options: Any) -> Tensor:
    return sample(model, cond, seeds, **{"steps": 8, **options}).samples


@contextmanager
def batches(model: nn.Module) -> Iterator[list[int]]:
    """The batch size of every forward pass."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


SOLVERS = [
    (Euler(), VELOCITY),
    (Heun(), SIT),
    (Ddim(), VELOCITY),
    (Ddim(), DDPM),
    (Ddim("even"), DDPM),
    (DpmSolverPP(), VELOCITY),
    (DpmSolverPP(grid=Shift(2.0)), DDPM),
    (UniPc(), SIT),
    (UniPc(order=3, spacing="trailing"), DDPM),
    (Ancestral(), DDPM),
    (EulerMaruyama(), SIT),
]
solvers = pytest.mark.parametrize(("solver", "convention"), SOLVERS, ids=lambda v: type(v).__name__)
