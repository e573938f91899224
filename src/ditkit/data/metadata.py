"""Captions of a folder of pictures: Hugging Face's `metadata.jsonl` and `metadata.csv`, and `NAME.txt` files."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ditkit.core.errors import DataError
from ditkit.core.files import check_regular

METADATA = "metadata.jsonl"
TABLE = "metadata.csv"
BESIDE = ".txt"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Entry:
    """One image of the folder before it is read."""

    file_name: str  # relative to the folder, with forward slashes
    caption: str
    label: int = 0


def metadata_of(root: Path) -> Path | None:
    """Find the file of captions in a folder; None if there is none.

    Raises:
        DataError: there are both kinds.
    """
    found = [root / name for name in (METADATA, TABLE) if (root / name).exists()]
    if len(found) > 1:
        raise DataError(f"{root} holds {METADATA} and {TABLE}, expected one of the two")
    return found[0] if found else None


def read_metadata(root: Path) -> list[Entry]:
    """Read the captions of `metadata.jsonl` or `metadata.csv`: of each line its `file_name` and its `text`.

    A text of null, or none between two commas, is an empty caption. Names are compared in one Unicode form, and a
    backslash is a slash where there is no such file.

    Raises:
        DataError: unreadable, not of that form, or an image that is listed twice; names the line.
    """
    path = metadata_of(root) or root / METADATA
    check_regular(path, DataError)
    try:
        content = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    rows = _of_csv(content, path) if path.suffix == ".csv" else _of_jsonl(content, path)
    entries: list[Entry] = []
    first_at: dict[str, int] = {}
    find = _finder(root)
    for number, row in rows:
        place = f"{path}, line {number}"
        entry = _entry(root, row, place, find)
        first = first_at.setdefault(entry.file_name, number)
        if first != number:
            raise DataError(f"{place}: {entry.file_name!r} again, first on line {first}")
        entries.append(entry)
    if not entries:
        raise DataError(f"{path} lists no images, expected a line an image with file_name and text")
    return entries


def beside(root: Path, file_name: str) -> str:
    """Return the caption in the `.txt` file of an image's name, its lines joined; empty if there is none.

    Raises:
        DataError: it cannot be read, or is no text in UTF-8.
    """
    path = (root / file_name).with_suffix(BESIDE)
    check_regular(path, DataError)
    try:
        return " ".join(path.read_bytes().removeprefix(BOM).decode().split())
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8, expected a caption: {error.reason}") from error


def _of_jsonl(content: bytes, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}): {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected a JSON object, found {type(row).__name__}: {line[:60]!r}")
        yield number, row


def _of_csv(content: bytes, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not CSV in UTF-8 ({error})") from error


def _entry(root: Path, row: Mapping[str, Any], place: str, find: Callable[[str], str | None]) -> Entry:
    for key in ("file_name", "text"):
        absent = key == "text" and key in row and row[key] is None
        if not absent and not isinstance(row.get(key), str):
            found = f"{type(row[key]).__name__} {row[key]!r:.60}" if key in row else f"keys {sorted(row)}"
            raise DataError(f"{place}: expected a string {key!r}, found {found}")
    given = row["file_name"]
    relative = PurePath(os.path.normpath(given))
    if not relative.parts:
        raise DataError(f"{place}: file_name {given!r}, expected a path of an image in {root}")
    if relative.is_absolute() or relative.parts[:1] == ("..",):
        raise DataError(f"{place}: file_name {given!r} leads out of the folder")
    name = relative.as_posix() if os.path.isfile(root / relative) else find(given)
    # one that is missing is skipped with the damaged ones, up to their limit
    return Entry(relative.as_posix() if name is None else name, row["text"] or "")


def _finder(root: Path) -> Callable[[str], str | None]:
    """Return what finds a file whose name is written otherwise: another Unicode form, or backslashes."""
    known: dict[str, str] = {}

    def find(name: str) -> str | None:
        if not known:
            known.update((_form(path), path) for path in _files(root))
        wanted = os.path.normpath(name.replace("\\", "/"))
        return known.get(_form(wanted))

    return find


def _files(root: Path) -> Iterable[str]:
    for parent, _, names in os.walk(root):
        relative = PurePath(parent).relative_to(root)
        yield from ((relative / name).as_posix() for name in names)


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)
