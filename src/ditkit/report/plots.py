"""Speed against error as SVG that takes its colours from the page around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from ditkit.bench.rows import MEASURED, Row

WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 40, 46
RADIUS, SMALL, LETTER, LINE = 5.0, 2.6, 6.6, 14.0  # of markers; width and height of a letter of the labels
COLOURS = 6  # that the page defines, as --c0, --c1 ...
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
CONTROL_DASH = "5 4"
SHAPES = ("circle", "square", "triangle", "diamond", "inverted", "plus")
CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "inverted": ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    "plus": (
        *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
        *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    ),
}
"""Corners of a marker of radius 1; a series has a colour, a shape and a dash of its own."""
SPEED_UP = "times as fast as exact (wall clock)"
Error = Callable[[Row], float | None]


class Box(NamedTuple):
    """A rectangle in the coordinates of the drawing."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Compute the area that both cover."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(wide, 0) * max(high, 0)


class Axis(NamedTuple):
    """Round marks, and the linear map of the first and the last of them to `start` and `end`."""

    marks: Sequence[float]
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.marks[0]) / (self.marks[-1] - self.marks[0])
        return self.start + share * (self.end - self.start)


class Look(NamedTuple):
    """The colour of a series as CSS, the shape of its markers, filled or not, and the dash of its line."""

    colour: str
    shape: str = "circle"
    dash: str = ""
    fill: str = "filled"


OF_EXACT = Look("var(--ink)")
OF_CONTROL = Look("var(--control)", dash=CONTROL_DASH, fill="hollow")


class Point(NamedTuple):
    """A row in the plot; `control` is the height of its control, where that is no row of its own."""

    row: Row
    x: float
    y: float
    look: Look
    control: float | None


FIELD = Box(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)


def speed_against_error(rows: Sequence[Row]) -> str:
    """Distance to the exact run, and to a run of many steps, over the measured speed-up.

    Of clips also the distance of their motion, and that of each frame.
    """
    first = panel("Distance to the exact run", rows, lambda r: r.psnr_db, lambda r: r.control_psnr_db)
    second = panel(
        "Distance to the converged run",
        rows,
        lambda r: r.psnr_converged_db,
        lambda r: r.control_psnr_converged_db,
    )
    of_clips = ""
    if any(row.clip for row in rows):
        title = "Motion: distance of the differences from frame to frame"
        of_clips = panel(title, rows, lambda r: r.temporal_psnr_db, lambda _: None)
        of_clips += frame_panel("Each frame: distance to the exact run", rows)
    return f'<div class="panels">{first}{second}{of_clips}</div>{legend(rows)}'


def panel(title: str, rows: Sequence[Row], error: Error, of_control: Error) -> str:
    """One plot; rows that are identical to the reference have no finite PSNR and are left out."""
    timed_controls = any(row.kind == "control" for row in rows)
    found = [
        (row, y, None if timed_controls else of_control(row)) for row in rows if (y := error(row)) is not None
    ]
    if not found:
        return ""
    speeds = [row.speedup for row, _, _ in found]
    heights = [y for _, *both in found for y in both if y is not None]
    across = Axis(ticks(min(1.0, *speeds), max(1.5, *speeds)), FIELD.x, FIELD.x + FIELD.width)
    up = Axis(ticks(min(heights), max(heights)), FIELD.y + FIELD.height, FIELD.y)
    points = [
        Point(row, across.at(row.speedup), up.at(y), look_of(row, rows), None if c is None else up.at(c))
        for row, y, c in found
    ]
    drawn = [*_lines(points), *_markers(points), *_labels(points)]
    return _drawing(title, "PSNR over speed-up", [*_axes(title, SPEED_UP, across, up), *drawn])


def frame_panel(title: str, rows: Sequence[Row]) -> str:
    """PSNR of each frame; a line is interrupted where a frame was given, or equals the exact run's."""
    shown = [(row, row.clip.psnr_by_frame_db) for row in rows if row.clip is not None]
    heights = [y for _, each in shown for y in each if y is not None]
    if not heights:
        return ""
    last = max(len(shown[0][1]) - 1, 1)
    whole = [mark for mark in ticks(0, last) if mark == int(mark)]
    room = LETTER * max(len(row.tag) for row, _ in shown) + 2 * RADIUS  # for the labels at the lines' ends
    across = Axis(whole, FIELD.x, FIELD.x + FIELD.width - room)
    up = Axis(ticks(min(heights), max(heights)), FIELD.y + FIELD.height, FIELD.y)
    drawn, ends = [], []
    for row, each in shown:
        points = [
            None if y is None else Point(row, across.at(frame), up.at(y), look_of(row, rows), None)
            for frame, y in enumerate(each)
        ]
        present = [p for p in points if p is not None]
        drawn += [_path([p for p in run if p]) for valid, run in groupby(points, bool) if valid]
        drawn += [_dot(p, f"{row.name}: {y:.1f} dB") for p, y in zip(points, each, strict=True) if p]
        ends += present[-1:]
    return _drawing(title, "PSNR over frames", [*_axes(title, "frame", across, up), *drawn, *_labels(ends)])


def legend(rows: Sequence[Row]) -> str:
    """Build the legend of lines and markers, as HTML."""
    entries = {row.series: look_of(row, rows) for row in rows if row.kind in MEASURED}
    if any(row.kind == "control" for row in rows):
        entries["fewer exact steps (the number beside the marker)"] = OF_CONTROL
    elif any(row.control_psnr_db is not None for row in rows):
        entries["fewer exact steps that cost the same MACs (not timed)"] = OF_CONTROL
    entries["exact"] = OF_EXACT
    items = [f"<li>{_key(look)}{escape(text)}</li>" for text, look in entries.items()]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _key(look: Look) -> str:
    line = f'<polyline class="series" style="--c:{look.colour}" stroke-dasharray="{look.dash}" points="0,7 34,7"/>'
    return f'<svg viewBox="0 0 34 14" aria-hidden="true">{line}{_marker(17, 7, look)}</svg>'


def look_of(row: Row, rows: Sequence[Row]) -> Look:
    """Return how a row is drawn; policies of one series look alike, and no two series share colour and shape."""
    if row.kind not in MEASURED:
        return OF_EXACT if row.kind == "exact" else OF_CONTROL
    series = list(dict.fromkeys(other.series for other in rows if other.kind in MEASURED))
    index = series.index(row.series)
    turn = index + index // COLOURS  # the seventh series has the first colour again, and another shape
    return Look(f"var(--c{index % COLOURS})", SHAPES[turn % len(SHAPES)], DASHES[turn % len(DASHES)])


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that enclose [low, high]."""
    rough = max(high - low, 1e-6 * max(abs(low), abs(high)) or 1e-6) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    places = 3 - math.floor(math.log10(step))
    return [round(i * step, places) for i in range(first, max(last, first + 1) + 1)]


def place(points: Sequence[Box], texts: Sequence[str]) -> list[Box]:
    """Place each point's text beside it, where it covers least of the points and the earlier texts."""
    placed: list[Box] = []
    for point, text in zip(points, texts, strict=True):
        candidates = _around(point, len(text) * LETTER)
        others = [p for p in points if p is not point]
        costs = [sum(c.overlap(o) for o in [*others, *placed]) + _outside(c) for c in candidates]
        placed.append(candidates[costs.index(min(costs))])
    return placed


def _around(point: Box, width: float) -> list[Box]:
    """Right, left, above and below of a marker, then further away; the first is preferred."""
    middle, gap = point.x + point.width / 2, 3.0
    found = []
    for far in (0.0, 10.0, 20.0):
        beside = point.y + point.height / 2 - LINE / 2
        right, left = point.x + point.width + gap, point.x - gap - width
        above, below = point.y - LINE - far, point.y + point.height + far
        found += [(right, beside - far), (left, beside - far), (right, beside + far), (left, beside + far)]
        found += [(middle - width / 2, above), (middle - width / 2, below)]
    return [Box(x, y, width, LINE) for x, y in found]


def _outside(box: Box) -> float:
    """Area of the box outside the plot, tenfold: a cut label is worse than one that touches another."""
    return 10 * (box.width * box.height - box.overlap(FIELD))


def _drawing(title: str, what: str, parts: Sequence[str]) -> str:
    label = escape(f"{title}, {what}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(title: str, over: str, across: Axis, up: Axis) -> list[str]:
    floor, wall = FIELD.y + FIELD.height, FIELD.x + FIELD.width
    drawn = [
        _text("title", LEFT, 18, title),
        _text("unit", LEFT, TOP - 8, "PSNR, dB (higher is closer)"),
        _text("unit", (LEFT + wall) / 2, HEIGHT - 8, over, "middle"),
    ]
    for mark in up.marks:
        drawn.append(_line("rule", (LEFT, wall), (up.at(mark), up.at(mark))))
        drawn.append(_text("tick", LEFT - 8, up.at(mark) + 4, f"{mark:g}", "end"))
    for mark in across.marks:
        drawn.append(_line("rule", (across.at(mark), across.at(mark)), (TOP, floor)))
        drawn.append(_text("tick", across.at(mark), floor + 17, f"{mark:g}", "middle"))
    return drawn


def _lines(points: Sequence[Point]) -> list[str]:
    """One line through each series, in the order of its rows, and one from every policy to its control."""
    drawn = []
    for series in dict.fromkeys(p.row.series for p in points):
        drawn.append(_path([p for p in points if p.row.series == series]))
    return drawn + [_line("stem", (p.x, p.x), (p.y, p.control)) for p in points if p.control is not None]


def _markers(points: Sequence[Point]) -> list[str]:
    drawn = []
    for p in points:
        drawn.append(_marker(p.x, p.y, p.look, f"{p.row.name}: {p.row.speedup:.2f} times as fast"))
        if p.control is not None:
            tip = f"{p.row.control_steps} exact steps, the same MACs as {p.row.name}"
            drawn.append(_marker(p.x, p.control, OF_CONTROL, tip))
    return drawn


def _labels(points: Sequence[Point]) -> list[str]:
    """Each row's tag near its marker, with a line to it where something is in between."""
    boxes = [Box(p.x - RADIUS, p.y - RADIUS, 2 * RADIUS, 2 * RADIUS) for p in points]
    texts = [p.row.tag for p in points]
    drawn = []
    for p, text, box in zip(points, texts, place(boxes, texts), strict=True):
        x, y = min(max(p.x, box.x), box.x + box.width), min(max(p.y, box.y), box.y + box.height)
        if math.dist((x, y), (p.x, p.y)) > 2 * RADIUS:
            drawn.append(_line("leader", (x, p.x), (y, p.y)))
        drawn.append(_text("tag", box.x, box.y + LINE - 3, text))
    return drawn


def _path(points: Sequence[Point]) -> str:
    look, path = points[0].look, " ".join(f"{p.x:.1f},{p.y:.1f}" for p in points)
    return (
        f'<polyline class="series" style="--c:{look.colour}" stroke-dasharray="{look.dash}" points="{path}"/>'
    )


def _dot(p: Point, tip: str) -> str:
    return _marker(p.x, p.y, p.look, tip, SMALL)


def _marker(x: float, y: float, look: Look, tip: str = "", radius: float = RADIUS) -> str:
    style = f'class="{look.fill}" style="--c:{look.colour}"'
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    if look.shape == "circle":
        return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inner}</circle>'
    corners = " ".join(f"{x + radius * i:.1f},{y + radius * j:.1f}" for i, j in CORNERS[look.shape])
    return f'<polygon {style} points="{corners}">{inner}</polygon>'


def _line(look: str, x: tuple[float, float], y: tuple[float, float]) -> str:
    return f'<line class="{look}" x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}"/>'


def _text(look: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
