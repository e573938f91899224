"""The check of the table of systems: everything in rows, claims and pages that is not so, one line each."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ditkit.core.errors import ConfigError, unknown
from ditkit.systems import claims, pages
from ditkit.systems.code import component_digests, file_digest
from ditkit.systems.rows import COUNT, STATUSES, System

RESULTS = "benchmarks/results"
NEEDED = {"works": ("components", "tests", "composes", "claims"), "partial": ("components",)}


def check(systems: Sequence[System], root: Path | None = None) -> list[str]:
    """Return everything in the table that is not so, one line each; an empty list if all of it holds.

    Components and recipes are imported. Paths are looked up below `root`, by default the checkout this file lies in;
    an installed wheel has no tests, results or pages, so there they are not looked up.
    """
    root = root or checkout()
    numbers = [system.number for system in systems]
    problems = []
    if numbers != list(range(COUNT)):
        problems.append(f"expected the numbers 0 to {COUNT - 1} in order, got {_odd_numbers(numbers)}")
    for system in systems:
        found = [*_inconsistent(system), *_unimportable(system), *(_unfound(system, root) if root else ())]
        problems += [f"{system.number} {system.name}: {problem}" for problem in found]
    return problems + (_orphans(systems, root) if root else [])


def checkout() -> Path | None:
    """Return the repository this package is imported from, or None if it was installed without its tests."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "tests").is_dir() and (root / "pyproject.toml").is_file() else None


def script_of(system: System) -> str:
    """Return the path of the script that tries the row's claims."""
    return f"benchmarks/claims/{system.stem.replace('-', '_')}.py"


def claims_of(system: System) -> str:
    """Return the path of the row's claims file."""
    return f"{claims.FOLDER}/{system.stem}.json"


def _odd_numbers(numbers: list[int]) -> str:
    counts, expected = Counter(numbers), range(COUNT)
    parts = {
        "missing": [n for n in expected if n not in counts],
        "repeated": sorted(n for n, count in counts.items() if count > 1),
        "outside": sorted(n for n in counts if n not in expected),
    }
    listed = [f"{name} {', '.join(map(str, found))}" for name, found in parts.items() if found]
    return "; ".join(listed) or "another order"


def _inconsistent(system: System) -> Iterator[str]:
    """Yield each contradiction between what the row says and what it lists."""
    if not re.fullmatch(rf"{system.number:02}-[a-z0-9]+(-[a-z0-9]+)*", system.stem):
        yield f"its file is {system.stem}.toml, expected {system.number:02}-name.toml"
    if not (system.name and system.title):
        yield "name and title must not be empty"
    if system.arxiv and not re.fullmatch(r"\d{4}\.\d{5}", system.arxiv):
        yield f"arxiv = {system.arxiv!r}, expected YYMM.NNNNN or an empty string"
    if system.status not in STATUSES:
        yield unknown("status", system.status, STATUSES)
    for key in NEEDED.get(system.status, ()):
        if not getattr(system, key):
            yield f"status is {system.status!r} but {key} is empty"
    if system.status == "planned":
        for key in ("components", "recipe", "tests", "composes", "experiment", "claims", "gpu"):
            if getattr(system, key):
                yield f"status is 'planned' but {key} is not empty"
    for deviation in system.deviations:
        if not deviation.what or not deviation.why:
            yield f"deviation {deviation.what!r} without its {'reason' if deviation.what else 'words'}"


def _unimportable(system: System) -> Iterator[str]:
    paths = [("component", path) for path in system.components]
    if system.recipe:
        paths.append(("recipe", system.recipe))
    for kind, path in paths:
        if not re.fullmatch(r"ditkit(\.\w+)+:\w+", path):
            yield f"{kind} {path!r}, expected ditkit.module:Name"
            continue
        module, name = path.split(":")
        try:
            found = hasattr(importlib.import_module(module), name)
        except Exception as error:  # importing runs the module: whatever it raises, the row is wrong
            yield f"{kind} {path!r} does not import: {type(error).__name__}: {error}"
        else:
            if not found:
                yield f"{kind} {path!r} does not exist: {module} has no {name}"


def _unfound(system: System, root: Path) -> Iterator[str]:
    for test in (*system.tests, *system.composes):
        path, *names = test.split("::")
        if not (root / path).is_file():
            yield f"test {test!r} does not exist: no file {path}"
        elif absent := [name for name in names if name not in _definitions(root / path)]:
            yield f"test {test!r} does not exist: {path} defines no {absent[0]}"
    for command in system.gpu:
        words = shlex.split(command)
        if words[:1] != ["python"] or len(words) < 2 or not words[1].startswith("benchmarks/"):
            yield f"gpu {command!r}, expected python benchmarks/SCRIPT.py"
        elif not (root / words[1]).is_file():
            yield f"gpu {command!r} does not exist: no file {words[1]}"
    yield from _experiment(system, root)
    yield from _claims(system, root)
    yield from _page(system, root)


def _experiment(system: System, root: Path) -> Iterator[str]:
    if not system.experiment:
        return
    inside = (root / system.experiment).resolve().is_relative_to((root / RESULTS).resolve())
    if not inside or not system.experiment.endswith(".json"):
        yield f"experiment {system.experiment!r}, expected a .json file under {RESULTS}"
    elif not (root / system.experiment).is_file():
        yield f"experiment {system.experiment!r} does not exist"


def _claims(system: System, root: Path) -> Iterator[str]:
    """Yield the faults of the row's claims file, and whether it is of other code than is there now."""
    if not system.claims:
        return
    script = script_of(system)
    if system.claims != claims_of(system):
        yield f"claims {system.claims!r}, expected {claims_of(system)}"
        return
    if not (root / script).is_file():
        yield f"claims script {script} does not exist"
        return
    try:
        recorded = claims.read_claims(root / system.claims)
        now = {**component_digests(system.components), script: file_digest(root / script)}
        problems = list(recorded.problems())
    except ConfigError as error:
        yield f"claims: {error}"
        return
    yield from (f"{system.claims}: {problem}" for problem in problems)
    if recorded.system != system.stem:
        yield f"{system.claims}: system = {recorded.system!r}, expected {system.stem!r}"
    if changed := sorted(
        name for name in now | dict(recorded.code) if now.get(name) != recorded.code.get(name)
    ):
        yield f"{system.claims} is of other code than the row's: {', '.join(changed)}; run python {script}"


def _page(system: System, root: Path) -> Iterator[str]:
    """Yield the faults of the row's page, which only a row that works needs to have."""
    path = root / pages.page_of(system)
    if not path.is_file():
        if system.status == "works":
            yield f"status is 'works' but {pages.page_of(system)} does not exist; run {pages.COMMAND}"
        return
    page = path.read_text(encoding="utf-8")
    try:
        expected = pages.filled(system, root, page)
    except ConfigError as error:
        yield f"{pages.page_of(system)}: {error}"
        return
    if expected != page:
        yield f"{pages.page_of(system)} is not what the row and its claims give; run {pages.COMMAND}"
    if system.status == "works":
        for language in ("python", "sh"):
            if not pages.examples(page, language):
                yield f"{pages.page_of(system)} has no ```{language} block that shows how to reach it"


def _orphans(systems: Sequence[System], root: Path) -> list[str]:
    """List claims files and pages that no row has."""
    known = {path for system in systems for path in (system.claims, pages.page_of(system))}
    present = [*(root / claims.FOLDER).glob("*.json"), *(root / pages.FOLDER).glob("[0-9]*.md")]
    names = sorted(path.relative_to(root).as_posix() for path in present)
    return [f"{name}: no row has it" for name in names if name not in known]


def _definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
