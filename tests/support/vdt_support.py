"""A small VDT with random weights, inputs of it, and each of its ways of being told given content."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.models.vdt import VDT, VDTConfig
from models_support import perturbed

SMALL = VDTConfig(
    channels=3, frames=4, size=(4, 6), patch=2, width=16, depth=2, heads=2, classes=3, convention=Convention()
)
ways = pytest.mark.parametrize("way", ("mask", "concat", "adaln", "cross"))


def awake(config: VDTConfig = SMALL) -> VDT:
    return perturbed(VDT(config), 0.2)


def batch(config: VDTConfig = SMALL, size: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(size, config.channels, *config.shape), torch.rand(size)


def frames_given(*given: list[int], config: VDTConfig = SMALL) -> Cond:
    """One sample an argument, told some frames of its own clip and a class."""
    mask = torch.ones(len(given), 1, *config.shape)
    for row, frames in enumerate(given):
        mask[row, :, frames] = 0
    context = torch.randn(len(given), config.channels, *config.shape)
    return Cond(label=torch.arange(len(given)) % config.classes, context=context, mask=mask)
