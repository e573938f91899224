"""The table of the published systems that ditkit hosts: what each one is, and how far it has come.

`systems.toml` holds one row a system. `load` reads it, `check` compares it with the code.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from ditkit.core.errors import ConfigError, unknown

COUNT = 44
STATUSES = ("works", "partial", "planned")
RESULTS = "benchmarks/results"


@dataclass(frozen=True, kw_only=True)
class System:
    """One row.

    Attributes:
        number: the specification's number, 1 to 44.
        name: the short name that people say.
        title: the paper's full title.
        arxiv: `YYMM.NNNNN`, or empty where none is known.
        status: `works`, `partial` or `planned`.
        components: import paths `ditkit.module:Name`.
        recipe: an import path, or empty.
        tests: paths in the repository, each with an optional `::name`.
        experiment: the recorded result of the specification's experiment, under `benchmarks/results`.
        deviations: each difference from the paper, one sentence.
    """

    number: int
    name: str
    title: str
    arxiv: str
    status: str
    components: tuple[str, ...] = ()
    recipe: str = ""
    tests: tuple[str, ...] = ()
    experiment: str = ""
    deviations: tuple[str, ...] = ()


def load(text: str | None = None) -> tuple[System, ...]:
    """The rows of `text`, by default of the shipped `systems.toml`, in the order of the file.

    Raises:
        ConfigError: not TOML, an unknown or missing key, or a value of another type.
    """
    if text is None:
        text = resources.files("ditkit").joinpath("systems.toml").read_text(encoding="utf-8")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"systems.toml: expected TOML: {error}") from None
    for key in sorted(document.keys() - {"system"}):
        raise ConfigError(f"systems.toml: {unknown('key', key, ['system'])}")
    rows = document.get("system", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"systems.toml: expected [[system]] tables, got system = {rows!r}")
    return tuple(_row(index, row) for index, row in enumerate(rows, start=1))


def check(systems: Sequence[System], root: Path | None = None) -> list[str]:
    """Everything in the table that is not so, one line each; an empty list if all of it holds.

    Components and recipes are imported. The paths in `tests` and `experiment` are looked up below `root`, by
    default the checkout this file lies in; an installed wheel has neither folder, so there they pass unseen.
    """
    root = root or checkout()
    numbers = [system.number for system in systems]
    problems = []
    if numbers != list(range(1, COUNT + 1)):
        problems.append(f"expected the numbers 1 to {COUNT} in order, got {_odd_numbers(numbers)}")
    for system in systems:
        found = [*_untrue(system), *_unimportable(system), *(_unfound(system, root) if root else ())]
        problems += [f"{system.number} {system.name}: {problem}" for problem in found]
    return problems


def checkout() -> Path | None:
    """The repository this package is imported from, or None if it was installed without its tests."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "tests").is_dir() and (root / "pyproject.toml").is_file() else None


def _row(index: int, row: Mapping[str, object]) -> System:
    where, kinds = f"systems.toml: row {index}", get_type_hints(System)
    for key in sorted(row.keys() - kinds.keys()):
        raise ConfigError(f"{where}: {unknown('key', key, kinds)}")
    required = [field.name for field in fields(System) if field.default is MISSING]
    if missing := [name for name in required if name not in row]:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}")
    values: dict[str, Any] = {key: _value(where, key, value, kinds[key]) for key, value in row.items()}
    return System(**values)


def _value(where: str, key: str, value: object, kind: object) -> object:
    if kind in (int, str) and type(value) is kind:
        return value
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    expected = "an integer" if kind is int else "a string" if kind is str else "a list of strings"
    raise ConfigError(f"{where}: {key} = {value!r}, expected {expected}")


def _odd_numbers(numbers: list[int]) -> str:
    counts, expected = Counter(numbers), range(1, COUNT + 1)
    parts = {
        "missing": [n for n in expected if n not in counts],
        "repeated": sorted(n for n, count in counts.items() if count > 1),
        "outside": sorted(n for n in counts if n not in expected),
    }
    listed = [f"{name} {', '.join(map(str, found))}" for name, found in parts.items() if found]
    return "; ".join(listed) or "another order"


def _untrue(system: System) -> Iterator[str]:
    """What the row claims against what it shows."""
    if not (system.name and system.title):
        yield "name and title must not be empty"
    if system.arxiv and not re.fullmatch(r"\d{4}\.\d{5}", system.arxiv):
        yield f"arxiv = {system.arxiv!r}, expected YYMM.NNNNN or an empty string"
    if system.status not in STATUSES:
        yield unknown("status", system.status, STATUSES)
    needed = {"works": ("components", "tests", "experiment"), "partial": ("components",)}
    for key in needed.get(system.status, ()):
        if not getattr(system, key):
            yield f"status is {system.status!r} but {key} is empty"
    if system.status == "planned":
        for key in ("components", "recipe", "tests", "experiment"):
            if getattr(system, key):
                yield f"status is 'planned' but {key} is not empty"


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
    for test in system.tests:
        path, *names = test.split("::")
        if not (root / path).is_file():
            yield f"test {test!r} does not exist: no file {path}"
        elif absent := [name for name in names if name not in _definitions(root / path)]:
            yield f"test {test!r} does not exist: {path} defines no {absent[0]}"
    if not system.experiment:
        return
    inside = (root / system.experiment).resolve().is_relative_to((root / RESULTS).resolve())
    if not inside or not system.experiment.endswith(".json"):
        yield f"experiment {system.experiment!r}, expected a .json file under {RESULTS}"
    elif not (root / system.experiment).is_file():
        yield f"experiment {system.experiment!r} does not exist"


def _definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
