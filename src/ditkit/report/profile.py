"""A profile as tables, JSON and a plot: time, MACs and bytes by part and by operator class, under the roofs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.bench.operations import OpClass
from ditkit.bench.roofline import Roofs
from ditkit.core.checkpoint import replacing
from ditkit.core.errors import ConfigError
from ditkit.core.terminal import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIGA = 1e9
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000", "#7f7f7f")
"""Okabe and Ito's, which the colour-blind can tell apart."""
MARKERS = "osD^vPX*h"
SMALL = 0.004
"""Share of the time below which a part has no name in the plot."""
JSON, PLOT = "profile.json", "profile.png"


@dataclass(frozen=True)
class Entry:
    """One line: the cost of one operator class in one part of one stage.

    Args:
        seconds: under the profiler. macs: multiply-accumulates over executed shapes; FLOPs are twice as many.
        bytes: read and written, each tensor of an operation once.
    """

    stage: str
    part: str
    kind: OpClass
    seconds: float
    macs: int
    bytes: int


@dataclass(frozen=True)
class SiteCost:
    """Cost of one site, all sites inside it left out; `ran` of its `calls` its function ran."""

    part: str
    seconds: float
    macs: int
    calls: int
    ran: int


@dataclass(frozen=True)
class Profile:
    """The costs of a call, by part, operator class and site.

    Args:
        wall_seconds: of the call under the profiler, to which the entries' seconds sum.
        plain_seconds: of the call alone.
        evaluations: seconds of each forward pass of the denoiser.
        lengths: (evaluation, part, queries, keys, calls) of attention.
        uncounted: operations that multiply and have no formula.
    """

    entries: tuple[Entry, ...]
    sites: Mapping[str, SiteCost]
    wall_seconds: float
    plain_seconds: float
    evaluations: tuple[float, ...]
    lengths: tuple[tuple[int, str, int, int, int], ...]
    roofs: Roofs
    uncounted: tuple[str, ...]
    settings: Mapping[str, Any]

    def by(self, field: str) -> dict[str, Entry]:
        """Return the entries summed by `stage`, `part` or `kind`, the longest first.

        Raises:
            ConfigError: there is no such field.
        """
        if field not in ("stage", "part", "kind"):
            raise ConfigError(f"by={field!r}, expected stage, part or kind")
        groups: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            groups[getattr(entry, field)].append(entry)
        summed = {name: _sum(field, name, group) for name, group in groups.items()}
        return dict(sorted(summed.items(), key=lambda item: -item[1].seconds))

    def share(self, **fields: str) -> float:
        """Return the share of the wall clock of the entries with these fields, such as `kind="attention"`."""
        chosen = (e for e in self.entries if all(getattr(e, name) == want for name, want in fields.items()))
        return sum(entry.seconds for entry in chosen) / self.wall_seconds

    @property
    def macs(self) -> int:
        return sum(entry.macs for entry in self.entries)

    def varying_length(self) -> float:
        """Return the largest number of queries over the smallest."""
        queries = [queries for _, _, queries, _, _ in self.lengths]
        return max(queries) / min(queries) if queries else 1.0

    def tables(self) -> list[Table]:
        """Return a table by part and one by operator class, for a terminal of 80 columns."""
        return [self._table("part", _rate), self._table("kind", self._under_roof)]

    def remarks(self) -> Iterable[str]:
        """Say what the tables do not: wall clock, roofs, sequence lengths, what was not counted."""
        per = f"{self.plain_seconds:.3g} s alone, {self.wall_seconds:.3g} s under the profiler, to which shares refer"
        yield f"{per}; {self.macs / GIGA:.4g} GMACs in {len(self.evaluations)} forward passes"
        roofs = self.roofs
        yield (
            f"this machine multiplies {roofs.flops / 2 / GIGA:.3g} GMAC/s in {roofs.dtype} on {roofs.threads} "
            f"threads and moves {roofs.bandwidth / GIGA:.3g} GB/s: the ridge is {roofs.ridge:.3g} FLOP/byte"
        )
        queries = sorted({queries for _, _, queries, _, _ in self.lengths})
        if queries:
            listed = ", ".join(map(str, queries[:8])) + (", ..." if len(queries) > 8 else "")
            yield f"queries of attention: {listed}; largest over smallest {self.varying_length():.3g}"
        skipped = sum(site.calls - site.ran for site in self.sites.values())
        if skipped:
            called = sum(site.calls for site in self.sites.values())
            yield f"{skipped} of {called} calls of sites did not run their function: a policy answered"
        if self.uncounted:
            yield "without a formula, counted as no MACs: " + ", ".join(self.uncounted)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            **self.settings,
            "wall_seconds": self.wall_seconds,
            "plain_seconds": self.plain_seconds,
            "roofs": asdict(self.roofs),
            "entries": [asdict(entry) for entry in self.entries],
            "sites": {name: asdict(site) for name, site in self.sites.items()},
            "evaluations": list(self.evaluations),
            "lengths": [
                dict(zip(("evaluation", "part", "queries", "keys", "calls"), row, strict=True))
                for row in self.lengths
            ],
            "uncounted": list(self.uncounted),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write profile.json and profile.png into a folder, made if it is not there; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / JSON) as draft:
            draft.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")
        with replacing(folder / PLOT) as draft:
            self.plot().savefig(draft, format="png", dpi=110)
        return [folder / JSON, folder / PLOT]

    def plot(self) -> Figure:
        """Draw the shares of time and MACs by part, and each operator class under the roofs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 5), layout="constrained")
        bars, roof = figure.subplots(1, 2, width_ratios=(1, 1.15))
        self._draw_shares(bars)
        self._draw_roofs(roof)
        return figure

    def _draw_shares(self, axes: Any) -> None:
        parts = [e for e in self.by("part").values() if e.seconds > SMALL * self.wall_seconds][::-1]
        places = range(len(parts))
        times = [100 * part.seconds / self.wall_seconds for part in parts]
        macs = [100 * part.macs / max(self.macs, 1) for part in parts]
        axes.barh([p + 0.2 for p in places], times, 0.38, color=COLOURS[0], label="time")
        axes.barh([p - 0.2 for p in places], macs, 0.38, color=COLOURS[1], hatch="//", label="MACs")
        axes.set_yticks(list(places), [part.part for part in parts])
        axes.set_xlabel("share, %")
        axes.set_title(f"{self.wall_seconds:.3g} s, {self.macs / GIGA:.3g} GMACs by part", loc="left")
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)

    def _draw_roofs(self, axes: Any) -> None:
        kinds = [e for e in self.by("kind").values() if e.macs and e.bytes and e.seconds > 0]
        intensities = [2 * e.macs / e.bytes for e in kinds] or [self.roofs.ridge]
        low, high = min([*intensities, self.roofs.ridge]) / 4, max([*intensities, self.roofs.ridge]) * 4
        line = [low, self.roofs.ridge, high]
        axes.loglog(
            line, [self.roofs.attainable(x) / GIGA for x in line], color="#1b1f24", label="measured roofs"
        )
        for e, x, colour, marker in zip(kinds, intensities, COLOURS, MARKERS, strict=False):
            share = 100 * e.seconds / self.wall_seconds
            y = 2 * e.macs / e.seconds / GIGA
            axes.loglog([x], [y], marker, ms=9, color=colour, label=f"{e.kind}, {share:.0f} % of the time")
        axes.set_xlabel("FLOP per byte read or written")
        axes.set_ylabel("GFLOP/s")
        axes.set_title("operator classes under the machine's roofs", loc="left")
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)

    def _table(self, field: str, last: Callable[[Entry], tuple[str, ...]]) -> Table:
        heads = ("GMAC/s", "bytes G") if last is _rate else ("FLOP/B", "roof", "of it")
        table = Table(box=None, header_style="", pad_edge=False)
        table.add_column({"part": "part", "kind": "operator class"}[field])
        for head in ("time s", "share", "GMACs", "share", *heads):
            table.add_column(head, justify="right")
        for name, entry in self.by(field).items():
            share = 100 * entry.seconds / self.wall_seconds
            work = (
                f"{entry.macs / GIGA:.3g}" if entry.macs else "-",
                f"{100 * entry.macs / max(self.macs, 1):.1f}%" if entry.macs else "-",
            )
            table.add_row(name, f"{entry.seconds:.3g}", f"{share:.1f}%", *work, *last(entry))
        return table

    def _under_roof(self, entry: Entry) -> tuple[str, ...]:
        if not entry.macs or not entry.bytes or entry.seconds <= 0:
            return ("-", "-", "-")
        intensity = 2 * entry.macs / entry.bytes
        reached = 2 * entry.macs / entry.seconds / self.roofs.attainable(intensity)
        return (f"{intensity:.3g}", self.roofs.side(intensity), f"{100 * reached:.0f}%")


def _rate(entry: Entry) -> tuple[str, ...]:
    rate = f"{entry.macs / GIGA / entry.seconds:.3g}" if entry.macs and entry.seconds > 0 else "-"
    return (rate, f"{entry.bytes / GIGA:.3g}")


def _sum(field: str, name: str, group: Sequence[Entry]) -> Entry:
    first = group[0]
    kept: Any = {word: getattr(first, word) if word == field else "" for word in ("stage", "part", "kind")}
    return Entry(
        **kept,
        seconds=sum(entry.seconds for entry in group),
        macs=sum(entry.macs for entry in group),
        bytes=sum(entry.bytes for entry in group),
    )
