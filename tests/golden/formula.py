"""Weights and inputs by formula, so that two programs can hold the same numbers without a file or a generator.

Element i (row-major, from 0) of the tensor called `name` is s sin(12.9898 i + p) with p = crc32(name) mod 1000 in
radians, in float64; `spread` has sin(0.37 i^2 + p) instead, which is of full rank. With two axes or more s =
1 / sqrt(elements / first axis); with one s = 0.1, and 1 is added where the name ends in "weight" (norms). A single
number stays as it is. Inputs have s = 1. Names are those of the published code's state dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from zlib import crc32

import torch
from torch import Tensor


def tensor(name: str, shape: Sequence[int]) -> Tensor:
    """Return the input `name`, float64, of size 1."""
    return _wave(12.9898 * _numbers(shape), name, shape)


def spread(name: str, shape: Sequence[int]) -> Tensor:
    """Return the input `name` whose matrices have full rank, float64, of size 1."""
    return _wave(0.37 * _numbers(shape) ** 2, name, shape)


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """Return the parameter `name`, float64."""
    if len(shape) == 1:
        return 0.1 * tensor(name, shape) + (1.0 if name.endswith("weight") else 0.0)
    return (shape[0] / math.prod(shape)) ** 0.5 * tensor(name, shape)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return a state dict of the published code by the shapes of its tensors."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def summary(x: Tensor, picks: int = 16) -> dict[str, object]:
    """Return what a golden file keeps of a tensor: shape, sum, sum of absolute values, norm, elements by index."""
    flat = x.detach().double().flatten()
    last = len(flat) - 1
    every = range(len(flat))
    index = [round(k * last / (picks - 1)) for k in range(picks)] if len(flat) > picks else every
    sums = {"sum": flat.sum().item(), "abs": flat.abs().sum().item(), "norm": flat.norm().item()}
    return {"shape": list(x.shape), **sums, "at": {str(k): flat[k].item() for k in index}}


def _numbers(shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64)


def _wave(angle: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    return torch.sin(angle + crc32(name.encode()) % 1000).reshape(tuple(shape))
