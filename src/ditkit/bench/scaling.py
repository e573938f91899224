"""Growth of the time and multiply-accumulates of a forward pass with a field of a model's config, such as its size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ditkit.bench.profile import account, settled_parts
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Denoiser
from ditkit.core.terminal import Table
from ditkit.sample.sampler import Sampler, Sampling

GIGA = 1e9


@dataclass(frozen=True)
class Scaled:
    """Cost of one forward pass at one value, by operator class; of attention, MACs also by part."""

    value: int
    seconds: dict[str, float]
    macs: dict[str, int]
    attention: dict[str, int]


def scaling(model: Denoiser, field: str, values: Sequence[int]) -> tuple[Scaled, ...]:
    """Build the model anew for each value, with random weights, and account for one forward pass of one sample.

    Raises:
        ConfigError: the config has no such field, or a value does not fit it.
    """
    names = [f.name for f in fields(model.config)]
    if field not in names:
        raise ConfigError("scale: " + unknown("field", field, names))
    return tuple(_scaled(type(model), replace(model.config, **{field: value}), value) for value in values)


def slope(values: Sequence[float], amounts: Sequence[float]) -> float:
    """Fit log(amount) = slope log(value) + offset by least squares; return the slope."""
    x, y = [math.log(v) for v in values], [math.log(a) for a in amounts]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    upper = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return upper / sum((a - mean_x) ** 2 for a in x)


def scaling_table(rows: Sequence[Scaled]) -> Table:
    """Return a table: seconds and GMACs of each class at each value, and the slopes of both."""
    table = Table(box=None, header_style="", pad_edge=False)
    table.add_column("operator class")
    for row in rows:
        table.add_column(f"{row.value}: ms", justify="right")
        table.add_column("GMACs", justify="right")
    for head in ("time ~", "MACs ~"):
        table.add_column(head, justify="right")
    for kind in sorted({k for row in rows for k in row.seconds}):
        cells = [
            cell
            for row in rows
            for cell in (f"{1e3 * row.seconds.get(kind, 0):.3g}", f"{row.macs.get(kind, 0) / GIGA:.3g}")
        ]
        table.add_row(kind, *cells, *(_power(rows, amounts, kind) for amounts in ("seconds", "macs")))
    return table


def _power(rows: Sequence[Scaled], amounts: str, kind: str) -> str:
    found = [getattr(row, amounts).get(kind, 0) for row in rows]
    return f"n^{slope([row.value for row in rows], found):.2f}" if all(found) else "-"


def _scaled(kind: Any, config: Any, value: int) -> Scaled:
    model = kind(config).eval()
    work = Sampler.of(model, sampling=Sampling(steps=1, seeds=(0,)))
    with torch.no_grad():
        found = account(work.draw, [(model, model.sites())])
    seconds: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    parts = settled_parts(found, model.sites())
    for key, spent in found.seconds.items():
        seconds[key.kind] += spent  # type: ignore[assignment]
    for key, count in found.macs.items():
        macs[key.kind] += count
        if key.kind == "attention":
            attention[parts[key.site]] += count
    return Scaled(value, dict(seconds), dict(macs), dict(attention))
