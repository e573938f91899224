"""Rounding that is learned (AdaRound, arXiv 2004.10568), layer after layer or block by block (BRECQ, 2102.05426).

A weight w becomes floor(w / s) + h(alpha), h from 0 to 1, and alpha is trained until every h is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.compress.ranges import Range, search
from ditkit.ops.int8_linear import dequantise, quantise

LOW, HIGH = -0.1, 1.1
"""Gamma and zeta: the sigmoid is stretched to them and cut to 0 and 1."""
HARD = 1e-3
"""An h this near to 0 or 1 is decided."""


class Rounded(nn.Module):
    """A linear layer in training: as it was, with nearest weights, with soft ones, or with hard ones.

    Args:
        linear: the layer, unchanged. bits: of its weights, 8 or 4.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.linear, self.bits = linear, bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = at_least_float32(linear.weight.detach())  # 16 bits would round the steps of alpha away
        self.range: Range = search(weight, bits)
        self.alpha = nn.Parameter(start(weight, self.range))
        self.mode = "full"
        """Or "nearest", "soft", "hard"."""

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights(), self.bias)

    def weights(self, mode: str = "") -> Tensor:
        """Return the weights [N, K] in this mode."""
        mode = mode or self.mode
        if mode == "full":
            return self.linear.weight
        scale, zero = (v[:, None] for v in self.range)
        return dequantise(self.whole(mode), scale, zero).to(self.linear.weight.dtype)

    def whole(self, mode: str) -> Tensor:
        """Return the whole numbers [N, K] of the weights: of soft ones, numbers between."""
        scale, zero = (v[:, None] for v in self.range)
        weight = at_least_float32(self.linear.weight.detach())
        if mode == "nearest":
            return quantise(weight, scale, zero, self.bits)
        up = soft(self.alpha) if mode == "soft" else (self.alpha >= 0).to(weight.dtype)
        return ((weight / scale).floor() + up + zero).clamp(0, 2**self.bits - 1)


def at_least_float32(weight: Tensor) -> Tensor:
    """Return the weight, one of 16 bits in float32."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def start(weight: Tensor, known: Range) -> Tensor:
    """Return the alpha [N, K] whose h is what the floor leaves of w / s."""
    scaled = weight / known.scale.view(-1, *[1] * (weight.ndim - 1))
    rest = scaled - scaled.floor()
    return -((HIGH - LOW) / (rest - LOW) - 1).log()


def soft(alpha: Tensor) -> Tensor:
    """h(alpha) = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)."""
    return (alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


@dataclass(frozen=True)
class Rounding:
    """Settings of learning to round.

    Args:
        iterations: of Adam, for each block. rate: its learning rate. batch: samples of an iteration.
        weight: of the sum of 1 - |2 h - 1|^beta. hot, cold: beta at first and at last, in a straight line.
        warmup: share of the iterations before that sum counts.
    """

    iterations: int = 20_000
    rate: float = 1e-3
    batch: int = 32
    weight: float = 0.01
    hot: float = 20.0
    cold: float = 2.0
    warmup: float = 0.2

    def beta(self, count: int) -> float:
        """Return beta at iteration `count`, from 1."""
        begun = self.warmup * self.iterations
        if count < begun:
            return self.hot
        done = (count - begun) / max(self.iterations - begun, 1e-9)
        return self.cold + (self.hot - self.cold) * max(0.0, 1 - done)

    def undecided(self, layers: Sequence[Rounded], count: int) -> Tensor | float:
        """Return the sum over the weights of `layers` that makes them 0 or 1; nothing in the warm-up."""
        if count < self.warmup * self.iterations:
            return 0.0
        beta = self.beta(count)
        found = [(1 - (2 * soft(layer.alpha) - 1).abs().pow(beta)).sum() for layer in layers]
        return self.weight * torch.stack(found).sum() if found else 0.0


def squared(found: Tensor, expected: Tensor) -> Tensor:
    """Return the squared error, summed over channels and averaged over the rest; channels are at axis 1 (BRECQ)."""
    return (found - expected).square().sum(1).mean()


def learn(
    layers: Sequence[Rounded],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    settings: Rounding,
    seed: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> int:
    """Train the rounding of `layers`, and leave them hard; the number of iterations it took.

    It ends early when every h is decided.

    Args:
        loss: of the numbers of samples, int64 [batch]. samples: how many there are.
        watch: called with each iteration and its loss.
    """
    if not layers:
        return 0
    for layer in layers:
        layer.mode = "soft"
    optimizer = torch.optim.Adam([layer.alpha for layer in layers], settings.rate)
    draw = torch.Generator().manual_seed(seed)
    done = 0
    with torch.enable_grad():
        for count in range(1, settings.iterations + 1):
            chosen = torch.randperm(samples, generator=draw)[: settings.batch]
            total = loss(chosen) + settings.undecided(layers, count)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            done = count
            if watch is not None:
                watch(count, total.item())
            if count % 50 == 0 and count > settings.warmup * settings.iterations and decided(layers) > 0.999:
                break
    for layer in layers:
        layer.mode = "hard"
    return done


@torch.no_grad()
def decided(layers: Sequence[Rounded]) -> float:
    """Return the share of weights whose h is 0 or 1."""
    h = torch.cat([soft(layer.alpha).flatten() for layer in layers])
    return ((h < HARD) | (h > 1 - HARD)).float().mean().item()
