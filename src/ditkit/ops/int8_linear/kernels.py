"""Products of int8 matrices, of libraries that have one, and the probe that finds the fastest here.

All give the same numbers, up to the rounding of the float32 that they end in. M rows, K inputs, N outputs.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ConfigError, unknown

HALF = 128
"""The middle of eight bits: a - 128 fits an int8."""
PROBE = (256, 128, 256)
"""Rows, inputs and outputs of the product that is timed."""


@dataclass(frozen=True)
class Packed:
    """Weights as a kernel wants them, and what every kernel needs to put zero points right.

    Args:
        weight: of the kernel's own form. scale: [N] float32. zero: [N] int32. sums: [N], sum_k (q - z), float32.
        bias: [N] float32.
        inputs: K. split: a product of two neighbours could leave 16 bits, so that eight bits are taken in two halves.
    """

    weight: Any
    scale: Tensor
    zero: Tensor
    sums: Tensor
    bias: Tensor | None
    inputs: int
    split: bool = False


class Kernel(ABC):
    """A library's product of int8 matrices."""

    name: ClassVar[str]

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Return whether it is installed and runs on `device`."""

    @abstractmethod
    def pack(self, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int = 8) -> Packed:
        """Pack weights: whole numbers q of int8 [N, K], scale [N], zero [N] int32, for rows of `bits`."""

    @abstractmethod
    def product(self, a: Tensor, zero: int, scale: float, packed: Packed) -> Tensor:
        """Compute s sum_k (a - z)(q - z_n) delta_n + bias.

        Args:
            a: whole numbers a - z as float32 [M, K], a from 0 to 255; the kernel may overwrite them.
        """


class Fbgemm(Kernel):
    """torch's quantised linear layer (fbgemm), which takes uint8 rows and int8 weights.

    Without instructions for int8 it adds products of two neighbours in 16 bits, which can overflow where rows and
    weights have eight. Such layers are computed from the two halves of their rows, above the middle and below.
    """

    name = "fbgemm"

    def serves(self, device: torch.device) -> bool:
        engines: list[str] = torch.backends.quantized.supported_engines
        return device.type == "cpu" and "fbgemm" in engines and hasattr(torch.ops.quantized, _FBGEMM)

    def pack(self, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int = 8) -> Packed:
        split = not wide_sums() and overflows(q, 2**bits - 1)
        weight = _prepacked(q, scale, zero, None if split else bias)
        return _packed(weight, q, scale, zero, bias, split)

    def product(self, a: Tensor, zero: int, scale: float, packed: Packed) -> Tensor:
        run = partial(getattr(torch.ops.quantized, _FBGEMM), W_prepack=packed.weight)
        if not packed.split:
            return run(a.mul_(scale), X_scale=scale, X_zero_point=zero)
        middle = a.add_(zero - HALF)
        below = (-middle).clamp_(min=0)
        out = run(middle.clamp_(min=0), X_scale=1.0, X_zero_point=0)
        out = out.sub_(run(below, X_scale=1.0, X_zero_point=0))
        out = out.add_(packed.sums * packed.scale, alpha=HALF - zero)
        return out.mul_(scale) if packed.bias is None else torch.add(packed.bias, out, alpha=scale)


class Torch(Kernel):
    """torch's own `_int_mm`, on a CPU and on CUDA."""

    name = "torch"

    def serves(self, device: torch.device) -> bool:
        return device.type in ("cpu", "cuda")

    def pack(self, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int = 8) -> Packed:
        return _packed(_in_eights(q), q, scale, zero, bias)

    def product(self, a: Tensor, zero: int, scale: float, packed: Packed) -> Tensor:
        rows = len(a)
        middle = a.add_(zero - HALF).to(torch.int8)
        padded = F.pad(_in_eights(middle), (0, 0, 0, max(0, 17 - rows)))  # CUDA wants more than 16 rows
        whole = self.multiply(padded, packed.weight.mT)[:rows, : len(packed.scale)]
        return finished(whole, middle, zero, scale, packed)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply int8 [M, K] by int8 [K, N], to int32."""
        return torch._int_mm(a, b)


class Torchao(Torch):
    """torchao's product, which chooses a kernel of Triton or cuBLAS on CUDA."""

    name = "torchao"

    def serves(self, device: torch.device) -> bool:
        return device.type in ("cpu", "cuda") and _torchao() is not None

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        scaled: Any = _torchao()
        # float64 holds every sum of int32
        return scaled(a, b, torch.ones(1, 1, dtype=torch.float64, device=a.device))


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Fbgemm(), Torchao(), Torch())}
_FBGEMM = "linear_with_input_q_dq_qweight_dq_output_fp32"


def find(name: str, device: torch.device) -> Kernel:
    """Return a kernel by its name, or the fastest on `device` for "auto".

    Raises:
        ConfigError: it is unknown, or no library has a product of int8 there.
    """
    if name == "auto":
        return fastest(device)
    if name not in KERNELS:
        raise ConfigError(unknown("int8 kernel", name, ("auto", *KERNELS)))
    if not KERNELS[name].serves(device):
        known = [kernel.name for kernel in KERNELS.values() if kernel.serves(device)]
        raise ConfigError(
            f"int8 kernel {name!r} does not run on {device.type!r}, expected {' or '.join(known) or 'another device'}"
        )
    return KERNELS[name]


@lru_cache(maxsize=8)
def fastest(device: torch.device) -> Kernel:
    """Return the kernel that takes the least time in `measure`; found once in a process.

    Raises:
        ConfigError: no library has a product of int8 on `device`.
    """
    seconds = measure(device)
    if not seconds:
        raise ConfigError(f"no library here has a product of int8 on {device.type!r}, expected cpu or cuda")
    return KERNELS[min(seconds, key=seconds.__getitem__)]


def measure(device: torch.device, sizes: tuple[int, int, int] = PROBE, bits: int = 8) -> dict[str, float]:
    """Time one product of each kernel that serves `device` and gives the right numbers, in seconds by name."""
    serving = [kernel for kernel in KERNELS.values() if kernel.serves(device)]
    if not serving:
        return {}
    rows, inputs, outputs = sizes
    draw = torch.Generator().manual_seed(0)
    a, q = (
        torch.randint(low, high, shape, generator=draw).to(device)
        for low, high, shape in ((0, 2**bits, (rows, inputs)), (-HALF, HALF, (outputs, inputs)))
    )
    expected = (a.double() @ q.double().mT).float()
    one = torch.ones(outputs, device=device)
    seconds = {}
    for kernel in serving:
        packed = kernel.pack(q.to(torch.int8), one, torch.zeros_like(one, dtype=torch.int32), None, bits)
        run = partial(kernel.product, zero=0, scale=1.0, packed=packed)
        if torch.allclose(run(a.float()), expected, rtol=1e-5):
            seconds[kernel.name] = _seconds(partial(_again, run, a), device)
    return seconds


def overflows(q: Tensor, largest: int) -> bool:
    """Return whether two neighbours of int8 weights [N, K], times rows of 0 to `largest`, can leave 16 bits."""
    even = F.pad(q.to(torch.int32), (0, q.shape[1] % 2)).unflatten(1, (-1, 2))
    most, least = even.clamp(min=0).sum(-1).amax(), even.clamp(max=0).sum(-1).amin()
    return bool((largest * most > 2**15 - 1) | (largest * least < -(2**15)))


@lru_cache(maxsize=1)
def wide_sums() -> bool:
    """Return whether fbgemm adds products in 32 bits here, as instructions for int8 do."""
    ones = torch.ones(16)
    weight = _prepacked(
        torch.full((16, 64), 127, dtype=torch.int8), ones, torch.zeros(16, dtype=torch.int32), None
    )
    rows = torch.full((16, 64), 255.0)
    out = getattr(torch.ops.quantized, _FBGEMM)(rows, 1.0, 0, weight)
    return bool((out == 255 * 127 * 64).all())


def finished(whole: Tensor, a: Tensor, zero: int, scale: float, packed: Packed) -> Tensor:
    """Put zero points, scales and bias right after sum_k (a - 128) q, int32 [M, N].

    sum (a - z)(q - z_n) = sum a' q - z_n sum a' - z' sum (q - z_n), a' = a - 128 and z' = z - 128; zero points are
    subtracted from whole numbers, which loses nothing.
    """
    shift = a.sum(1, dtype=torch.int32)[:, None] * packed.zero
    whole = whole - shift - (zero - HALF) * packed.sums.to(whole.dtype)
    return torch.addcmul(packed.bias if packed.bias is not None else whole.new_zeros(1, dtype=torch.float32),
                         whole.float(), packed.scale * scale)  # fmt: skip


def _packed(
    weight: Any, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, split: bool = False
) -> Packed:
    sums = (q.sum(1, dtype=torch.int32) - q.shape[1] * zero).float()
    return Packed(weight, scale, zero, sums, bias, q.shape[1], split)


def _prepacked(q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Any:
    """Weights in fbgemm's form; torch warns that it will move them elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(q, scale.double(), zero.long(), 0)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            return torch.ops.quantized.linear_prepack(weight, bias)
        finally:
            torch.backends.quantized.engine = engine


def _in_eights(a: Tensor) -> Tensor:
    """Pad `a` [M, K] with zeros to multiples of eight, as CUDA wants them."""
    return F.pad(a, (0, -a.shape[1] % 8, 0, -a.shape[0] % 8))


def _torchao() -> Callable[..., Tensor] | None:
    try:
        from torchao.kernel import int_scaled_matmul
    except ImportError:
        return None
    found: Callable[..., Tensor] = int_scaled_matmul
    return found


def _again(run: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """Run on a copy: a kernel may overwrite what it is given."""
    return run(a.clone().float())


def _seconds(run: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Return the least seconds of some calls, after one that is not counted."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])
