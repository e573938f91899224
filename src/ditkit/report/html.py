"""The columns of the report's table, in groups."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from torch import Tensor

from ditkit.bench.rows import DEFINITIONS, NOTHING, Row, decibels, megabytes, to_exact
from ditkit.core.task import Task
from ditkit.report.plots import speed_against_error
from ditkit.report.sheet import image, png
from ditkit.report.theme import STYLE


class Column(NamedTuple):
    """`key` is the row's key in report.json, whose definition is shown on hovering."""

    head: str
    unit: str
    key: str
    cell: Callable[[Row], str]


class Group(NamedTuple):
    """Columns under one heading."""

    head: str
    columns: Sequence[Column]


def groups(rows: Sequence[Row]) -> list[Group]:
    """List the groups of columns that some row fills."""
    found = [
        Group("cost", (OF_RIVALS if any(row.kind == "rival" for row in rows) else ()) + COST),
        Group("to the exact run", TO_EXACT + (OF_CLIPS if any(row.clip for row in rows) else ())),
        Group("to converged", TO_CONVERGED),
    ]
    if any(row.control_steps for row in rows):
        found.append(Group("control: as many exact steps as cost the same MACs", CONTROL))
    if judged := [row.distribution for row in rows if row.distribution]:
        first = judged[0]
        head = f"to real pictures: {first.n_fake} against {first.n_real}, {first.extractor}"
        found.append(Group(head, REAL))
    return found


def _fixed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _millions(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _full(row: Row) -> str:
    return f"{row.full_evaluations} of {row.evaluations}"


def _worst_frame(row: Row) -> str:
    worst = None if row.clip is None else row.clip.worst_frame()
    return to_exact(row, None) if worst is None else f"{worst[1]:.1f} ({worst[0]})"


def _distance(name: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = None if row.distribution is None else getattr(row.distribution, name)
        return NOTHING if value is None else _fixed(scale * value, digits)

    return cell


OF_RIVALS = (
    Column("parameters", "millions", "parameters", lambda r: _fixed(_millions(r.parameters), 2)),
    Column("weights", "MB", "weight_bytes", lambda r: megabytes(r.weight_bytes)),
)
COST = (
    Column("time", "s", "seconds", lambda r: _fixed(r.seconds, 2)),
    Column("speed-up", "times", "speedup", lambda r: _fixed(r.speedup, 2)),
    Column("MACs", "billions", "macs", lambda r: f"{r.macs / 1e9:,.1f}"),
    Column("MACs", "% of exact", "macs_ratio", lambda r: _fixed(100 * r.macs_ratio, 1)),
    Column("in full", "evaluations", "full_evaluations", _full),
    Column("peak", "MB", "peak_bytes", lambda r: megabytes(r.peak_bytes)),
    Column("kept", "MB", "policy_bytes", lambda r: megabytes(r.policy_bytes)),
)
TO_EXACT = (
    Column("PSNR", "dB", "psnr_db", lambda r: to_exact(r, r.psnr_db)),
    Column("worst", "dB", "psnr_worst_db", lambda r: to_exact(r, r.psnr_worst_db)),
    Column("SSIM", "", "ssim", lambda r: _fixed(r.ssim, 4)),
    Column("rel. L2", "", "relative_l2", lambda r: _fixed(r.relative_l2, 4)),
)
OF_CLIPS = (
    Column("motion", "dB", "temporal_psnr_db", lambda r: to_exact(r, r.temporal_psnr_db)),
    Column("worst frame", "dB (frame)", "psnr_by_frame_db", _worst_frame),
)
TO_CONVERGED = (Column("PSNR", "dB", "psnr_converged_db", lambda r: decibels(r.psnr_converged_db)),)
CONTROL = (
    Column("steps", "", "control_steps", lambda r: str(r.control_steps or NOTHING)),
    Column("to exact", "dB", "control_psnr_db", lambda r: decibels(r.control_psnr_db, r.control_identical)),
    Column("to conv.", "dB", "control_psnr_converged_db", lambda r: decibels(r.control_psnr_converged_db)),
)
REAL = (
    Column("FID", "", "fid", _distance("fid", 2)),
    Column("KID", "times 1000", "kid", _distance("kid_mean", 2, 1e3)),
    Column("MiFID", "", "mifid", _distance("mifid", 2)),
    Column("precision", "", "precision", _distance("precision", 3)),
    Column("recall", "", "recall", _distance("recall", 3)),
)


MOTION = (
    "Motion is the PSNR of the differences between neighbouring frames: flicker lowers it, a constant shift of "
    "colour does not. Error can grow with the distance from what was given, so each frame has a PSNR of its own."
)
GIVEN = "What was given comes out as it went in, and no error counts it."


def page(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    headline: str,
    task: Task,
    *,
    pictures: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]],
    heads: Sequence[str],
) -> str:
    """Build the whole document.

    Args:
        pictures: uint8 [n, 1 or 3, H, W] by method, at least one a head. captions: beside them. heads: above
            each column.
    """
    shown = grid(pictures, captions, heads, task) + note(len(heads), settings, task)
    parts = [
        f"<h1>{escape(title(settings))}</h1>",
        f'<p class="headline">{escape(headline)}</p>',
        f'<p class="context">{escape(context(settings, task))}</p>',
        *(f'<p class="context">No row: {escape(why)}</p>' for why in settings.get("left_out", ())),
        section(f"{task.noun.capitalize()}s", shown),
        section("Speed against error", speed_against_error(rows)),
        section("Numbers", table(rows)),
        section("How to read this", f"<p>{'</p><p>'.join(map(escape, reading(settings, task)))}</p>"),
        details("Receipts: what each policy computed", receipts(rows)),
        details("Settings", f"<pre>{escape(json.dumps(dict(settings), indent=2, ensure_ascii=False))}</pre>"),
        details("What the columns mean", definitions(rows)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title(settings))}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def title(settings: Mapping[str, Any]) -> str:
    model = settings["model"]
    return f"{model['class']}, {model['parameters'] / 1e6:.1f} M parameters: exact and accelerated"


def context(settings: Mapping[str, Any], task: Task) -> str:
    """One line under the headline: what was run, where and when."""
    count, threads = len(settings["seeds"]), settings["threads"]
    rounds = "timed once" if settings["rounds"] == 1 else f"median of {settings['rounds']} alternated rounds"
    return (
        f"{count} {task.noun}s a row, {_of_clips(settings) if task.has_frames else ''}"
        f"{settings['steps']} steps, {settings['solver']}, {settings['guidance']}; "
        f"{settings['device']}, {threads} thread{'s'[: threads > 1]}, {settings['dtype']}, "
        f"torch {settings['versions']['torch']}; {rounds}; "
        f"{settings['date'][:10]}."
    )


def reading(settings: Mapping[str, Any], task: Task) -> list[str]:
    """Explain the table in a few plain sentences."""
    steps, many = settings["steps"], settings["converged_steps"]
    sentences = [
        f"Exact is the unaltered sampler with {steps} steps. Every other row starts from the same noise, so "
        f"that a {task.noun} can be held against the one above it. PSNR says how near it stayed: at 20 dB it is "
        f"plainly another {task.noun}, 30 dB takes a second look, 40 dB is hard to see.",
        "The control answers whether a method is worth having: it spends the same MACs on fewer exact steps. "
        "A method whose control has the higher PSNR is beaten by simply taking fewer steps.",
        f"Converged is the exact sampler with {many} steps, which {steps} steps only approximate. A row that "
        "is as near to it as exact itself has an error below the one that was accepted already.",
    ]
    if task.has_frames:
        sentences.append(MOTION)
    if "generated" in settings:
        sentences.append(GIVEN)
    return sentences


def grid(
    pictures: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], heads: Sequence[str], task: Task
) -> str:
    """Rows of pictures, a method each; a column is a seed."""
    cells = ['<div class="corner"></div>', *(f'<div class="head">{escape(head)}</div>' for head in heads)]
    for name, of_method in pictures.items():
        first, *others = captions[name]
        lines = "".join(f"<span>{escape(line)}</span>" for line in others)
        cells.append(f'<div class="caption"><b>{escape(first)}</b>{lines}</div>')
        for head, picture in zip(heads, of_method, strict=False):
            data = base64.b64encode(png(image(picture))).decode()
            cells.append(f'<img alt="{escape(f"{name}: {head}")}" src="data:image/png;base64,{data}">')
    look = "grid films" if task.has_frames else "grid"
    return f'<div class="scroll"><div class="{look}" style="--n:{len(heads)}">{"".join(cells)}</div></div>'


def note(shown: int, settings: Mapping[str, Any], task: Task) -> str:
    """Write a line about samples that are not shown, and about outlines."""
    count = len(settings["seeds"])
    more = f"The first {shown} of {count} {task.noun}s. " if count > shown else ""
    text = more + ("What is outlined was given." if "generated" in settings else "")
    return f"<p>{text.strip()}</p>" if text else ""


def table(rows: Sequence[Row]) -> str:
    """Every number, in groups."""
    shown = groups(rows)
    flat = [(column, place == 0) for group in shown for place, column in enumerate(group.columns)]
    top = "".join(
        f'<th class="group" colspan="{len(group.columns)}">{escape(group.head)}</th>' for group in shown
    )
    heads = "".join(_head(column, starts) for column, starts in flat)
    body = "".join(_line(row, flat) for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr><th rowspan="2">method</th>{top}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def receipts(rows: Sequence[Row]) -> str:
    found = [(row.name, receipt) for row in rows for receipt in row.receipt]
    if not found:
        return "<p>No policy ran.</p>"
    return "".join(_receipt(name, receipt) for name, receipt in found)


def definitions(rows: Sequence[Row]) -> str:
    used = {key for row in rows for key in row.as_dict()}
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in DEFINITIONS.items() if key in used
    )
    return f"<dl>{items}</dl>"


def section(head: str, inner: str) -> str:
    return f"<section><h2>{escape(head)}</h2>{inner}</section>"


def details(head: str, inner: str) -> str:
    return f"<details><summary>{escape(head)}</summary>{inner}</details>"


def _of_clips(settings: Mapping[str, Any]) -> str:
    """Their length and size, and how much of them was given."""
    _, frames, height, width = settings["shape"]
    given = f", {1 - settings['generated']:.0%} given" if "generated" in settings else ""
    return f"{frames} frames of {height} x {width}{given}, "


def _head(column: Column, starts: bool) -> str:
    unit = f"<small>{escape(column.unit)}</small>" if column.unit else ""
    tip = escape(DEFINITIONS[column.key])
    return f'<th{_edge(starts)} title="{tip}">{escape(column.head)}{unit}</th>'


def _line(row: Row, columns: Sequence[tuple[Column, bool]]) -> str:
    cells = "".join(f"<td{_edge(starts)}>{escape(column.cell(row))}</td>" for column, starts in columns)
    return f'<tr class="{row.kind}"><th scope="row">{escape(row.name)}</th>{cells}</tr>'


def _receipt(name: str, receipt: Mapping[str, Any]) -> str:
    lanes = ""
    for lane, done in receipt["lanes"].items():
        listed = "; ".join(f"{verb} {steps or NOTHING}" for verb, steps in done.items())
        lanes += f"<li>{escape(lane)}: {escape(listed)}</li>"
    saved = f"{receipt['sites']} sites, {receipt['site_calls_saved']:,} site calls saved in a batch"
    if "rows_saved" in receipt:
        saved += f", {receipt['rows_saved']:.1%} of token rows"
    return f"<p><b>{escape(name)}</b>: {saved}</p><ul>{lanes}</ul>"


def _edge(starts: bool) -> str:
    return ' class="first"' if starts else ""
