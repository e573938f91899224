"""The setting that is fast or near enough: settings of policies compared on few seeds, and the front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.api.compare import compare
from ditkit.bench.rows import NOTHING, Row, decibels, distance, titles, to_exact
from ditkit.core.checkpoint import write_json
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.core.spec import components
from ditkit.report.report import Report

if TYPE_CHECKING:
    from ditkit.core.terminal import Table


@dataclass(frozen=True)
class Target:
    """The conditions that a setting has to meet.

    Args:
        at_least_db: PSNR to the exact run; of settings that reach it and are faster, the fastest is the best.
        at_most: share of the exact run's time; of settings within it the nearest to the exact run is the best.

    Raises:
        ConfigError: not exactly one of them, or one that is out of range.
    """

    at_least_db: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least_db is None) == (self.at_most is None):
            given = f"at_least_db={self.at_least_db}, at_most={self.at_most}"
            raise ConfigError(f"tune: got {given}, expected one of the two")
        if self.at_least_db is not None and not 0 < self.at_least_db < math.inf:
            raise ConfigError(f"at_least_db={self.at_least_db:g}, expected decibels above 0")
        if self.at_most is not None and not 0 < self.at_most < 1:
            raise ConfigError(f"at_most={self.at_most:g}, expected a share of the time, between 0 and 1")

    def __str__(self) -> str:
        if self.at_least_db is not None:
            return f"at least {self.at_least_db:g} dB"
        return f"at most {self.at_most:g} of the exact run's time"

    def is_met_by(self, row: Row) -> bool:
        if self.at_least_db is not None:
            return is_faster(row) and error_db(row) >= self.at_least_db
        return self.at_most is not None and 1 / row.speedup <= self.at_most

    def best(self, rows: Sequence[Row]) -> Row | None:
        """Return the best of the rows that meet it."""
        return max(filter(self.is_met_by, rows), key=self._rank, default=None)

    def nearest(self, rows: Sequence[Row]) -> Row:
        """Return the row that comes nearest to it: the fastest, where none beats the exact run."""
        faster = [row for row in rows if is_faster(row)]
        if self.at_least_db is None or not faster:
            return max(rows, key=lambda row: row.speedup)
        return max(faster, key=error_db)

    def _rank(self, row: Row) -> tuple[float, float]:
        rank = row.speedup, error_db(row)
        return rank if self.at_least_db is not None else rank[::-1]


@dataclass(frozen=True)
class Tuned:
    """A comparison, and the target that its settings are held against.

    Args:
        specs: texts of the settings, by the names of their rows.
    """

    report: Report
    target: Target
    specs: dict[str, str]

    @property
    def settings(self) -> list[Row]:
        """The rows of the settings, without the exact run."""
        return [row for row in self.report.rows if row.kind == "policy"]

    @property
    def best(self) -> str | None:
        """The text of the setting that is best; None where none reaches the target."""
        row = self.target.best(self.settings)
        return None if row is None else self.specs[row.name]

    @property
    def verdict(self) -> str:
        """The best setting with its figures, or how far the nearest falls short."""
        row = self.target.best(self.settings)
        if row is not None:
            return f"Best with {self.target}: {self._figures(row)}."
        nearest = self.target.nearest(self.settings)
        misses = f"meets the target, {self.target}" if is_faster(nearest) else "is faster than the exact run"
        return f"None of {len(self.settings)} settings {misses}. The nearest: {self._figures(nearest)}."

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the report's, with the target, the verdict, the best setting and those on the front."""
        front = [self.specs[row.name] for row in front_of(self.report.rows) if row.name in self.specs]
        found = {"target": str(self.target), "verdict": self.verdict, "best": self.best, "front": front}
        return found | {key: value for key, value in self.report.as_dict().items() if key != "headline"}

    def save(self, folder: str | Path) -> Path:
        """Write tune.json.

        Raises:
            ConfigError: the folder cannot be written; an earlier file stays as it was.
        """
        path = Path(folder) / "tune.json"
        write_json(path, self.as_dict())
        return path

    def table(self) -> Table:
        """Fastest first, for a terminal of 80 columns."""
        from rich import box

        from ditkit.core.terminal import Table

        count, steps = len(self.report.settings["seeds"]), self.report.settings["steps"]
        left_out = (f"No row: {why}" for why in self.report.settings.get("left_out", ()))
        out = Table(
            title=f"{count} samples in {steps} steps; distances to the exact run are PSNR in dB",
            caption="\n".join([self.verdict, *left_out]),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        out.add_column("setting", max_width=34)
        for head in ("time\ns", "speed\n-up", "\nMACs", "to\nexact", "same\nMACs"):
            out.add_column(head, justify="right", no_wrap=True)
        out.add_column("")
        front, best = front_of(self.report.rows), self.target.best(self.settings)
        for row in sorted(self.report.rows, key=lambda row: row.seconds):
            out.add_row(
                self.specs.get(row.name, row.name).replace(",", ", "),
                f"{row.seconds:.2f}",
                f"{row.speedup:.2f}x",
                f"{row.macs_ratio:.1%}",
                to_exact(row, row.psnr_db),
                NOTHING
                if row.control_steps is None
                else decibels(row.control_psnr_db, row.control_identical),
                "best" if row is best else "" if row in front else "dominated",
                style=None if row in front else "dim",
            )
        return out

    def _figures(self, row: Row) -> str:
        figures = f"{self.specs[row.name]}, {row.speedup:.2f} times as fast, {distance(row)}"
        if row.control_steps is None or row.control_psnr_db is None:
            return figures
        steps = f"{row.control_steps} exact step{'s'[: row.control_steps > 1]}"
        return f"{figures}; {steps}, as many MACs, would be at {decibels(row.control_psnr_db)} dB"


def tune(model: Denoiser, policies: Sequence[str], target: Target, **settings: Any) -> Tuned:
    """Compare settings on few seeds, and find the best one.

    Args:
        policies: texts of settings, in which a field may have several values: `taylorseer:interval=3|4|6,order=1|2`
            is six settings.
        settings: as `compare` takes them: a `sampling` or words of it, label, cond, shape, rounds and so on.

    Raises:
        ConfigError, NoEffectError, ConflictError: as `compare` does.
    """
    texts = [one for text in policies for one in expanded(text)]
    found = components("policies", Policy, texts)  # type: ignore[type-abstract]
    report = compare(model, memory=False, **{**settings, "policies": found})
    names = [title.name for title in titles(found)]
    return Tuned(report, target, dict(zip(names, texts, strict=True)))


def expanded(text: str) -> list[str]:
    """Every setting that `text` stands for: `name:a=1|2,b=3|4` stands for four.

    Raises:
        ConfigError: a value between bars is missing.
    """
    name, colon, rest = text.partition(":")
    fields = []
    for field in rest.split(","):
        key, equals, values = field.partition("=")
        if "|" in values and not all(values.split("|")):
            raise ConfigError(f"{text!r}: got {field!r}, expected values between bars, such as {key}=3|4")
        fields.append([f"{key}{equals}{value}" for value in values.split("|")])
    return [f"{name}{colon}{','.join(chosen)}" for chosen in product(*fields)]


def front_of(rows: Sequence[Row]) -> list[Row]:
    """List the rows that no other beats: none is as fast and as near to the exact run, and better in one of them."""
    return [row for row in rows if not any(_beats(other, row) for other in rows)]


def error_db(row: Row) -> float:
    """PSNR to the exact run, infinite where nothing is off."""
    return math.inf if row.identical or row.psnr_db is None else row.psnr_db


def is_faster(row: Row) -> bool:
    """Than the exact run."""
    return row.speedup > 1


def _beats(a: Row, b: Row) -> bool:
    one, other = (a.speedup, error_db(a)), (b.speedup, error_db(b))
    return one != other and one[0] >= other[0] and one[1] >= other[1]
