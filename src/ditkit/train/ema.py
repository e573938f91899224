"""Averages of the weights over training: constant decay, and Karras et al.'s power functions with reconstruction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ditkit.core.errors import ConfigError


class Decay(ABC):
    """How much of the old average is kept at each step."""

    @abstractmethod
    def beta(self, step: int) -> float:
        """Weight of the old average at `step`, counted from 1."""


@dataclass(frozen=True)
class Constant(Decay):
    """e <- d e + (1 - d) p, first synchronised with d = 0 (DiT)."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"EMA: decay={self.decay} should lie in [0, 1)")

    def beta(self, step: int) -> float:
        return 0.0 if step <= 1 else self.decay


@dataclass(frozen=True)
class Power(Decay):
    """beta = (1 - 1 / step)^(gamma + 1): a profile whose width is `std` of the training so far (EDM2, eq. 121-127)."""

    std: float = 0.05

    def __post_init__(self) -> None:
        exponent(self.std)

    def beta(self, step: int) -> float:
        return (1 - 1 / step) ** (exponent(self.std) + 1)


def exponent(std: float) -> float:
    """gamma of a power-function average with relative standard deviation `std` (EDM2, eq. 126).

    The largest root of x^3 + 7 x^2 + (16 - std^-2) x + (12 - std^-2) = 0.

    Raises:
        ConfigError: no average is that wide (std of gamma = 0 is 0.2887).
    """
    widest = 12**-0.5
    if not 0 < std <= widest:
        raise ConfigError(f"EMA: std={std} should lie in (0, {widest:.4f}]")
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def relative_std(gamma: float) -> float:
    """Inverse of `exponent` (EDM2, eq. 123)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


class Average:
    """A running average of a module's parameters; buffers are copied. Kept in float32 on the parameters' device."""

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        self.decay = decay
        self.state = {k: v.detach().float().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 1."""
        trained = dict(module.named_parameters())
        names = [k for k in self.state if k in trained]
        averages, fresh = [self.state[k] for k in names], [trained[k].detach().float() for k in names]
        torch._foreach_lerp_(averages, fresh, 1 - self.decay.beta(step))
        for name, buffer in module.named_buffers():
            if name in self.state:
                self.state[name].copy_(buffer)


def correlation(step_a: Tensor, std_a: Tensor, step_b: Tensor, std_b: Tensor) -> Tensor:
    """Inner products of two power-function profiles over training time (EDM2, eq. 144), broadcasting; float64."""
    gamma = np.vectorize(exponent)
    g_a, g_b = (torch.as_tensor(gamma(s.numpy()), dtype=torch.float64) for s in (std_a, std_b))
    ratio = step_a / step_b
    power = torch.where(step_a < step_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * ratio**power / ((g_a + g_b + 1) * torch.maximum(step_a, step_b))


def reconstruct(
    snapshots: Sequence[tuple[int, float, Mapping[str, Tensor]]], step: int, std: float
) -> dict[str, Tensor]:
    """Weights of a power-function average that was not tracked (EDM2, section 3.2 and appendix C).

    Args:
        snapshots: (step, std, state) of tracked averages, saved along training.
        step, std: of the average wanted.

    Raises:
        ConfigError: there is no snapshot, or `step` lies behind the last.
    """
    if not snapshots:
        raise ConfigError("EMA: nothing to reconstruct from, no snapshot was saved")
    if step > max(s for s, _, _ in snapshots):
        raise ConfigError(f"EMA: step={step} lies behind the last snapshot, {max(s for s, _, _ in snapshots)}")
    steps = torch.tensor([s for s, _, _ in snapshots], dtype=torch.float64)
    stds = torch.tensor([s for _, s, _ in snapshots], dtype=torch.float64)
    a = correlation(steps[:, None], stds[:, None], steps[None], stds[None])
    b = correlation(steps, stds, torch.tensor(float(step), dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    weights = torch.linalg.solve(a, b)
    weights = weights / weights.sum()
    first = snapshots[0][2]
    mixed = {
        name: sum(w * state[name].double() for w, (_, _, state) in zip(weights, snapshots, strict=True))
        for name, tensor in first.items()
        if tensor.is_floating_point()
    }
    return {name: torch.as_tensor(mixed.get(name, tensor)).to(tensor.dtype) for name, tensor in first.items()}
