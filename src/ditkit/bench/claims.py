"""Writer of claims files, which the scripts of `benchmarks/claims/` share.

A script measures, makes a list of `Claim`, and ends with `write(STEM, claims)`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ditkit.bench.origin import origin
from ditkit.core.checkpoint import write_json
from ditkit.core.errors import ConfigError
from ditkit.core.terminal import Table
from ditkit.systems import check, pages
from ditkit.systems.claims import UNTRIED, Claim, Claims
from ditkit.systems.code import component_digests, file_digest
from ditkit.systems.rows import find

__all__ = ["Claim", "table", "write"]


def write(stem: str, claims: Sequence[Claim], *, packages: Sequence[str] = ("torch", "ditkit")) -> Path:
    """Write a row's claims file, fill its page, and print one table.

    Args:
        stem: of the row, such as `12-taylorseer`.
        packages: those whose versions matter to the figures.

    Raises:
        ConfigError: there is no such row, no checkout to write in, no claim that was tried, or the file cannot be
            written.
    """
    system, root = find(stem), check.checkout()
    if root is None:
        raise ConfigError(
            "claims are written into a checkout of the repository, and ditkit is installed without one"
        )
    script = check.script_of(system)
    recorded = Claims(
        system=system.stem,
        core_seconds=round(time.process_time(), 1),
        code={**component_digests(system.components), script: file_digest(root / script)},
        claims=tuple(claims),
        **origin(packages),  # type: ignore[arg-type]
    )
    for problem in recorded.problems():
        raise ConfigError(f"{stem}: {problem}")
    path = root / check.claims_of(system)
    write_json(path, recorded.as_json())
    console = Console()
    console.print(table(recorded))
    console.print(f"wrote {path.relative_to(root)}")
    if not system.claims:
        console.print(
            f'now name it in src/ditkit/systems/{system.stem}.toml: claims = "{check.claims_of(system)}"'
        )
    if system.claims and pages.write_page(system, root):
        console.print(f"wrote {pages.page_of(system)}")
    return path


def table(recorded: Claims) -> Table:
    """Return the claims as a table: claim, the paper's figure, ours, the interval and the verdict."""
    shown = Table("claim", "paper", "ours", "95 % interval", "verdict", title=recorded.system)
    for claim in recorded.claims:
        interval = claim.reason if claim.verdict == UNTRIED else pages.spread(claim)
        shown.add_row(claim.claim, claim.paper, pages.figure(claim), interval, claim.verdict)
    return shown
