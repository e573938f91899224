"""`ditkit systems`: the published systems, how far each has come, and what of its claims holds here."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from json import dumps
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from ditkit.core.errors import ConfigError
from ditkit.systems import pages
from ditkit.systems import rows as catalogue
from ditkit.systems.check import check as check_rows
from ditkit.systems.check import checkout
from ditkit.systems.claims import Claims, read_claims

STYLES = {"works": "green", "partial": "yellow", "planned": "dim"}
VERDICT_STYLES = {"held": "green", "refuted": "red"}
SystemName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM")]


def systems(system: SystemName = "", *, json: bool = False, check: bool = False) -> None:
    """List the published systems: which work, which are planned, and where each lives.

    Examples:
        ditkit systems
        ditkit systems 12
        ditkit systems taylorseer
        ditkit systems --json
        ditkit systems --check

    Args:
        system: Number or name of one system: show its row, with the claims of its paper that were tried here.
        json: Print every field as JSON, for a program to read.
        check: Compare the list with the code instead; each thing that is not so is one line, and exit code 2.
    """
    if json and check:
        raise ConfigError("systems: got both --json and --check, expected at most one of them")
    if system and check:
        raise ConfigError(f"systems: got both {system!r} and --check, which compares all rows; leave one out")
    rows = (catalogue.find(system),) if system else catalogue.load()
    if check:
        problems = check_rows(rows)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            raise SystemExit(2)
        print(summary(rows))
    elif json:
        found = [dataclasses.asdict(row) for row in rows]
        print(dumps(found[0] if system else found, indent=2, ensure_ascii=False))
    elif system:
        Console().print(described(rows[0], checkout()))
    else:
        console = Console()
        console.print(table(rows))
        console.print(summary(rows))


def summary(rows: tuple[catalogue.System, ...]) -> str:
    """Return a line such as `45 systems: 1 works, 0 partial, 44 planned`."""
    counts = Counter(row.status for row in rows)
    return f"{len(rows)} systems: " + ", ".join(f"{counts[status]} {status}" for status in catalogue.STATUSES)


def table(rows: tuple[catalogue.System, ...]) -> Table:
    """Return number, name, arXiv number, status and components, for 80 columns."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("#", justify="right")
    out.add_column("system", no_wrap=True)
    out.add_column("arXiv", no_wrap=True)
    out.add_column("status", no_wrap=True)
    out.add_column("components", overflow="fold")
    for row in rows:
        components = "\n".join(_short(path) for path in row.components)
        out.add_row(str(row.number), row.name, row.arxiv, _status(row), components)
    return out


def described(row: catalogue.System, root: Path | None) -> Group:
    """Return one row with its claims, which lie in a checkout of the repository and not in an installed wheel."""
    out = Table(box=None, pad_edge=False, show_header=False)
    out.add_column(style="bold", no_wrap=True)
    out.add_column(overflow="fold")
    for name, value in (
        ("system", f"{row.number} {escape(row.name)}"),
        ("title", escape(row.title)),
        ("arXiv", row.arxiv),
        ("status", _status(row)),
        ("components", "\n".join(row.components)),
        ("recipe", row.recipe),
        ("tests", "\n".join(row.tests)),
        ("composes", "\n".join(row.composes)),
        ("experiment", row.experiment),
        ("not run: no GPU", "\n".join(row.gpu)),
        ("differs", "\n".join(f"- {escape(d.what)}: {escape(d.why)}" for d in row.deviations)),
        ("page", pages.page_of(row) if root and (root / pages.page_of(row)).is_file() else ""),
    ):
        if value:
            out.add_row(name, value)
    if not row.claims:
        return Group(out, "\nNone of its claims has been tried here yet.")
    if root is None:
        return Group(out, f"\nIts claims are recorded in the repository: {row.claims}")
    recorded = read_claims(root / row.claims)
    return Group(out, "", claims_table(recorded), escape(pages.run_line(recorded)))


def claims_table(recorded: Claims) -> Table:
    """Return the claims, for 80 columns: each claim with the paper's figure, ours and its interval, and the verdict."""
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("claim", "paper", "ours", "verdict"):
        out.add_column(name, overflow="fold")
    for claim in recorded.claims:
        style = VERDICT_STYLES.get(claim.verdict, "dim")
        ours = f"{pages.figure(claim)} ({pages.spread(claim)})" if claim.interval else claim.reason
        out.add_row(escape(claim.claim), escape(claim.paper), escape(ours), f"[{style}]{claim.verdict}[/]")
    return out


def _status(row: catalogue.System) -> str:
    return f"[{STYLES.get(row.status, 'red')}]{row.status}[/]"


def _short(component: str) -> str:
    """Shorten `ditkit.caching.taylorseer:TaylorSeer` to `caching.TaylorSeer`."""
    module, _, name = component.partition(":")
    return f"{module.split('.')[1]}.{name}"
