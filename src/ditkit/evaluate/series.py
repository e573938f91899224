"""A forecast of a series as lines of value over time."""

from __future__ import annotations

import io
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditkit.evaluate.axes import (
    GAP_PX,
    LEFT,
    MARK_GAP_PX,
    MARK_PX,
    MOST_MARKS,
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
from ditkit.evaluate.example import FOLLOWED, OBSERVED, SAID, Example, lead_unit
from ditkit.evaluate.plots import ticks
from ditkit.evaluate.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

WIDTH, HEIGHT, RIGHT, BELOW = 720, 280, 48, 66  # of the field, beside it and below it
MOST_DATES = 8
NO_UNIT = "value; the data name no unit"
LOOKS: dict[str, dict[str, Any]] = {
    OBSERVED: {"color": LIGHT["ink"]},
    FOLLOWED: {"color": LIGHT["c1"], "marker": "s", "linestyle": (0, (4, 1.5))},
    SAID: {"color": LIGHT["c0"], "marker": "o"},
}


def series_plot(example: Example) -> Image.Image:
    """The figure as a picture."""
    from PIL import Image

    file = io.BytesIO()
    series_figure(example).savefig(file, format="png", dpi=SHARPNESS * PIXELS_PER_INCH)
    return Image.open(file).convert("RGB")


def series_figure(example: Example) -> Figure:
    """Observed values, those that followed and the forecast, both of which set out from the last observed one.

    Args:
        example: of one variable of one cell; its times are on the axis where it has them, else lead times.
    """
    example = example.cropped()
    seen = example.observed.flatten().tolist()
    later = {FOLLOWED: example.followed.flatten().tolist(), SAID: example.said.flatten().tolist()}
    values = [*seen, *chain(*later.values())]
    marks = ticks(min(values), max(values))
    left = GAP_PX + MARK_GAP_PX + max(width_px(number(mark), MARK_PX) for mark in marks)
    figure, axes = field(WIDTH, HEIGHT, RIGHT, max(LEFT, left), BELOW)
    places, over = _time(axes, example)
    last = len(seen) - 1
    axes.axvline(places[last], color=LIGHT["control"], linewidth=points(1), linestyle=":")
    lines = {OBSERVED: (places[: last + 1], seen)}
    lines |= {name: (places[last:], [seen[last], *y]) for name, y in later.items()}
    for name, (x, y) in lines.items():
        marked = slice(1, None, -(-len(x) // MOST_MARKS))
        axes.plot(x, y, label=name, markevery=marked, **line_look() | LOOKS[name])
    rise(axes, marks)
    head(axes, f"Forecast of {example.variable}", example.unit or NO_UNIT, over)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(lines),
        frameon=False,
        fontsize=points(MARK_PX),
        labelcolor=LIGHT["pale"],
    )
    return figure


def _time(axes: Axes, example: Example) -> tuple[NDArray[Any], str]:
    """Where the T + T' values lie on the axis, which gets its marks, and what it is."""
    observed, horizon = example.observed.shape[1], example.followed.shape[1]
    count, unit = lead_unit(example.step)
    places = np.arange(1 - observed, horizon + 1) * float(count)
    if not (dates := example.dates()):
        return places, f"lead time, {unit}"
    apart = -(-len(dates) // MOST_DATES)
    first = (observed - 1) % apart  # so that the last observed value is at a mark
    axes.set_xticks(places[first::apart], dates[first::apart])
    return places, f"time, a value every {example.step}"
