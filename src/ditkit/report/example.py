"""One forecast to look at, beside what was observed and what followed; its places in time as text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import DataError, ShapeError
from ditkit.data.calendar import MONTH, Step, Times, shown

OBSERVED, FOLLOWED, FORECAST = "observed", "what followed", "forecast"


@dataclass(frozen=True, eq=False)
class Example:
    """A forecast of a clip, whose pixels are in [0, 1], or of one variable, whose values are in `unit`.

    Args:
        observed: [C, T, H, W].
        followed, said: [C, T', H, W].
        variable: of one channel, which is drawn in colours with a scale; "" for a clip, which is drawn as it is.
        step: of time; None where frames only have numbers.
        times: datetime64 [T + T'], where the data have them.
        valid: bool [H, W], where there are cells that never hold data; what they hold is not drawn.
        fps: frames a second of its film.

    Raises:
        ShapeError: shapes that do not belong together.
        DataError: values that are not finite.
    """

    observed: Tensor
    followed: Tensor
    forecast: Tensor
    variable: str = ""
    unit: str = ""
    step: Step | None = None
    times: Times | None = None
    valid: Tensor | None = None
    fps: float = 4.0

    def __post_init__(self) -> None:
        shapes = [list(x.shape) for x in (self.observed, self.followed, self.forecast)]
        first, second, third = shapes
        if second != third or len(first) != 4 or first[:1] + first[2:] != second[:1] + second[2:]:
            raise ShapeError(f"a forecast to draw needs [C, T, H, W] and twice [C, T', H, W], got {shapes}")
        if self.times is not None and len(self.times) != first[1] + second[1]:
            raise ShapeError(f"{len(self.times)} times for {first[1]} + {second[1]} frames")
        for name, x in ((OBSERVED, self.observed), (FOLLOWED, self.followed), (FORECAST, self.forecast)):
            if not x.isfinite().all():
                raise DataError(f"{name} holds NaN or infinite values, expected finite ones")

    @property
    def is_series(self) -> bool:
        """True if it is a variable of one cell, to be drawn as a line."""
        return bool(self.variable) and self.cropped().observed.shape[2:] == (1, 1)

    @property
    def errors(self) -> Tensor:
        """|difference|, averaged over channels: [T', H, W], 0 where there is no data."""
        error = (self.forecast - self.followed).abs().mean(0)
        return error if self.valid is None else error * self.valid

    @property
    def label(self) -> str:
        """The variable with its unit."""
        return ", ".join(filter(None, (self.variable, self.unit)))

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest value of what was observed and what followed, where there is data.

        Where these are one, the span ends 1 above: it is a scale of colours for the forecast, too.
        """
        truth = torch.cat([self.observed, self.followed], 1)
        values = truth if self.valid is None else truth[..., self.valid]
        low, high = values.min().item(), values.max().item()
        return low, high if high > low else low + 1

    def cropped(self) -> Example:
        """Without the outer rows and columns that hold no data, such as padding."""
        if self.valid is None or self.valid.all():
            return replace(self, valid=None)
        rows, columns = (_extent(self.valid.any(axis)) for axis in (1, 0))
        inside = (..., rows, columns)
        valid = self.valid[inside]
        return replace(
            self,
            observed=self.observed[inside],
            followed=self.followed[inside],
            forecast=self.forecast[inside],
            valid=None if valid.all() else valid,
        )

    def heads(self) -> list[str]:
        """For each of the T + T' frames how far it lies from the last observed one, and below that its date."""
        observed, horizon = self.observed.shape[1], self.followed.shape[1]
        leads = [_lead(k, self.step) for k in range(1 - observed, horizon + 1)]
        dates = self.dates()
        return [f"{lead}\n{date}" for lead, date in zip(leads, dates, strict=True)] if dates else leads

    def dates(self) -> list[str]:
        """Format the date of each of the T + T' frames, as fine as the step; empty without times."""
        step, times = self.step, self.times
        return [] if step is None or times is None else [_date(time, step) for time in times]


def lead_unit(step: Step | None) -> tuple[int, str]:
    """Split a step into a number and a unit for lead times: (3, "hours"); without one they are frames."""
    return (1, "frames") if step is None else (step.count, f"{step.unit}s")


def _lead(steps: int, step: Step | None) -> str:
    count, units = lead_unit(step)
    lead = steps * count
    return f"{lead:{'+' if lead else ''}d} {units if abs(lead) != 1 else units.removesuffix('s')}"


def _date(time: np.datetime64, step: Step) -> str:
    """As fine as the step; the clock, if any, on a line of its own."""
    if step.unit == MONTH:
        return str(time.astype("M8[M]"))
    if step.unit == "day":
        return str(time.astype("M8[D]"))
    return shown(time).replace("T", "\n")


def _extent(holds: Tensor) -> slice:
    """From the first to the last true entry."""
    places = holds.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1)
