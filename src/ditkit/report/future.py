"""A forecast of the future as lines: the history, the forecast, and the band between two quantiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ditkit.report.axes import (
    GAP_PX,
    LEFT,
    MARK_GAP_PX,
    MARK_PX,
    PIXELS_PER_INCH,
    SHARPNESS,
    field,
    head,
    line_look,
    number,
    points,
    rise,
    width_px,
)
from ditkit.report.example import FORECAST, OBSERVED
from ditkit.report.forecast_pictures import BELOW, HEIGHT, LOOKS, MOST_DATES, NO_UNIT, RIGHT, WIDTH
from ditkit.report.plots import ticks
from ditkit.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Lines:
    """A variable's history and forecast, and between which quantiles it lies.

    Args:
        history: [T], the last of which the forecast sets out from.
        forecast: [T'].
        dates: [T + T'], as text.
        band: the lower and the upper quantile, [T'] each; None where there is one sample.
        band_name: of the band, such as "10 % to 90 %".
        history_name: of the history.
    """

    variable: str
    unit: str
    history: Values
    forecast: Values
    dates: Sequence[str]
    band: tuple[Values, Values] | None = None
    band_name: str = ""
    history_name: str = OBSERVED


def future_plot(lines: Lines) -> Image.Image:
    """Draw the figure as a picture."""
    from PIL import Image

    file = io.BytesIO()
    future_figure(lines).savefig(file, format="png", dpi=SHARPNESS * PIXELS_PER_INCH)
    return Image.open(file).convert("RGB")


def future_figure(lines: Lines) -> Figure:
    """Draw the history, the forecast from its last value on, and the band, over dates."""
    past, later = lines.history, np.concatenate([lines.history[-1:], lines.forecast])
    low, high = (later, later) if lines.band is None else lines.band
    everything = np.concatenate([past, later, low, high])
    marks = ticks(float(everything.min()), float(everything.max()))
    left = GAP_PX + MARK_GAP_PX + max(width_px(number(mark), MARK_PX) for mark in marks)
    figure, axes = field(WIDTH, HEIGHT, RIGHT, max(LEFT, left), BELOW)
    last = len(past) - 1
    places = np.arange(len(lines.dates))
    apart = -(-len(places) // MOST_DATES)
    axes.set_xticks(places[last % apart :: apart], list(lines.dates)[last % apart :: apart])
    axes.axvline(last, color=LIGHT["control"], linewidth=points(1), linestyle=":")
    if lines.band is not None:
        axes.fill_between(
            places[last + 1 :], low, high, color=LIGHT["c0"], alpha=0.2, linewidth=0, label=lines.band_name
        )
    look = line_look() | {"markersize": 0}
    axes.plot(places[: last + 1], past, label=lines.history_name, **look | LOOKS[OBSERVED])
    axes.plot(places[last:], later, label=FORECAST, **look | LOOKS[FORECAST] | {"linestyle": (0, (4, 1.5))})
    rise(axes, marks)
    head(axes, f"Forecast of {lines.variable}".replace("$", r"\$"), lines.unit or NO_UNIT, "time")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        fontsize=points(MARK_PX),
        labelcolor=LIGHT["pale"],
    )
    return figure
