"""A model folder that tests save themselves: small, and with no weight left at zero."""

from __future__ import annotations

from pathlib import Path

import torch

from ditkit.core.convention import Convention
from ditkit.models.dit import DiT, DiTConfig

CLASSES = ("animal-bird", "animal-mammal", "flag / other", "food-fruit")


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
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = DiT(DiTConfig(**{**options, **changes}))  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(folder: Path) -> Path:
    return tiny_model().save(folder)
