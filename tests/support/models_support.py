"""Models with no weight left at zero, and a small one in a folder that tests save themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ditkit.core.convention import Convention
from ditkit.models.dit import DiT, DiTConfig

CLASSES = ("animal-bird", "animal-mammal", "flag / other", "food-fruit")
M = TypeVar("M", bound=nn.Module)


def perturbed(model: M, scale: float) -> M:
    """The model in eval mode, noise of this scale on each parameter: zero gates would hide what lies behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def tiny_model(**changes: object) -> DiT:
    """16 x 16 RGB, 16 tokens, velocity on the linear path; its output is not zero."""
    options: dict[str, object] = {
        "size": 16,
        "patch": 4,
        "channels": 3,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "classes": len(CLASSES),
        "class_names": CLASSES,
        "convention": Convention(),
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return perturbed(DiT(DiTConfig(**{**options, **changes})), 0.05)  # type: ignore[arg-type]


def save_tiny(folder: Path) -> Path:
    return tiny_model().save(folder)
