"""Temporal features that are looked up instead of computed (Temporal Feature Matters, arXiv 2407.19547).

S steps, K conditions, N values of a feature, C chunks that have a scale each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditkit.core.errors import ConfigError
from ditkit.nn.quantised import FLOAT, Schedule
from ditkit.nn.time_path import tensors_of
from ditkit.ops.int8_linear import dequantise, pack4, unpack4


def conditions_of(rows: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Return a digest of the condition of each row: all that features depend on beside the time."""
    count = len(next(iter(rows.values())))
    held = [rows[name].detach().to("cpu", torch.float64).reshape(count, -1) for name in names if name in rows]
    joined = torch.cat(held, 1) if held else torch.zeros(count, 0, dtype=torch.float64)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in joined]


class Conditions(Schedule):
    """A schedule that also knows the condition of each row of the call: a class, a prompt's pooled text.

    Args:
        known: digests of the conditions that features are known of. reads: names of the arguments that make them.
    """

    def __init__(
        self, times: Sequence[float], strict: bool, known: Sequence[str] = (), reads: Sequence[str] = ()
    ) -> None:
        super().__init__(times, strict)
        self.known, self.reads = {digest: place for place, digest in enumerate(known)}, tuple(reads)

    def of_call(self) -> list[int | None]:
        """Return the place of each row's condition, None where it is not known; one for all where there are none."""
        if not self.reads:
            return [0]
        given = tensors_of(self.call)
        return [self.known.get(digest) for digest in conditions_of(given, self.reads)]


class TemporalTable(nn.Module):
    """A layer of the time path, of which some steps or all are looked up.

    Args:
        layer: for the other steps; None if there are none.
        chunks: parts of a feature with a scale each: a gate is a hundred times smaller than a scale.
        bits: of the values; 32 are floats.
    """

    keeps: ClassVar[tuple[str, ...]] = (".table", ".table_scale", ".table_zero")
    table: Tensor
    table_scale: Any
    table_zero: Any
    looked_up: Tensor

    def __init__(
        self,
        layer: nn.Module | None,
        inputs: int,
        outputs: int,
        *,
        steps: int,
        conditions: int,
        chunks: int,
        bits: int,
        schedule: Conditions,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.schedule = inputs, outputs, bits, schedule
        self.layer = layer
        width, kind = (
            (outputs + 1) // 2 if bits == 4 else outputs,
            torch.float32 if bits == FLOAT else torch.uint8,
        )
        self.register_buffer("table", torch.zeros(steps, conditions, width, dtype=kind, device=device))
        scales = None if bits == FLOAT else torch.ones(steps, conditions, chunks, device=device)
        self.register_buffer("table_scale", scales)
        self.register_buffer("table_zero", None if scales is None else torch.zeros_like(scales))
        self.register_buffer("looked_up", torch.ones(steps, dtype=torch.bool, device=device))

    @torch.no_grad()
    def hold(self, step: int, condition: int, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take the feature of a step and a condition: whole numbers [N], scale and zero point [C]; or floats [N]."""
        if self.bits == FLOAT:
            self.table[step, condition] = q
            return
        self.table[step, condition] = pack4(q.to(torch.uint8)) if self.bits == 4 else q.to(torch.uint8)
        self.table_scale[step, condition], self.table_zero[step, condition] = scale, zero

    def row(self, step: int, condition: int) -> Tensor:
        """Return a feature, [N] in float32."""
        held = self.table[step, condition]
        if self.bits == FLOAT:
            return held
        whole = unpack4(held, self.out_features) if self.bits == 4 else held
        chunks = self.table_scale.shape[-1]
        scale, zero = (v[step, condition, :, None] for v in (self.table_scale, self.table_zero))
        return dequantise(whole.float().view(chunks, -1), scale, zero).flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the rows of the call, [B, ..., N] for x [B, ..., K].

        Raises:
            ConfigError: a row's condition has no feature, and no layer can compute it.
        """
        rows = len(x)
        steps = self.schedule.of_rows(rows).tolist()
        steps = steps * rows if len(steps) == 1 else steps
        places = self.schedule.of_call()
        places = [place for place in places for _ in range(rows // len(places))]
        found = [
            place is not None and held
            for place, held in zip(places, self.looked_up[steps].tolist(), strict=True)
        ]
        if self.layer is None and not all(found):
            raise ConfigError(
                "the temporal features of a condition of this call are not known, and their layers are gone; compress "
                "the model with a calibration that has it"
            )
        if not any(found) and self.layer is not None:
            computed: Tensor = self.layer(x)
            return computed
        out = x.new_zeros((*x.shape[:-1], self.out_features)) if self.layer is None else self.layer(x)
        known: dict[tuple[int, int | None], Tensor] = {}
        for i, (step, place, held) in enumerate(zip(steps, places, found, strict=True)):
            if held and place is not None:
                if (step, place) not in known:
                    known[step, place] = self.row(step, place).to(out.dtype)
                out[i] = known[step, place]
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move, but do not cast what is kept."""
        before = {name: v for name, v in self._buffers.items() if v is not None and v.is_floating_point()}
        super()._apply(fn, recurse)
        for name, held in before.items():
            moved: Any = self._buffers[name]
            if moved.dtype != held.dtype:
                self._buffers[name] = held.to(moved.device)
        return self


class Absent(nn.Module):
    """A layer that is gone, since nobody reads what it gave.

    Its weight has no values, and is there for those who ask a module's first parameter for its type, as Wan does.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.out_features = outputs
        self.weight = nn.Parameter(torch.zeros(outputs, 0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], self.out_features))
