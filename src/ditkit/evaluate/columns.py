"""The columns of the report's table, in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ditkit.evaluate.rows import Row
from ditkit.evaluate.words import NOTHING, decibels, megabytes, to_exact


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
    """Those that some row fills."""
    found = [
        Group("cost", COST),
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
