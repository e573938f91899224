"""Axes of matplotlib plots: measured in pixels, in the page's colours, with rules and no frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ditkit.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 96
SHARPNESS = 2  # pixels of a PNG for one of the plot
LEFT, TOP, BOTTOM = 58, 58, 50  # of the field in its figure
GAP_PX = 12.0  # between the field and what stands beside it
MARK_PX, MARK_GAP_PX = 12.0, 7.0  # numbers of the axes; from the field
MOST_MARKS = 13


def field(
    width: float, height: float, right: float, left: float = LEFT, bottom: float = BOTTOM
) -> tuple[Figure, Axes]:
    """Make a figure whose field is `width` x `height` pixels, with margins of so many pixels."""
    from matplotlib.figure import Figure

    across, up = left + width + right, bottom + height + TOP
    size = (across / PIXELS_PER_INCH, up / PIXELS_PER_INCH)
    figure = Figure(size, dpi=PIXELS_PER_INCH, facecolor=LIGHT["panel"])
    axes = figure.add_axes(
        (left / across, bottom / up, width / across, height / up), facecolor=LIGHT["panel"]
    )
    axes.margins(x=0.03)
    axes.grid(color=LIGHT["edge"], linewidth=points(1))
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=LIGHT["pale"], labelsize=points(MARK_PX), pad=points(MARK_GAP_PX))
    axes.spines[:].set_visible(False)
    return figure, axes


def rise(axes: Axes, marks: Sequence[float]) -> None:
    """Values from the first to the last of `marks`, a rule at each."""
    axes.set_yticks(marks, [number(mark) for mark in marks])
    axes.set_ylim(marks[0], marks[-1])


def number(mark: float) -> str:
    """Format a mark in full: six digits would make one of 100000.2 and 100000.4."""
    return f"{mark:.10g}"


def width_px(text: str, size_px: float) -> float:
    """Measure a line of text in matplotlib's own font, which is wider than most that a page takes."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(1, 1, PIXELS_PER_INCH)
    width, _, _ = renderer.get_text_width_height_descent(text, FontProperties(size=points(size_px)), False)
    return float(width)


def head(axes: Axes, title: str, measured: str, over: str) -> None:
    """Write the title, below it the quantity with its unit, and under the field the quantity of the axis."""
    _line(axes, title, 34, color=LIGHT["ink"], size=points(15), fontweight="bold")
    _line(axes, measured, 13, color=LIGHT["pale"], size=points(12))
    axes.set_xlabel(over, color=LIGHT["pale"], size=points(12), labelpad=points(6))


def line_look() -> dict[str, Any]:
    """Return the style of a curve and its markers, whatever their colour."""
    return {
        "linewidth": points(2),
        "markersize": points(7),
        "markeredgecolor": LIGHT["panel"],
        "markeredgewidth": points(1),
        "clip_on": False,
    }


def points(pixels: float) -> float:
    """Convert pixels to points, in which matplotlib counts."""
    return pixels * 72 / PIXELS_PER_INCH


def _line(axes: Axes, text: str, above_px: float, **look: Any) -> None:
    """Write a line of text over the plot, from the left edge of the figure on."""
    place, offset = (points(GAP_PX), 1), (0, points(above_px))
    axes.annotate(
        text, place, offset, xycoords=("figure points", "axes fraction"), textcoords="offset points", **look
    )
