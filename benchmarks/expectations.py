"""What an experiment should show, as pairs of figures of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ditkit.bench.rows import NOTHING


class Claim(NamedTuple):
    """In words, and as (row, other row, column): the figure of the first is more than `factor` times the other's."""

    words: str
    pairs: tuple[tuple[str, str, str], ...]
    factor: float = 1.0


def judged(
    claims: Sequence[Claim], rows: Sequence[Mapping[str, object]], named: str
) -> list[dict[str, object]]:
    """Each claim with its figures; one of which a figure was not measured neither holds nor fails.

    Args:
        named: the column that names a row.
    """
    by_name = {row[named]: row for row in rows}
    verdicts: list[dict[str, object]] = []
    for claim in claims:
        found = [(by_name[one][column], by_name[other][column]) for one, other, column in claim.pairs]
        measured = all(figure is not None for pair in found for figure in pair)
        said = [
            f"{column}: {one} {shown(x)}, {other} {shown(y)}"
            for (one, other, column), (x, y) in zip(claim.pairs, found, strict=True)
        ]
        holds = all(x > claim.factor * y for x, y in found) if measured else None  # type: ignore[operator]
        verdicts.append({"claim": claim.words, "holds": holds, "figures": "; ".join(said)})
    return verdicts


def shown(value: object) -> object:
    """A figure as a table has it."""
    return NOTHING if value is None else f"{value:.3g}" if isinstance(value, float) else value
