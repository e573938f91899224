"""A forecast of a series as lines of value over time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ditkit.report.axes import (
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
from ditkit.report.example import FOLLOWED, FORECAST, OBSERVED, Example, lead_unit
from ditkit.report.film import BETWEEN_PX, INDENT_PX, WIDEST_PX, headed, scale_of, tiled
from ditkit.report.legend import NO_DATA_RGB, Scale, below_each_other, difference, legend
from ditkit.report.plots import ticks
from ditkit.report.sheet import LABEL_WIDTH, MARGIN, as_frames, sheet
from ditkit.report.strips import at_size, chosen, columns, fitting, outlined
from ditkit.report.theme import LIGHT

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
    FORECAST: {"color": LIGHT["c0"], "marker": "o"},
}


def series_plot(example: Example) -> Image.Image:
    """Draw the figure as a picture."""
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
    past = example.observed.flatten().tolist()
    later = {FOLLOWED: example.followed.flatten().tolist(), FORECAST: example.forecast.flatten().tolist()}
    values = [*past, *chain(*later.values())]
    marks = ticks(min(values), max(values))
    left = GAP_PX + MARK_GAP_PX + max(width_px(number(mark), MARK_PX) for mark in marks)
    figure, axes = field(WIDTH, HEIGHT, RIGHT, max(LEFT, left), BELOW)
    places, over = _time(axes, example)
    last = len(past) - 1
    axes.axvline(places[last], color=LIGHT["control"], linewidth=points(1), linestyle=":")
    lines = {OBSERVED: (places[: last + 1], past)}
    lines |= {name: (places[last:], [past[last], *y]) for name, y in later.items()}
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
    """Place the T + T' values on the axis, draw its marks, and name it."""
    observed, horizon = example.observed.shape[1], example.followed.shape[1]
    count, unit = lead_unit(example.step)
    places = np.arange(1 - observed, horizon + 1) * float(count)
    if not (dates := example.dates()):
        return places, f"lead time, {unit}"
    apart = -(-len(dates) // MOST_DATES)
    first = (observed - 1) % apart  # so that the last observed value is at a mark
    axes.set_xticks(places[first::apart], dates[first::apart])
    return places, f"time, a value every {example.step}"


DIFFERENCE = "|difference|"
WHITE = 255
TILE_PX = (WIDEST_PX - BETWEEN_PX) // 2
"""Larger fields are made smaller in films, which would else be of gigabytes."""


@dataclass(frozen=True, eq=False)
class Painted:
    """An example as colours, uint8 [T or T', 3, H, W], and what they mean."""

    observed: Tensor
    followed: Tensor
    forecast: Tensor
    errors: Tensor
    heads: tuple[list[str], list[str]]  # of the observed frames, and of those that follow
    scales: tuple[Scale, ...]
    no_data: bool

    @classmethod
    def of(cls, example: Example) -> Painted:
        """Clips as they are; fields in colours over the span of what was and what followed, without their padding."""
        example = example.cropped()
        border, heads = example.observed.shape[1], example.heads()
        wrong = difference(example.errors.max().item(), example.unit)
        values = Scale(example.label, *example.span) if example.variable else None

        def drawn(frames: Tensor) -> Tensor:
            if values is None:
                return as_frames(frames * 2 - 1).expand(-1, 3, -1, -1)
            return _greyed(values.paint(frames[0]), example.valid)

        return cls(
            observed=drawn(example.observed),
            followed=drawn(example.followed),
            forecast=drawn(example.forecast),
            errors=_greyed(wrong.paint(example.errors), example.valid),
            heads=(heads[:border], heads[border:]),
            scales=(wrong,) if values is None else (values, wrong),
            no_data=example.valid is not None,
        )


def forecast_strip(example: Example) -> Image.Image:
    """Rows of frames under their lead times and dates; of many frames, evenly chosen ones."""
    painted = Painted.of(example)
    later = {FOLLOWED: painted.followed, FORECAST: painted.forecast, DIFFERENCE: painted.errors}
    pages = [_rows({OBSERVED: painted.observed}, painted.heads[0]), _rows(later, painted.heads[1])]
    width = max(page.width for page in pages)
    entries = legend(width, MARGIN + LABEL_WIDTH, painted.scales, no_data=painted.no_data)
    assert entries is not None
    return below_each_other([*pages, entries])


def forecast_film(example: Example) -> Tensor:
    """Truth and forecast beside each other, both after the observed frames, and the error if it fits.

    Returns:
        uint8 [T + T', 3, H', W'].
    """
    painted = Painted.of(example)
    height, width = painted.forecast.shape[-2:]
    across = 3 if 3 * width + 2 * BETWEEN_PX <= WIDEST_PX else 2
    share = min(scale_of(height, width, across), TILE_PX / max(height, width))
    cell = max(1, round(share * width)), max(1, round(share * height))
    observed, followed, forecast, errors = (
        at_size(x, cell) for x in (painted.observed, painted.followed, painted.forecast, painted.errors)
    )
    everywhere = torch.ones_like(observed[:, 0], dtype=torch.bool)
    tiles = {
        "truth": torch.cat([observed, followed]),
        FORECAST: torch.cat([outlined(observed, everywhere), forecast]),
        DIFFERENCE: torch.cat([torch.full_like(observed, WHITE), errors]),
    }
    film = tiled(list(tiles.values())[:across], list(tiles)[:across], columns=across)
    shown = painted.scales if across == 3 else painted.scales[:-1]
    entries = legend(film.shape[-1], INDENT_PX, shown, given=True, no_data=painted.no_data)
    assert entries is not None
    below = torch.from_numpy(np.array(entries)).permute(2, 0, 1).expand(len(film), -1, -1, -1)
    film = F.pad(film, (0, below.shape[-1] - film.shape[-1], 0, BETWEEN_PX), value=WHITE)
    heads = [" ".join(head.splitlines()) for part in painted.heads for head in part]
    return headed(torch.cat([film, below], 2), heads)


def _rows(rows: Mapping[str, Tensor], heads: Sequence[str]) -> Image.Image:
    """Frames uint8 [T, 3, H, W] by the name of their row, under the heads of those that fit."""
    height, width = next(iter(rows.values())).shape[-2:]
    cell = fitting(height, width)
    shown = chosen(len(heads), columns(cell[0]))
    pictures = {name: at_size(frames[shown], cell) for name, frames in rows.items()}
    return sheet(pictures, {name: [name] for name in rows}, [heads[i] for i in shown], cell)


def _greyed(pictures: Tensor, valid: Tensor | None) -> Tensor:
    """uint8 [T, 3, H, W] with the cells that hold no data in grey."""
    if valid is None:
        return pictures
    return torch.where(valid, pictures, torch.tensor(NO_DATA_RGB, dtype=torch.uint8).view(3, 1, 1))
