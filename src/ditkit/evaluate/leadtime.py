"""Error against lead time: a curve for each method, for a document (PNG) and for the page (SVG)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditkit.core.errors import ConfigError, DataError, ShapeError, unknown
from ditkit.evaluate.plots import ticks
from ditkit.evaluate.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, PIXELS_PER_INCH = 640, 380, 96
LEFT, TOP, BOTTOM = 58, 58, 50
SHARPNESS = 2  # pixels of a PNG for one of the plot
LINE_PX, LABEL_PX, GAP_PX = 16.0, 12.5, 12.0  # from label to label; its letters; between it and the plot
MOST_LETTERS = 34
COLOURS = ("c0", "c1", "c3", "c2")  # those of the page that the colour-blind can tell apart
MARKERS = ("o", "s", "^", "D", "v")  # five to four colours: twenty curves before two look alike
MOST_MARKS = 13


@dataclass(frozen=True)
class LeadTimePlot:
    """Errors [T] of several methods over lead times [T].

    Methods differ in colour, in marker and by a label at the end of the curve, so that colour is never needed.

    Args:
        curves: by method; NaN where there is no error, as at given frames.
        lead: rising, in `unit` ("frames", "hours").
        error: what is measured, in what, and which way is better: "MAE, m/s (lower is better)".
        baselines: curves in grey, dashed, such as persistence and climatology.

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
        """An `<svg>` for the page, whose colours it takes by day and by night."""
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
        from matplotlib.figure import Figure

        width = WIDTH - LEFT - 2 * GAP_PX - max(_width_px(name) for name in self.curves)
        height = max(HEIGHT - TOP - BOTTOM, LINE_PX * len(self.curves))
        size = (WIDTH / PIXELS_PER_INCH, (height + TOP + BOTTOM) / PIXELS_PER_INCH)
        figure = Figure(size, dpi=PIXELS_PER_INCH, facecolor=LIGHT["panel"])
        share = height / (height + TOP + BOTTOM)
        place = (LEFT / WIDTH, share * BOTTOM / height, width / WIDTH, share)
        axes = figure.add_axes(place, facecolor=LIGHT["panel"])
        self._scale(axes)
        self._draw(axes)
        self._label(axes, width, height)
        _head(axes, self.title, 34, color=LIGHT["ink"], size=_points(15), fontweight="bold")
        _head(axes, self.error, 13, color=LIGHT["pale"], size=_points(12))
        axes.set_xlabel(f"lead time, {self.unit}", color=LIGHT["pale"], size=_points(12), labelpad=_points(6))
        return figure

    def _scale(self, axes: Axes) -> None:
        """Round marks that enclose all values, a rule at each, and no frame."""
        values = [v for curve in self.curves.values() for v in curve if not math.isnan(v)]
        up, across = ticks(min(values), max(values)), list(self.lead)
        if len(across) > MOST_MARKS:
            across = [mark for mark in ticks(across[0], across[-1]) if across[0] <= mark <= across[-1]]
        axes.set_yticks(up, [f"{mark:g}" for mark in up])
        axes.set_xticks(across, [f"{mark:g}" for mark in across])
        axes.set_ylim(up[0], up[-1])
        axes.margins(x=0.03)
        axes.grid(color=LIGHT["edge"], linewidth=_points(1))
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=LIGHT["pale"], labelsize=_points(12), pad=_points(7))
        axes.spines[:].set_visible(False)

    def _looks(self) -> dict[str, dict[str, Any]]:
        methods = [name for name in self.curves if name not in self.baselines]
        return {name: {"color": LIGHT["control"], "linestyle": "--"} for name in self.baselines} | {
            name: {"color": LIGHT[COLOURS[i % len(COLOURS)]], "marker": MARKERS[i % len(MARKERS)]}
            for i, name in enumerate(methods)
        }

    def _draw(self, axes: Axes) -> None:
        for name, look in self._looks().items():
            axes.plot(
                self.lead,
                self.curves[name],
                linewidth=_points(2),
                markersize=_points(7),
                markeredgecolor=LIGHT["panel"],
                markeredgewidth=_points(1),
                markevery=-(-len(self.lead) // MOST_MARKS),
                clip_on=False,
                **look,
            )

    def _label(self, axes: Axes, width: float, height: float) -> None:
        """The name of each curve beside its end, moved where it would cover another."""
        low, high = axes.get_ylim()
        ends = {}
        for name, curve in self.curves.items():
            last = max(i for i, value in enumerate(curve) if not math.isnan(value))
            ends[name] = (self.lead[last], curve[last])
        heights = spread([(y - low) / (high - low) * height for _, y in ends.values()], LINE_PX, height)
        leader = {"arrowstyle": "-", "color": LIGHT["edge"], "linewidth": _points(1), "relpos": (0, 0.5)}
        for (name, end), y in zip(ends.items(), heights, strict=True):
            axes.annotate(
                _short(name),
                end,
                (1 + GAP_PX / width, y / height),
                textcoords="axes fraction",
                color=self._looks()[name]["color"],
                size=_points(LABEL_PX),
                va="center_baseline",
                annotation_clip=False,
                arrowprops=leader,
            )


def spread(wanted: Sequence[float], apart: float, top: float) -> list[float]:
    """The heights nearest to the `wanted` ones (least squares), in their order and at least `apart`.

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
    """Where the lowest of a group's labels goes."""
    extent = apart * (len(group) - 1)
    middle = sum(wanted[i] for i in group) / len(group)
    return max(0.0, min(middle - extent / 2, top - extent))


def _head(axes: Axes, text: str, above_px: float, **look: Any) -> None:
    """A line of text over the plot, from the left edge of the figure on."""
    offset = (_points(GAP_PX - LEFT), _points(above_px))
    axes.annotate(text, (0, 1), offset, xycoords="axes fraction", textcoords="offset points", **look)


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 3].rstrip() + "..."


def _width_px(name: str) -> float:
    """Of a label in matplotlib's own font, which is wider than most that a page takes."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(1, 1, PIXELS_PER_INCH)
    return renderer.get_text_width_height_descent(
        _short(name), FontProperties(size=_points(LABEL_PX)), False
    )[0]


def _points(pixels: float) -> float:
    """matplotlib counts in points."""
    return pixels * 72 / PIXELS_PER_INCH
