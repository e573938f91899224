"""Pages of systems: `docs/systems/NN-name.md`, of which one marked part is written from the row and its claims.

All outside of the marked part is written by hand and kept: what the system is, when to use it and when not, and one
line of Python and one of the shell, in fenced blocks that CI runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ditkit.core.checkpoint import replacing
from ditkit.core.errors import ConfigError
from ditkit.systems.claims import UNTRIED, Claim, Claims, read_claims
from ditkit.systems.rows import System

FOLDER = "docs/systems"
COMMAND = "python tools/system_pages.py"
START = f"<!-- row: `{COMMAND}` writes from here to the end of the row; the rest is written by hand -->"
END = "<!-- end of the row -->"
MARKED = re.compile(re.escape(START) + r"\n.*?" + re.escape(END), re.DOTALL)


def page_of(system: System) -> str:
    """Return the path of the row's page."""
    return f"{FOLDER}/{system.stem}.md"


def write_page(system: System, root: Path) -> bool:
    """Write the marked part of the row's page, and the page where there is none; return whether anything changed.

    Raises:
        ConfigError: those of `filled`, or the page cannot be written.
    """
    path = root / page_of(system)
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    after = filled(system, root, before or f"# {system.name}\n\n{START}\n{END}\n")
    if after != before:
        with replacing(path) as draft:
            draft.write_text(after, encoding="utf-8")
    return after != before


def filled(system: System, root: Path, page: str) -> str:
    """Return `page` with its marked part written anew.

    Raises:
        ConfigError: the page has no marked part, or more than one; or the row's claims file cannot be read.
    """
    if (count := len(MARKED.findall(page))) != 1:
        raise ConfigError(f"expected one part from {START!r} to {END!r}, got {count}")
    recorded = read_claims(root / system.claims) if system.claims else None
    part = "\n".join(_part(system, recorded))
    return MARKED.sub(lambda _: f"{START}\n\n{part}\n\n{END}", page)


def examples(page: str, language: str) -> list[str]:
    """Return the fenced blocks of one language that are written by hand."""
    by_hand = MARKED.sub("", page)
    return re.findall(rf"^```{language}\n(.*?)^```$", by_hand, flags=re.DOTALL | re.MULTILINE)


def figure(claim: Claim) -> str:
    """Return our figure with its unit, as a table shows it."""
    return "" if claim.ours is None else f"{claim.ours:.4g} {claim.unit}".rstrip()


def spread(claim: Claim) -> str:
    """Return the interval, as a table shows it."""
    if claim.interval is None:
        return ""
    low, high = claim.interval
    return "counted" if low == high else f"{low:.4g} to {high:.4g}"


def run_line(recorded: Claims) -> str:
    """Return one line on the run that tried the claims: its command, day, device and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in recorded.versions.items())
    threads = f"{recorded.threads} thread{'s' * (recorded.threads != 1)}"
    cost = f"{recorded.core_seconds:.0f} core-seconds"
    return f"`{recorded.command}`, {recorded.date[:10]}, {recorded.device}, {threads}, {cost}; {versions}"


def _part(system: System, recorded: Claims | None) -> Iterator[str]:
    link = f" ([arXiv {system.arxiv}](https://arxiv.org/abs/{system.arxiv}))" if system.arxiv else ""
    yield f"*{system.title}*{link}. Status: **{system.status}**."
    yield from ("", "| | |", "|---|---|")
    for name, values in (
        ("components", system.components),
        ("recipe", (system.recipe,)),
        ("tests", system.tests),
        ("composes", system.composes),
        ("experiment", (system.experiment,)),
    ):
        if shown := "<br>".join(f"`{value}`" for value in values if value):
            yield f"| {name} | {shown} |"
    yield from ("", "## Claims", "")
    yield from ("Not tried yet.",) if recorded is None else _claims(recorded)
    if system.gpu:
        yield from ("", "## Ready, and not run for want of a GPU", "")
        yield from (f"- `{command}`" for command in system.gpu)
    if system.deviations:
        yield from ("", "## Differences from the paper", "")
        yield from (f"- {deviation.what}. *{deviation.why}*" for deviation in system.deviations)


def _claims(recorded: Claims) -> Iterator[str]:
    yield f"From {run_line(recorded)}."
    yield from ("", "| claim | paper | ours | 95 % interval | verdict |", "|---|---|---|---|---|")
    for claim in recorded.claims:
        if claim.verdict != UNTRIED:
            words = "; ".join(part for part in (claim.claim, claim.against, claim.reason) if part)
            yield _row(words, claim.paper, figure(claim), spread(claim), claim.verdict)
    untried = [claim for claim in recorded.claims if claim.verdict == UNTRIED]
    if untried:
        yield from ("", "Not tried:", "")
        yield from (f"- {claim.claim} ({claim.paper}): {claim.reason}" for claim in untried)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
