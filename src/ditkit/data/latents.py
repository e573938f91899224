"""Latents and what goes with each, such as embedded prompts, from one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import DataError, nearest, unknown
from ditkit.core.slot import Slot

LATENTS = "latents"
NEGATIVE = "negative_"
"""Begins the name of what stands in a dropped prompt's place, which is one row."""


class LatentSet:
    """The samples of a file of latents [N, C, ...] and of what `slots` name, read as batches ask for them.

    Args:
        channels: of the latents. multiples: that their further axes divide by.

    Raises:
        DataError: the file is missing or damaged, lacks a tensor, or has one of another shape or type, one that
            nothing takes, or one that is not finite.
    """

    def __init__(
        self, path: str | Path, slots: Mapping[str, Slot], channels: int, multiples: tuple[int, ...]
    ) -> None:
        self.path, self.slots = Path(path), slots
        held = _read(self.path)
        self.latents = _taken(self.path, held, LATENTS)
        self._check_latents(channels, multiples)
        self.held: dict[str, Tensor] = {}
        self.negative: dict[str, Tensor] = {}
        for name, slot in slots.items():
            if name in held or not slot.optional:
                self.held[name] = self._fitting(name, _taken(self.path, held, name), slot, len(self.latents))
        self._take_negatives(held)
        negative = {NEGATIVE + name: value for name, value in self.negative.items()}
        used = {LATENTS: self.latents, **self.held, **negative}
        if extra := [name for name in held if name not in used]:
            expected = [LATENTS, *slots, *(NEGATIVE + name for name, slot in slots.items() if not slot.below)]
            raise DataError(f"{self.path}: " + unknown("tensor", extra[0], expected))
        for name, value in used.items():
            if odd := [i for i, row in enumerate(value) if not row.isfinite().all()]:
                raise DataError(f"{self.path}: {name!r} holds NaN or infinity in row {odd[0]}")

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor, rng: Any) -> tuple[Tensor, Cond]:
        rows = {self.slots[name].field: _as_input(value[indices]) for name, value in self.held.items()}
        return self.latents[indices].float(), Cond(**rows)  # type: ignore[arg-type]

    @property
    def nothing(self) -> Cond:
        """One row of what stands in a dropped prompt's place; empty where the file does not say."""
        return Cond(
            **{self.slots[n].field: _as_input(_one_row(v, self.slots[n])) for n, v in self.negative.items()}  # type: ignore[arg-type]
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.latents.shape[1:])

    @property
    def rows(self) -> int:
        """Rows of text."""
        texts = [value for name, value in self.held.items() if self.slots[name].field == "text"]
        return texts[0].shape[1] if texts else 0

    def facts(self) -> str:
        """Describe the file in one line."""
        named = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in self.held.items())
        texts = [name for name in self.held if not self.slots[name].below]
        absent = "" if self.negative or not texts else ", nothing for dropped prompts"
        return f"{len(self)} latents {list(self.shape)}, {named}{absent}"

    def _check_latents(self, channels: int, multiples: tuple[int, ...]) -> None:
        shape = list(self.latents.shape)
        axes = ("T", "H", "W")[-len(multiples) :]
        expected = f"[N, {channels}, {', '.join(axes)}]"
        if not self.latents.is_floating_point():
            raise DataError(f"{self.path}: {LATENTS!r} holds {self.latents.dtype}, expected fractions")
        if len(shape) != 2 + len(multiples) or shape[1] != channels or not shape[0]:
            raise DataError(f"{self.path}: {LATENTS!r} is {shape}, expected {expected}")
        for axis, size, multiple in zip(axes, shape[2:], multiples, strict=True):
            if size % multiple or not size:
                raise DataError(
                    f"{self.path}: {LATENTS!r} is {shape}, expected {expected} with {axis} a multiple of {multiple}"
                )

    def _fitting(self, name: str, value: Tensor, slot: Slot, count: int, what: str = "") -> Tensor:
        """Return the tensor if it is `count` rows of the slot's shape and kind."""
        label, found, wanted = what or name, list(value.shape), [count, *slot.shape]
        same = len(found) == len(wanted) and all(
            isinstance(b, str) or a == b for a, b in zip(found, wanted, strict=True)
        )
        if not same:
            raise DataError(f"{self.path}: {label!r} is {found}, expected [{', '.join(map(str, wanted))}]")
        if slot.below:
            if value.is_floating_point():
                raise DataError(f"{self.path}: {label!r} holds {value.dtype}, expected whole numbers")
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < slot.below:
                raise DataError(
                    f"{self.path}: {label!r} goes from {value.min()} to {value.max()}, expected 0 to {slot.below - 1}"
                )
        return value

    def _take_negatives(self, held: Mapping[str, Tensor]) -> None:
        """Take all that stands in a dropped prompt's place, or nothing of it."""
        texts = [name for name in self.held if not self.slots[name].below]
        given = [name for name in texts if NEGATIVE + name in held]
        if lost := [name for name in texts if given and name not in given]:
            raise DataError(
                f"{self.path}: got {NEGATIVE + given[0]!r} without {NEGATIVE + lost[0]!r}, expected both"
            )
        for name in given:
            value = _one_row(held[NEGATIVE + name], self.slots[name])
            own = self.slots[name]._replace(shape=tuple(self.held[name].shape[1:]))
            self.negative[name] = self._fitting(name, value, own, 1, NEGATIVE + name)


def _one_row(value: Tensor, slot: Slot) -> Tensor:
    return value[None] if value.ndim == len(slot.shape) else value


def _as_input(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _taken(path: Path, held: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in held:
        raise DataError(
            f"{path}: no tensor {name!r}; it has {', '.join(held) or 'none'}{nearest(name, held)}"
        )
    return held[name]


def _read(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file into memory."""
    if not path.is_file():
        raise DataError(f"no file {path}; expected one safetensors file of latents")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a complete safetensors file: {error}") from error
