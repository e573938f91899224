"""What a comparison says in words: numbers with their units, captions, and the sentence at its head."""

from __future__ import annotations

from collections.abc import Sequence

from ditkit.evaluate.rows import Row

CLOSE_DB = 30.0
"""From about here on, small pictures are hard to tell apart; the headline looks for speed above it."""
NOTHING = "\N{EN DASH}"


def decibels(value: float | None, identical: bool | None = False) -> str:
    """31.24 as '31.2', and 'identical' where there is no error."""
    return "identical" if identical else NOTHING if value is None else f"{value:.1f}"


def megabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 1e6:,.1f}" if value < 1e7 else f"{value / 1e6:,.0f}"


def to_exact(row: Row, value: float | None) -> str:
    """A PSNR to the exact run, which is not compared with itself."""
    return NOTHING if row.kind == "exact" else decibels(value, row.identical)


def distance(row: Row) -> str:
    """The PSNR to the exact run with its unit."""
    if row.kind == "exact":
        return "the reference"
    return "identical to exact" if row.identical else f"{decibels(row.psnr_db)} dB to exact"


def noun(rows: Sequence[Row]) -> str:
    """What one sample of a comparison is called."""
    return "clip" if any(row.clip for row in rows) else "picture"


def caption(row: Row) -> list[str]:
    """Three lines beside a row of pictures."""
    return [row.name, f"{row.seconds:.2f} s, {row.speedup:.2f}x", distance(row)]


def converged_caption(steps: int) -> list[str]:
    return ["converged", f"exact, {steps} steps", "what fewer steps approach"]


def headline(rows: Sequence[Row]) -> str:
    """The fastest policy that is close to the exact run, or the closest, and what else its compute buys."""
    exact = rows[0]
    policies = [row for row in rows if row.kind == "policy"]
    if not policies:
        return f"The exact sampler alone: {exact.seconds:.2f} s."
    close = [row for row in policies if row.identical or (row.psnr_db or 0) >= CLOSE_DB]
    closest = max(policies, key=lambda row: row.psnr_db or 0)
    best = max(close, key=lambda row: row.speedup, default=closest)
    drawn = f"{noun(rows)}s"
    near = f"identical {drawn}" if best.identical else f"{decibels(best.psnr_db)} dB PSNR to its {drawn}"
    faster = f"{best.name} is {best.speedup:.2f} times as fast as the exact sampler, at {near}"
    if not close:
        faster = f"No policy keeps a PSNR of {CLOSE_DB:g} dB to the exact sampler. The closest: {faster}"
    return f"{faster}{_against_control(best)}."


def _against_control(row: Row) -> str:
    if row.control_steps is None or row.identical:
        return ""
    steps = f"{row.control_steps} exact step{'s'[: row.control_steps > 1]}"
    if row.control_psnr_db is None or row.psnr_db is None:
        return f"; {steps} would cost as much and be identical"
    if row.control_psnr_db < row.psnr_db:
        return f"; the same MACs spent on {steps} reach only {decibels(row.control_psnr_db)} dB"
    return f"; the same MACs spent on {steps} would be closer, {decibels(row.control_psnr_db)} dB"
