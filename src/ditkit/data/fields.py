"""Fields that change in time: gridded variables, or several series as a grid of one cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError, ShapeError, unknown
from ditkit.data.calendar import Step, Times
from ditkit.data.clock import CLOCK, Clock
from ditkit.data.netcdf import read as read_netcdf
from ditkit.data.pinned import find, read_pinned
from ditkit.data.repair import Raw, chosen_repairs, regular


@dataclass(frozen=True, eq=False)
class Scaling:
    """Mean and standard deviation of each variable, float64 [C] in its unit.

    Both ways are computed in float64: of a meter at 123,456,789 +- 10, float32 would leave four distinct values.
    """

    mean: Tensor
    std: Tensor

    def normalise(self, x: Tensor) -> Tensor:
        """(x - mean) / std for [B, C, ...], in float32."""
        return ((x.double() - _beside(self.mean, x)) / _beside(self.std, x)).float()

    def restore(self, x: Tensor) -> Tensor:
        """Invert the normalisation, x std + mean for [B, C, ...], in float64."""
        return x.double() * _beside(self.std, x) + _beside(self.mean, x)


@dataclass(frozen=True, eq=False)
class FieldSet:
    """Fields at evenly spaced times, all in memory: N times, C variables, H rows and W columns of cells.

    A cell that never holds data, or is padding, is False in `valid` and 0 in `values`; it counts in no
    score. A series has H = W = 1.
    """

    name: str
    values: Tensor  # [N, C, H, W]: float32 or float64 in `units`, or float32 normalised by `scaling`
    times: Times  # datetime64 [N], one `step` apart
    step: Step
    variables: tuple[str, ...]
    units: tuple[str, ...]
    valid: Tensor | None = None  # bool [C, H, W]
    scaling: Scaling | None = None
    lead_in: int = 0  # so many first frames may be observed, and are never a target
    clock: Clock = CLOCK  # of `times`

    def __post_init__(self) -> None:
        shape, kind = list(self.values.shape), self.values.dtype
        kinds = (torch.float32, torch.float64) if self.scaling is None else (torch.float32,)
        if kind not in kinds or len(shape) != 4:
            raise DataError(f"{self.name}: values are {kind} {shape}, expected torch.float32 [N, C, H, W]")
        counts = {"values": shape[1], "variables": len(set(self.variables)), "units": len(self.units)}
        if len(set(counts.values())) != 1:
            raise DataError(f"{self.name}: numbers of variables differ: {counts}")
        if self.times.shape != (shape[0],) or self.times.dtype.kind != "M":
            found = f"{self.times.dtype} {list(self.times.shape)}"
            raise DataError(f"{self.name}: times are {found}, expected datetime64 [{shape[0]}]")
        uneven = np.flatnonzero(self.step.index(self.times) != np.arange(shape[0]))
        if uneven.size:
            i = int(uneven[0])
            before, time = (self.clock.shown(self.times[k]) for k in (i - 1, i))
            raise DataError(
                f"{self.name}: time {time} at index {i} follows {before}, expected one step ({self.step}) between them"
            )
        if self.valid is not None and (self.valid.dtype != torch.bool or list(self.valid.shape) != shape[1:]):
            found = f"{self.valid.dtype} {list(self.valid.shape)}"
            raise DataError(f"{self.name}: valid is {found}, expected torch.bool {shape[1:]}")
        if broken := int((~self.values.isfinite()).sum()):
            raise DataError(f"{self.name}: {broken} of {self.values.numel()} values are not finite")

    def __len__(self) -> int:
        return len(self.values)

    def split(self, validation: float = 0.1, test: float = 0.2, lead_in: int = 0) -> Parts:
        """Training, validation and test part in the order of time; no part holds a target of another.

        Args:
            validation, test: a fraction below 1, or a number of steps; the rest is for training.
            lead_in: so many steps before the validation and the test part may be observed in them, so that
                their first target is the first frame after the border; give the observed frames of a window.

        Raises:
            ConfigError: sizes that leave less than one step, or less than `lead_in`, for training.
        """
        integer("lead_in", lead_in, least=0)
        held_out = _steps("validation", validation, len(self)), _steps("test", test, len(self))
        border = len(self) - sum(held_out)
        if border < max(lead_in, 1):
            raise ConfigError(
                f"{self.name}: validation={validation} and test={test} leave {border} of {len(self)} steps for "
                f"training, expected at least {max(lead_in, 1)}"
            )
        second = border + held_out[0]
        return Parts(
            self._part("training", 0, border, 0),
            self._part("validation", border, second, lead_in),
            self._part("test", second, len(self), lead_in),
        )

    def _part(self, name: str, start: int, stop: int, lead_in: int) -> FieldSet:
        chosen = slice(start - lead_in, stop)
        return replace(
            self,
            name=f"{self.name} ({name})",
            values=self.values[chosen],
            times=self.times[chosen],
            lead_in=lead_in,
        )

    def fit_scaling(self) -> Scaling:
        """Mean and (biased) standard deviation of each variable over all times and valid cells.

        Raises:
            DataError: no times, or a variable that never changes.
        """
        valid = self._valid_cells()
        columns = [self.values[:, c, valid[c]].double() for c in range(len(self.variables))]
        for name, column in zip(self.variables, columns, strict=True):
            if not column.numel() or column.min() == column.max():
                found = f"constant at {column[0, 0]:g}" if column.numel() else "empty"
                raise DataError(
                    f"{self.name}: variable {name!r} is {found} in all {len(self)} steps, which gives no "
                    "standard deviation; leave it out"
                )
        mean = torch.stack([column.mean() for column in columns])
        std = torch.stack([column.std(correction=0) for column in columns])
        return Scaling(mean, std)

    def normalised(self, scaling: Scaling) -> FieldSet:
        """With values (x - mean) / std, which keeps `scaling`. Raises ConfigError if it is normalised already."""
        if self.scaling is not None:
            raise ConfigError(f"{self.name} is normalised already")
        values = scaling.normalise(self.values).where(self._valid_cells(), torch.zeros(()))
        return replace(self, values=values, scaling=scaling)

    def chosen(self, variables: Sequence[str]) -> FieldSet:
        """With these variables only, in this order. Raises ConfigError where one is not there."""
        for name in variables:
            if name not in self.variables:
                raise ConfigError(f"{self.name}: " + unknown("variable", name, self.variables))
        places = [self.variables.index(name) for name in variables]
        return replace(
            self,
            values=self.values[:, places],
            variables=tuple(variables),
            units=tuple(self.units[i] for i in places),
            valid=None if self.valid is None else self.valid[places],
        )

    def cropped(self, patch: int) -> FieldSet:
        """Drop the last rows and columns until both sides divide by `patch`."""
        height, width = (side - side % integer("patch", patch, least=1) for side in self.values.shape[2:])
        if not height or not width:
            raise ShapeError(
                f"{self.name}: {list(self.values.shape[2:])} cells hold no patch of {patch} x {patch}"
            )
        valid = None if self.valid is None else self.valid[:, :height, :width]
        return replace(self, values=self.values[:, :, :height, :width], valid=valid)

    def padded(self, patch: int) -> FieldSet:
        """Rows and columns added after the last ones, until both sides divide by `patch`; they are not valid."""
        down, right = (-side % integer("patch", patch, least=1) for side in self.values.shape[2:])
        if not down and not right:
            return self
        margin = (0, right, 0, down)
        return replace(self, values=pad(self.values, margin), valid=pad(self._valid_cells(), margin))

    def count(self, observed: int, horizon: int) -> int:
        """Windows of `observed` frames followed by `horizon` targets. Raises DataError if there is none."""
        integer("observed", observed, least=1)
        integer("horizon", horizon, least=1)
        count = len(self) - max(observed, self.lead_in) - horizon + 1
        if count < 1:
            lead_in = f" (the first {self.lead_in} are no targets)" if self.lead_in else ""
            raise DataError(
                f"{self.name} has {len(self)} steps{lead_in}, expected at least "
                f"{max(observed, self.lead_in) + horizon} for one window of observed={observed} and horizon={horizon}"
            )
        return count

    def window(self, start: int, observed: int, horizon: int) -> tuple[Tensor, Tensor]:
        """Window number `start`: the observed frames [C, T, H, W] and the targets [C, T', H, W]."""
        given, target = self.batch([start], observed, horizon)
        return given[0], target[0]

    def batch(self, starts: Sequence[int], observed: int, horizon: int) -> tuple[Tensor, Tensor]:
        """Windows `starts`: [n, C, observed, H, W] and [n, C, horizon, H, W].

        Raises:
            ConfigError: a window that the set does not have.
            DataError: the set is too short for any.
        """
        count = self.count(observed, horizon)
        first = torch.tensor([integer("start", start, least=0, most=count - 1) for start in starts])
        offset = max(self.lead_in - observed, 0)
        frames = first[:, None] + offset + torch.arange(observed + horizon)
        clips = self.values[frames].transpose(1, 2)
        return clips[:, :, :observed].contiguous(), clips[:, :, observed:].contiguous()

    def target_times(self, start: int, observed: int, horizon: int) -> Times:
        """Return the times of the targets of window `start`: [horizon]."""
        first = start + max(self.lead_in, observed)
        return self.times[first : first + horizon]

    def batches(
        self, observed: int, horizon: int, size: int, stride: int = 1
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Every `stride`-th window in order, `size` at a time: their numbers, observed frames and targets."""
        numbers = range(0, self.count(observed, horizon), integer("stride", stride, least=1))
        for i in range(0, len(numbers), integer("size", size, least=1)):
            chosen = numbers[i : i + size]
            yield chosen, *self.batch(chosen, observed, horizon)

    def _valid_cells(self) -> Tensor:
        return (
            self.values.new_ones(self.values.shape[1:], dtype=torch.bool)
            if self.valid is None
            else self.valid
        )


class Parts(NamedTuple):
    """A set cut in time."""

    training: FieldSet
    validation: FieldSet
    test: FieldSet

    def normalised(self) -> Parts:
        """All three with the mean and standard deviation of the training part."""
        scaling = self.training.fit_scaling()
        return Parts(*(part.normalised(scaling) for part in self))


def load(
    path: str | Path,
    variables: Sequence[str] | None = None,
    repair: str | Sequence[str] = (),
    max_bytes: int = 4 * 2**30,
) -> FieldSet:
    """Load a user's netCDF file: the chosen variables, or all over (time, y, x), which must share one grid.

    Repairs ("sort", "first", "interpolate") are those of `ditkit.data.repair`; a cell without any value is
    no fault, it is not valid.

    Raises:
        DataError: not such a file, unreadable or uneven times, a value missing, or more than `max_bytes`.
        ConfigError: an unknown variable or repair, or the package netCDF4 is not installed.
    """
    repairs = chosen_repairs(repair)
    path = Path(path)
    return field_set(path.stem, read_netcdf(path, variables, max_bytes=max_bytes), repairs)


def load_pinned(name: str, debian_file: Path, sha256: str, install: str, size: int | None) -> FieldSet:
    """Load a named set of one netCDF file, from Debian's place for it or from a folder of `pinned.roots()`.

    Raises:
        DataError: it is not found, which says to `install`, or has another checksum.
        ConfigError: a size, which fields have of their own.
    """
    if size is not None:
        raise ConfigError(
            f"{name}: size={size}, expected none: fields keep their grid; see FieldSet.cropped and FieldSet.padded"
        )
    path = debian_file if debian_file.exists() else find([debian_file.name])
    if path is None:
        raise DataError(
            f"the {name} set is not on this machine: run {install} (Debian), or put {debian_file.name} in the "
            "current folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
        )
    return field_set(name, read_netcdf(path, content=read_pinned(path, sha256)), frozenset())


def field_set(name: str, raw: Raw, repairs: frozenset[str]) -> FieldSet:
    """`raw` checked and repaired, cells without any value marked as not valid."""
    raw, step = regular(raw, repairs)
    values = torch.from_numpy(raw.values)
    missing = values.isnan()
    return FieldSet(
        name=name,
        values=values.nan_to_num(0.0),
        times=raw.times,
        step=step,
        variables=raw.variables,
        units=raw.units,
        valid=~missing.all(0) if missing.any() else None,
        clock=raw.clock,
    )


def _steps(what: str, given: float, total: int) -> int:
    """Convert a fraction of `total` to a number of steps; a whole number stays as it is."""
    if isinstance(given, float) and 0 <= given < 1:
        return round(given * total)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ConfigError(f"{what}={given!r} should be a fraction in [0, 1) or a whole number of steps")
    return given


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...] beside x, [B, C, ...]."""
    return values.view(1, -1, *[1] * (x.ndim - 2)).to(x.device, torch.float64)
