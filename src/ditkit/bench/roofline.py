"""Roofs of a machine, measured: how fast it multiplies, and how fast it reads and writes memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ditkit.bench.timing import seconds_of

SIDE, MEGABYTES, ROUNDS = 1024, 128, 5
"""Side of the matrices multiplied; size of the array copied, far more than a cache holds; rounds, of which the best
counts."""


@dataclass(frozen=True)
class Roofs:
    """The most that the machine did in a probe of a second.

    Args:
        flops: floating-point operations a second, two for each multiply-accumulate, of a large matrix product.
        bandwidth: bytes a second, read and written, of a large copy.
    """

    flops: float
    bandwidth: float
    dtype: str
    threads: int

    @property
    def ridge(self) -> float:
        """Return the intensity, FLOP a byte, below which memory is the limit."""
        return self.flops / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """Return the operations a second that this intensity, FLOP a byte, allows."""
        return min(self.flops, intensity * self.bandwidth)

    def side(self, intensity: float) -> str:
        """Return which roof an intensity is under."""
        return "memory" if intensity < self.ridge else "compute"


def measure_roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    """Measure the roofs of `device` for products of `dtype`, with the threads that torch has now."""
    a = torch.randn(SIDE, SIDE, device=device).to(dtype)
    source = torch.ones(MEGABYTES * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        product = min(seconds_of(lambda: a @ a) for _ in range(ROUNDS))
        copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(ROUNDS))
    return Roofs(
        flops=2 * SIDE**3 / product,
        bandwidth=2 * source.numel() * source.element_size() / copy,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
