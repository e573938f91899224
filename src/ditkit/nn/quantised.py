"""A linear layer of whole numbers, and the schedule by which it knows the step it is in.

B samples, K inputs, N outputs, S steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ConfigError, ShapeError
from ditkit.ops.int8_linear import Packed, dequantise, find, pack4, unpack4
from ditkit.ops.int8_linear.kernels import HALF

FLOAT: Literal[32] = 32
"""Bits of a number that is not quantised."""
TIMES = ("t", "timestep")
"""Names of the argument of a network's forward that is its time."""


class Schedule:
    """The steps for which ranges are known, and the steps of the rows of the call that runs.

    It is no state of a trajectory: each call of the network sets it before its first layer, for its thread alone.

    Args:
        times: as the network is given them, in the order of the steps.
        strict: refuse a time that is none of them; else the nearest one's ranges serve.
    """

    def __init__(self, times: Sequence[float] = (), strict: bool = False) -> None:
        self.times, self.strict = tuple(times), strict
        self._running = threading.local()

    @property
    def steps(self) -> Tensor:
        """The step of each row of the call that this thread runs, [B] on the CPU."""
        found: Tensor | None = getattr(self._running, "steps", None)
        return torch.zeros(1, dtype=torch.long, device="cpu") if found is None else found

    @steps.setter
    def steps(self, steps: Tensor) -> None:
        self._running.steps = steps

    @property
    def call(self) -> Mapping[str, Any]:
        """The arguments of the call that this thread runs."""
        return getattr(self._running, "call", {})

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle all but the call that runs."""
        return {name: value for name, value in vars(self).items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _running=threading.local())

    def attach(self, network: nn.Module, bound: Callable[..., Mapping[str, Any]]) -> Any:
        """Let each call of `network` set the steps; `bound` names its arguments. Returns the handle of the hook."""

        self.bound = bound
        # a method: a deep copy of the network has one of the copied schedule, which its layers share
        return network.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.call = self.bound(args, kwargs)
        self.steps = self.nearest(next(self.call[name] for name in TIMES if name in self.call))

    def nearest(self, t: Any) -> Tensor:
        """Return the step whose time is nearest, of each row, [B] on the CPU.

        Raises:
            ConfigError: the schedule is strict, and has no such time.
        """
        given = torch.as_tensor(t).detach().to("cpu", torch.float64).reshape(-1)
        if not self.times:
            return torch.zeros(len(given), dtype=torch.long, device="cpu")
        known = torch.tensor(self.times, dtype=torch.float64, device="cpu")
        distance, steps = (given[:, None] - known).abs().min(1)
        reach = 1e-4 * known.abs().max().clamp(min=1e-12)
        if self.strict and (distance > reach).any():
            odd = given[distance > reach][0].item()
            raise ConfigError(
                f"the temporal features are of {len(self.times)} times, {self.times[0]:g} to {self.times[-1]:g}, "
                f"without {odd:g}; sample by the schedule that they were computed for"
            )
        return steps

    def of_rows(self, rows: int) -> Tensor:
        """Return the step of each of `rows` leading rows, [1] where all are in one.

        Raises:
            ShapeError: they are not a multiple of the rows of the call.
        """
        if bool((self.steps == self.steps[0]).all()):
            return self.steps[:1]
        if rows % len(self.steps):
            raise ShapeError(f"a quantised layer has {rows} rows, expected a multiple of {len(self.steps)}")
        return self.steps.repeat_interleave(rows // len(self.steps))


class QuantisedLinear(nn.Module):
    """y = s delta sum (a - z)(q - z_n) + bias, of rows a of 7 or 8 bits and weights q of 8 or 4.

    Weights are rounded for each output channel. Rows are rounded by one range a step (`ranges` of them), or, without
    ranges, by one of each row that is taken from it.

    Args:
        bits: of weights. activations: bits of rows; 32 leaves them as they are, and weights are made floats.
        ranges: S, one for all steps, or 0.
        kernel: a name of `ditkit.ops.int8_linear.KERNELS`, or "auto".
    """

    keeps: ClassVar[tuple[str, ...]] = (".weight_scale", ".range_scale", ".range_zero")
    """Endings of tensors that keep their type, whatever the model is cast to."""
    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    range_scale: Any
    range_zero: Any

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        *,
        bits: int = 8,
        activations: int = 8,
        ranges: int = 0,
        kernel: str = "auto",
        schedule: Schedule | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.bits, self.activations, self.kernel = bits, activations, kernel
        self.schedule = Schedule() if schedule is None else schedule
        width, kind = (inputs, torch.int8) if bits == 8 else ((inputs + 1) // 2, torch.uint8)
        self.register_buffer("weight", torch.zeros(outputs, width, dtype=kind, device=device))
        self.register_buffer("weight_scale", torch.ones(outputs, device=device))
        self.register_buffer("weight_zero", torch.zeros(outputs, dtype=torch.int32, device=device))
        self.register_buffer("range_scale", torch.ones(ranges, device=device) if ranges else None)
        self.register_buffer("range_zero", torch.zeros(ranges, device=device) if ranges else None)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device)) if bias else None
        self._packed: tuple[Any, Packed] | None = None
        self._ranges: tuple[Any, list[tuple[float, int]]] | None = None

    @classmethod
    def like(cls, linear: nn.Linear, **given: Any) -> Self:
        """Return a layer of the shape of `linear`, on its device."""
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            **given,
        )

    def hold(self, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
        """Take weights: whole numbers q [N, K] from 0 to 2^bits - 1, with scale and zero point [N]."""
        with torch.no_grad():
            whole = q.to(torch.uint8)
            middle = HALF if self.bits == 8 else 0
            held = (q - middle).to(torch.int8) if self.bits == 8 else pack4(whole)
            self.weight.copy_(held)
            self.weight_scale.copy_(scale)
            self.weight_zero.copy_(zero - middle)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def whole(self) -> Tensor:
        """Return the weights as int8 [N, K], as `weight_zero` counts them."""
        return self.weight if self.bits == 8 else unpack4(self.weight, self.in_features).to(torch.int8)

    def full(self) -> Tensor:
        """Return the weights as float32 [N, K]."""
        return dequantise(self.whole().float(), self.weight_scale[:, None], self.weight_zero[:, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.activations == FLOAT:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.full().to(x.dtype), bias)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _StraightThrough.apply(x, self)
            return out
        return self.integer(x)

    def integer(self, x: Tensor) -> Tensor:
        """Run the product of whole numbers; rows of several steps are taken step by step."""
        with torch.no_grad():
            packed, kernel = self.packed(), find(self.kernel, x.device)
            if self.range_scale is None:
                out = self._by_row(x, packed, kernel)
            elif len(steps := self._steps(x)) == 1:
                out = self._by_step(x, int(steps), packed, kernel)
            else:
                out = x.new_empty((*x.shape[:-1], self.out_features))
                for step in steps.unique().tolist():
                    chosen = (steps == step).to(x.device)
                    out[chosen] = self._by_step(x[chosen], step, packed, kernel)
            return out.to(x.dtype)

    def packed(self) -> Packed:
        """Return the weights as the kernel wants them: kept for 8 bits; for 4, which are to be small, new ones."""
        key = _versions(self.weight, self.weight_scale, self.weight_zero, self.bias)
        if self._packed is not None and self._packed[0] == key:
            return self._packed[1]
        kernel = find(self.kernel, self.weight.device)
        bias = None
        if (
            self.range_scale is not None and self.bias is not None
        ):  # else it is added after the scales of rows
            bias = self.bias.detach().float()
        packed = kernel.pack(self.whole(), self.weight_scale, self.weight_zero, bias, self.activations)
        self._packed = (key, packed) if self.bits == 8 else None
        return packed

    def ranges(self) -> list[tuple[float, int]]:
        """Return scale and zero point of each step, as numbers."""
        key = _versions(self.range_scale, self.range_zero)
        if self._ranges is None or self._ranges[0] != key:
            pairs = zip(self.range_scale.tolist(), self.range_zero.tolist(), strict=True)
            self._ranges = (key, [(scale, int(zero)) for scale, zero in pairs])
        return self._ranges[1]

    def _steps(self, x: Tensor) -> Tensor:
        if len(self.range_scale) == 1:
            return torch.zeros(1, dtype=torch.long, device="cpu")
        return self.schedule.of_rows(len(x))

    def _by_step(self, x: Tensor, step: int, packed: Packed, kernel: Any) -> Tensor:
        scale, zero = self.ranges()[step]
        a = (x.reshape(-1, self.in_features).float() / scale).round_()
        a.clamp_(-zero, 2**self.activations - 1 - zero)
        return kernel.product(a, zero, scale, packed).view(*x.shape[:-1], self.out_features)

    def _by_row(self, x: Tensor, packed: Packed, kernel: Any) -> Tensor:
        """Round each row by its own largest value: a - z from -(2^(b-1) - 1) to as much."""
        rows, middle = x.reshape(-1, self.in_features).float(), 2 ** (self.activations - 1)
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-8) / (middle - 1)
        a = (rows / scale).round_()
        out = kernel.product(a, middle, 1.0, packed).mul_(scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but do not cast: bf16 rounds ranges and scales wrongly."""
        before = {name: v for name, v in self._buffers.items() if v is not None and v.is_floating_point()}
        super()._apply(fn, recurse)
        for name, held in before.items():
            moved: Any = self._buffers[name]
            if moved.dtype != torch.float32:
                self._buffers[name] = held.to(moved.device)
        self._packed = self._ranges = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # fbgemm's form is no tensor

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, activations={self.activations}"


def _versions(*tensors: Tensor | None) -> tuple[tuple[int, int], ...]:
    """Return what changes when one of `tensors` does."""
    return tuple((v.data_ptr(), v._version) for v in tensors if v is not None)


class _StraightThrough(torch.autograd.Function):
    """The product of whole numbers, whose gradient is that of the weights they stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return layer.integer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.full().to(grad.dtype), None
