"""Averages of the weights over training: constant decay, and power functions (EDM2, arXiv 2312.02696)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ditkit.core.config import Checked, Share
from ditkit.core.errors import ConfigError


class Decay(Checked, ABC):
    """The share of the old average that is kept at each step."""

    @abstractmethod
    def beta(self, step: int) -> float:
        """Weight of the old average at `step`, counted from 1."""


@dataclass(frozen=True)
class Constant(Decay):
    """e <- d e + (1 - d) p, first synchronised with d = 0 (DiT)."""

    decay: Share = 0.9999

    def beta(self, step: int) -> float:
        return 0.0 if step <= 1 else self.decay


@dataclass(frozen=True)
class Power(Decay):
    """beta = (1 - 1 / step)^(gamma + 1): a profile of width `std` of the training so far (EDM2, eq. 127)."""

    std: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        exponent(self.std)

    def beta(self, step: int) -> float:
        return (1 - 1 / step) ** (exponent(self.std) + 1)


def exponent(std: float) -> float:
    """Compute gamma of a power-function average with relative standard deviation `std` (EDM2, eq. 126).

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
    """A running average of a module's trained parameters, in float32 or wider on their device.

    Buffers are copied, unless some parameters are frozen: then neither these nor buffers are kept (`whole`).
    """

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        self.decay = decay
        trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        frozen = any(not p.requires_grad for p in module.parameters())
        values = module.state_dict(keep_vars=True)
        kept = {k for k, v in values.items() if k in trained or not (frozen or isinstance(v, nn.Parameter))}
        self.state = {k: _wide(v.detach()).clone() for k, v in values.items() if k in kept}

    def whole(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the average with all else that the module holds."""
        return {**module.state_dict(), **self.state}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 1."""
        fresh = module.state_dict(keep_vars=True)
        trained = [k for k in self.state if isinstance(fresh[k], nn.Parameter)]
        averages = [self.state[k] for k in trained]
        torch._foreach_lerp_(averages, [_wide(fresh[k].detach()) for k in trained], 1 - self.decay.beta(step))
        for name in self.state.keys() - set(trained):
            self.state[name].copy_(fresh[name])


def _wide(value: Tensor) -> Tensor:
    """At least float32; whole numbers as they are."""
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
