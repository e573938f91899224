"""Rows of the table of systems: what a row says, and the reader of `NN-name.toml`, one file a system."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

from ditkit.core.errors import ConfigError, unknown

COUNT = 45
"""Rows, numbered from 0: the baselines and 44 systems."""
STATUSES = ("works", "partial", "planned")


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A difference from the paper.

    Attributes:
        what: the difference, in one sentence.
        why: its reason.
    """

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class System:
    """One row.

    Attributes:
        stem: the name of its file without the ending, such as `12-taylorseer`; its claims and its page are named alike.
        number: the specification's number, 0 to 44.
        name: the short name that people use.
        title: the paper's full title.
        arxiv: `YYMM.NNNNN`, or empty where none is known.
        status: `works`, `partial` or `planned`.
        components: import paths `ditkit.module:Name`.
        recipe: an import path, or empty.
        tests: paths in the repository, each with an optional `::name`.
        composes: tests, written like those, with at least one method of another family, or of its refusal by name.
        experiment: a recorded result under `benchmarks/results`, from before the row had a claims file.
        claims: the claims file, `benchmarks/results/claims/STEM.json`, or empty.
        gpu: commands that are ready and have not been run for want of a GPU, `python benchmarks/SCRIPT.py ...`.
        deviations: each difference from the paper.
    """

    stem: str
    number: int
    name: str
    title: str
    arxiv: str
    status: str
    components: tuple[str, ...] = ()
    recipe: str = ""
    tests: tuple[str, ...] = ()
    composes: tuple[str, ...] = ()
    experiment: str = ""
    claims: str = ""
    gpu: tuple[str, ...] = ()
    deviations: tuple[Deviation, ...] = ()


def load() -> tuple[System, ...]:
    """Read the shipped rows, in the order of their numbers.

    Raises:
        ConfigError: those of `read`.
    """
    return tuple(sorted(map(read, row_files()), key=lambda row: row.number))


def find(text: str) -> System:
    """Return the row of a number (`12`), a name (`taylorseer`, in any case) or a file's stem.

    Raises:
        ConfigError: there is no such row; the message names the nearest.
    """
    rows = load()
    named = {name.lower(): row for row in rows for name in (row.stem, row.name, str(row.number))}
    key = text.strip().lower()
    key = str(int(key)) if key.isdecimal() and key.isascii() else key
    if key not in named:
        raise ConfigError(unknown("system", text, [row.name for row in rows]))
    return named[key]


def read(file: Traversable | Path) -> System:
    """Read one `NN-name.toml`.

    Raises:
        ConfigError: not TOML, an unknown or missing key, or a value of another type.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file.name}: {error}") from None
    return parse(text, file.name)


def parse(text: str, source: str) -> System:
    """Read a row from TOML; `source` is the file's name, from which the stem is taken.

    Raises:
        ConfigError: those of `read`.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: expected TOML: {error}") from None
    return System(stem=source.removesuffix(".toml"), **_values(System, table, source, without=("stem",)))


def row_files() -> Iterator[Traversable]:
    """Yield the shipped `NN-name.toml`."""
    folder = resources.files("ditkit") / "systems"
    return (file for file in folder.iterdir() if file.name.endswith(".toml"))


def _values(
    kind: type, table: Mapping[str, object], source: str, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Build the fields of a dataclass from a table that has exactly its keys."""
    expected = {name: hint for name, hint in get_type_hints(kind).items() if name not in without}
    for key in sorted(table.keys() - expected.keys()):
        raise ConfigError(f"{source}: {unknown('key', key, expected)}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.name not in without]
    if missing := [name for name in required if name not in table]:
        raise ConfigError(f"{source}: missing key {', '.join(missing)}")
    return {key: _value(source, key, value, expected[key]) for key, value in table.items()}


def _value(source: str, key: str, value: object, kind: object) -> object:
    if kind in (int, str) and type(value) is kind:
        return value
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind == tuple[Deviation, ...] and isinstance(value, list) and all(isinstance(v, dict) for v in value):
        tables = enumerate(value, start=1)
        return tuple(Deviation(**_values(Deviation, v, f"{source}: {key} {n}")) for n, v in tables)
    expected = "an integer" if kind is int else "a string" if kind is str else "a list of strings"
    if kind == tuple[Deviation, ...]:
        expected = f"[[{key}]] tables of what and why"
    raise ConfigError(f"{source}: {key} = {value!r}, expected {expected}")
