"""Speed against error as SVG that takes its colours from the page around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from ditkit.evaluate.rows import Row

WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 40, 46
RADIUS, LETTER, LINE = 5.0, 6.6, 14.0  # of a marker; width and height of a letter of the labels
COLOURS = 6  # that the page defines, as --c0, --c1 ...
Error = Callable[[Row], float | None]


class Box(NamedTuple):
    """A rectangle in the coordinates of the drawing."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(wide, 0) * max(high, 0)


class Point(NamedTuple):
    """A row in the plot; `control` is the height of its control, where that is no row of its own."""

    row: Row
    x: float
    y: float
    control: float | None


FIELD = Box(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)


def speed_against_error(rows: Sequence[Row]) -> str:
    """Two panels: distance to the exact run, and to a run of many steps, over the measured speed-up."""
    first = panel("Distance to the exact run", rows, lambda r: r.psnr_db, lambda r: r.control_psnr_db)
    second = panel(
        "Distance to the converged run",
        rows,
        lambda r: r.psnr_converged_db,
        lambda r: r.control_psnr_converged_db,
    )
    return f'<div class="panels">{first}{second}</div>{legend(rows)}'


def panel(title: str, rows: Sequence[Row], error: Error, of_control: Error) -> str:
    """One plot; rows that are identical to the reference have no finite PSNR and are left out."""
    timed_controls = any(row.kind == "control" for row in rows)
    shown = [row for row in rows if error(row) is not None]
    heights = [
        v for row in shown for v in (error(row), None if timed_controls else of_control(row)) if v is not None
    ]
    if not heights:
        return ""
    x_ticks = ticks(min(1.0, *(r.speedup for r in shown)), max(1.5, *(r.speedup for r in shown)))
    y_ticks = ticks(min(heights), max(heights))
    across = scale(x_ticks, FIELD.x, FIELD.x + FIELD.width)
    up = scale(y_ticks, FIELD.y + FIELD.height, FIELD.y)
    points = [
        Point(row, across(row.speedup), up(error(row) or 0.0), _height(of_control(row), up, timed_controls))
        for row in shown
    ]
    parts = [
        _axes(title, x_ticks, y_ticks, across, up),
        *_lines(points, rows),
        *_markers(points, rows),
        *_labels(points),
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}, PSNR over speed-up">'
        f"{''.join(parts)}</svg>"
    )


def legend(rows: Sequence[Row]) -> str:
    """What the colours and markers mean, as HTML."""
    entries = [(colour(name, rows), "filled", name) for name in series(rows)]
    if any(row.kind == "control" for row in rows):
        entries.append(("var(--control)", "hollow", "fewer exact steps (the number beside the marker)"))
    elif any(row.control_psnr_db is not None for row in rows):
        entries.append(("var(--control)", "hollow", "fewer exact steps that cost the same MACs (not timed)"))
    entries.append(("var(--ink)", "filled", "exact"))
    items = [
        f'<li><i class="{look}" style="--c:{paint}"></i>{escape(text)}</li>' for paint, look, text in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def series(rows: Sequence[Row]) -> list[str]:
    """The series of the policies, in the order of the rows."""
    return list(dict.fromkeys(row.series for row in rows if row.kind == "policy"))


def colour(name: str, rows: Sequence[Row]) -> str:
    return f"var(--c{series(rows).index(name) % COLOURS})"


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that enclose [low, high]."""
    rough = max(high - low, 1e-6) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def scale(marks: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """The linear map of the first and last mark to `start` and `end`."""
    return lambda value: start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)


def place(points: Sequence[Box], texts: Sequence[str]) -> list[Box]:
    """Where each point's text goes: beside it, where it covers least of the points and the earlier texts."""
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


def _height(value: float | None, up: Callable[[float], float], timed_controls: bool) -> float | None:
    return None if value is None or timed_controls else up(value)


def _axes(
    title: str,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> str:
    floor, wall = FIELD.y + FIELD.height, FIELD.x + FIELD.width
    lines = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    lines.append(f'<text class="unit" x="{LEFT}" y="{TOP - 8}">PSNR, dB (higher is closer)</text>')
    for value in y_ticks:
        y = up(value)
        lines.append(f'<line class="rule" x1="{LEFT}" x2="{wall}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x = across(value)
        lines.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        lines.append(
            f'<text class="tick" x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{value:g}</text>'
        )
    middle = FIELD.x + FIELD.width / 2
    lines.append(
        f'<text class="unit" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">times as fast as the exact run, wall clock</text>'
    )
    return "".join(lines)


def _lines(points: Sequence[Point], rows: Sequence[Row]) -> list[str]:
    """One line through each series, and one from every policy to its control."""
    named = sorted((p for p in points if p.row.kind != "exact"), key=lambda p: (p.row.series, p.x))
    lines = []
    for name, group in groupby(named, key=lambda p: p.row.series):
        members = list(group)
        is_control = members[0].row.kind == "control"
        paint = "var(--control)" if is_control else colour(name, rows)
        path = " ".join(f"{p.x:.1f},{p.y:.1f}" for p in members)
        lines.append(
            f'<polyline class="{"dashed" if is_control else "series"}" style="--c:{paint}" points="{path}"/>'
        )
    for p in points:
        if p.control is not None:
            lines.append(
                f'<line class="stem" x1="{p.x:.1f}" x2="{p.x:.1f}" y1="{p.y:.1f}" y2="{p.control:.1f}"/>'
            )
    return lines


def _markers(points: Sequence[Point], rows: Sequence[Row]) -> list[str]:
    drawn = []
    for p in points:
        look = "hollow" if p.row.kind == "control" else "filled"
        paint = {"control": "var(--control)", "exact": "var(--ink)"}.get(p.row.kind) or colour(
            p.row.series, rows
        )
        tip = f"{p.row.name}: {p.row.speedup:.2f} times as fast"
        drawn.append(_marker(p.x, p.y, look, paint, tip))
        if p.control is not None:
            tip = f"{p.row.control_steps} exact steps, the same MACs as {p.row.name}"
            drawn.append(_marker(p.x, p.control, "hollow", "var(--control)", tip))
    return drawn


def _marker(x: float, y: float, look: str, paint: str, tip: str) -> str:
    return (
        f'<circle class="{look}" style="--c:{paint}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}">'
        f"<title>{escape(tip)}</title></circle>"
    )


def _labels(points: Sequence[Point]) -> list[str]:
    """Each row's tag near its marker, with a line to it where another text is in between."""
    boxes = [Box(p.x - RADIUS, p.y - RADIUS, 2 * RADIUS, 2 * RADIUS) for p in points]
    texts = [p.row.tag for p in points]
    drawn = []
    for p, text, box in zip(points, texts, place(boxes, texts), strict=True):
        x, y = min(max(p.x, box.x), box.x + box.width), min(max(p.y, box.y), box.y + box.height)
        if math.dist((x, y), (p.x, p.y)) > 2 * RADIUS:
            drawn.append(_line("leader", (x, p.x), (y, p.y)))
        drawn.append(f'<text class="tag" x="{box.x:.1f}" y="{box.y + LINE - 3:.1f}">{escape(text)}</text>')
    return drawn


def _line(look: str, x: tuple[float, float], y: tuple[float, float]) -> str:
    return f'<line class="{look}" x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}"/>'
