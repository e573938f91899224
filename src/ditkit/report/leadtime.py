"""Error against lead time: a curve for each method, for a document (PNG) and for the page (SVG)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditkit.core.errors import ConfigError, DataError, ShapeError, unknown
from ditkit.report.axes import (
    BOTTOM,
    GAP_PX,
    LEFT,
    MOST_MARKS,
    PIXELS_PER_INCH,
    SHARPNESS,
    TOP,
    field,
    head,
    line_look,
    points,
    rise,
    width_px,
)
from ditkit.report.plots import ticks
from ditkit.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 640, 380
LINE_PX, LABEL_PX = 16.0, 12.5  # from label to label; its letters
SAMPLE_PX, SAMPLE_GAP_PX = 26.0, 6.0  # of its line, before a label
MOST_LETTERS = 34
COLOURS = ("c0", "c1", "c3", "c2")  # those of the page that the colour-blind can tell apart
MARKERS = ("o", "s", "^", "D", "v")  # five to four colours: twenty curves before two look alike
DASHES = (
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (9, 2)),
)  # of baselines, in widths of the line


@dataclass(frozen=True)
class LeadTimePlot:
    """Errors [T] of several methods over lead times [T].

    Methods differ in colour and marker, baselines in their dashes. At the end of a curve stands its label, behind a
    sample of its line, so that colour is never needed.

    Args:
        curves: by method; NaN where there is no error, as at given frames.
        lead: rising, in `unit` ("frames", "hours").
        error: what is measured, in what, and which way is better: "MAE, m/s (lower is better)".
        baselines: curves in grey, such as persistence and climatology.

    Raises:
        ShapeError: no curve, or one of another length than `lead`.
        DataError: an infinite error, a curve of nothing but NaN, or lead times that do not rise.
        ConfigError: a baseline that is no curve.
    """

    curves: Mapping[str, Sequence[float]]
    lead: Sequence[float]
    error: str
    unit: str
    title: str = ""
    baselines: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.curves or not self.lead:
            raise ShapeError(f"a plot needs curves, got {len(self.curves)} over {len(self.lead)} lead times")
        for earlier, later in zip(self.lead, self.lead[1:], strict=False):
            if not earlier < later:
                raise DataError(f"lead times should rise, got {later:g} after {earlier:g}")
        for name, curve in self.curves.items():
            if len(curve) != len(self.lead):
                raise ShapeError(
                    f"{name!r} has {len(curve)} errors, expected {len(self.lead)}, one a lead time"
                )
            if any(map(math.isinf, curve)) or all(map(math.isnan, curve)):
                raise DataError(f"{name!r} should hold a finite error, and none that is infinite: {[*curve]}")
        for name in self.baselines:
            if name not in self.curves:
                raise ConfigError(unknown("baseline", name, self.curves))

    def png(self) -> bytes:
        """1280 pixels wide, light."""
        file = io.BytesIO()
        self._figure().savefig(file, format="png", dpi=SHARPNESS * PIXELS_PER_INCH)
        return file.getvalue()

    def svg(self) -> str:
        """Draw an `<svg>` for the page, whose colours it takes by day and by night."""
        from matplotlib import rc_context

        file = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ditkit"}):
            self._figure().savefig(file, format="svg", metadata={"Date": None})
        drawn = file.getvalue()
        drawn = drawn[drawn.index("<svg") :]
        # a style sheet would reach every other drawing of the page; the page has its own font
        unwanted = r"<metadata>.*?</metadata>|<style.*?</style>|font-family:[^;\"]*;"
        drawn = re.sub(unwanted, "", drawn, flags=re.DOTALL)
        for name, colour in LIGHT.items():
            drawn = drawn.replace(colour, f"var(--{name})")
        return drawn

    def _figure(self) -> Figure:
        room = (
            2 * GAP_PX
            + SAMPLE_PX
            + SAMPLE_GAP_PX
            + max(width_px(_short(name), LABEL_PX) for name in self.curves)
        )
        width = WIDTH - LEFT - room
        height = max(HEIGHT - TOP - BOTTOM, LINE_PX * len(self.curves))
        figure, axes = field(width, height, room)
        self._scale(axes)
        for name, look in self._looks().items():
            axes.plot(self.lead, self.curves[name], markevery=-(-len(self.lead) // MOST_MARKS), **look)
        self._label(axes, width, height)
        head(axes, self.title, self.error, f"lead time, {self.unit}")
        return figure

    def _scale(self, axes: Axes) -> None:
        """Round marks that enclose all values, and few enough lead times to be read."""
        values = [v for curve in self.curves.values() for v in curve if not math.isnan(v)]
        across = list(self.lead)
        if len(across) > MOST_MARKS:
            across = [mark for mark in ticks(across[0], across[-1]) if across[0] <= mark <= across[-1]]
        rise(axes, ticks(min(values), max(values)))
        axes.set_xticks(across, [f"{mark:g}" for mark in across])

    def _looks(self) -> dict[str, dict[str, Any]]:
        methods = [name for name in self.curves if name not in self.baselines]
        own = {
            name: {"color": LIGHT["control"], "linestyle": DASHES[i % len(DASHES)], "dash_capstyle": "butt"}
            for i, name in enumerate(self.baselines)
        } | {
            name: {"color": LIGHT[COLOURS[i % len(COLOURS)]], "marker": MARKERS[i % len(MARKERS)]}
            for i, name in enumerate(methods)
        }
        return {name: line_look() | look for name, look in own.items()}

    def _label(self, axes: Axes, width: float, height: float) -> None:
        """Beside the end of each curve a sample of its line and its name, moved where it would cover another."""
        low, high = axes.get_ylim()
        ends = {}
        for name, curve in self.curves.items():
            last = max(i for i, value in enumerate(curve) if not math.isnan(value))
            ends[name] = (self.lead[last], curve[last])
        heights = spread([(y - low) / (high - low) * height for _, y in ends.values()], LINE_PX, height)
        leader = {"arrowstyle": "-", "color": LIGHT["edge"], "linewidth": points(1), "shrinkA": 0}
        start, stop = 1 + GAP_PX / width, 1 + (GAP_PX + SAMPLE_PX) / width
        for (name, end), y in zip(ends.items(), heights, strict=True):
            look, up = self._looks()[name], y / height
            axes.annotate(
                "",
                end,
                (start, up),
                textcoords="axes fraction",
                annotation_clip=False,
                arrowprops=leader,
            )
            sample = [start, (start + stop) / 2, stop]
            axes.plot(sample, [up] * 3, transform=axes.transAxes, markevery=[1], **look)
            axes.text(
                stop + SAMPLE_GAP_PX / width,
                up,
                _short(name),
                transform=axes.transAxes,
                color=look["color"],
                size=points(LABEL_PX),
                va="center_baseline",
            )


def spread(wanted: Sequence[float], apart: float, top: float) -> list[float]:
    """Find the heights nearest to the `wanted` ones (least squares), in order and at least `apart`.

    A group that is pushed apart is centred on its mean, then moved into [0, top], where all have to fit.
    """
    groups: list[list[int]] = []  # of indices, upwards; a group's labels touch
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        groups.append([i])
        while len(groups) > 1 and _bottom(groups[-1], wanted, apart, top) < apart + (
            _bottom(groups[-2], wanted, apart, top) + apart * (len(groups[-2]) - 1)
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [0.0] * len(wanted)
    for group in groups:
        for place, i in enumerate(group):
            placed[i] = _bottom(group, wanted, apart, top) + apart * place
    return placed


def _bottom(group: Sequence[int], wanted: Sequence[float], apart: float, top: float) -> float:
    """Find the height of the lowest label of a group."""
    extent = apart * (len(group) - 1)
    middle = sum(wanted[i] for i in group) / len(group)
    return max(0.0, min(middle - extent / 2, top - extent))


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 3].rstrip() + "..."
