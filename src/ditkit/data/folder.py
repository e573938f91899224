"""A user's own folder: images in class folders, or images with captions in a `metadata.jsonl`."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.decode import SUFFIXES, DamagedImage, read_square
from ditkit.data.images import ImageSet
from ditkit.data.progress import tracked

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
LAYOUTS = (
    f"expected class folders (cat/1.png, dog/2.jpg) or a {METADATA} with lines like "
    '{"file_name": "1.png", "text": "a red bird"}'
)


@dataclass(frozen=True)
class Entry:
    """One image of the folder before it is read."""

    file_name: str  # relative to the folder, with forward slashes
    caption: str
    label: int = 0


def load(root: Path, size: int | None = None, max_bad: int = 10, max_bytes: int = 4 * 2**30) -> ImageSet:
    """Read a folder into memory as RGB, cropped as ADM does; damaged files are logged by name and skipped.

    With a `metadata.jsonl` the set has captions and no classes. Otherwise each folder below `root` is
    a class, numbered in alphabetical order, and its name is the caption.

    Raises:
        ConfigError: no size given, or a negative limit.
        DataError: unreadable or empty folder, another layout, a wrong metadata line, more than `max_bad`
            damaged files, a class left without images, or more than `max_bytes` of pixels.
    """
    if size is None:
        raise ConfigError(f"{root}: a folder of images needs a size in pixels, for example size=64")
    if max_bad < 0:
        raise ConfigError(f"max_bad={max_bad}, expected 0 or more damaged files to skip")
    if (root / METADATA).exists():
        classes: tuple[str, ...] = ()
        entries = read_metadata(root)
    else:
        classes, entries = read_class_folders(root)
    needed = len(entries) * 3 * size * size
    if needed > max_bytes:
        raise DataError(
            f"{root}: {len(entries)} images at {size} x {size} need {needed:,} bytes of memory, more than "
            f"max_bytes={max_bytes:,}; give a smaller size or raise max_bytes"
        )
    return _decode(root, entries, classes, size, max_bad)


def read_class_folders(root: Path) -> tuple[tuple[str, ...], list[Entry]]:
    """Class names, and the images below each class folder. Hidden files and folders are left out."""
    folders, files = walk(root)
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(f"{root} holds no images ({' '.join(sorted(SUFFIXES))}); {LAYOUTS}")
    loose = [f for f in images if len(f.parts) == 1]
    if loose:
        raise DataError(
            f"{root} holds {len(loose)} images outside class folders, first {loose[0].name!r}; {LAYOUTS}"
        )
    empty = sorted(set(folders) - {f.parts[0] for f in images})
    if empty:
        raise DataError(f"{root}: class folder {empty[0]!r} holds no images; fill it or take it away")
    index = {name: label for label, name in enumerate(sorted(folders))}
    entries = [Entry(f.as_posix(), f.parts[0].replace("_", " "), index[f.parts[0]]) for f in sorted(images)]
    return tuple(index), entries


def read_metadata(root: Path) -> list[Entry]:
    """Read the lines of `metadata.jsonl`, in the `imagefolder` convention of Hugging Face datasets."""
    path = root / METADATA
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    entries: list[Entry] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        entry = _parse_line(root, line, place)
        first = first_seen.setdefault(entry.file_name, number)
        if first != number:
            raise DataError(f"{place}: {entry.file_name!r} again, first on line {first}")
        entries.append(entry)
    if not entries:
        raise DataError(f"{path} lists no images; {LAYOUTS}")
    return entries


def _parse_line(root: Path, line: bytes, place: str) -> Entry:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}): {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(row).__name__}: {line[:60]!r}")
    for key in ("file_name", "text"):
        if not isinstance(row.get(key), str):
            found = f"{type(row[key]).__name__} {row[key]!r:.60}" if key in row else f"keys {sorted(row)}"
            raise DataError(f"{place}: expected a string {key!r}, found {found}")
    relative = PurePath(os.path.normpath(row["file_name"]))
    if relative.is_absolute() or relative.parts[:1] == ("..",):
        raise DataError(f"{place}: file_name {row['file_name']!r} leads out of the folder")
    if not os.path.isfile(root / relative):
        raise DataError(f"{place}: file_name {row['file_name']!r} does not exist in {root}")
    return Entry(relative.as_posix(), row["text"])


def walk(root: Path) -> tuple[list[str], list[PurePath]]:
    """Names of the folders directly below `root`, and all files, relative to it."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    top: list[str] = []
    files: list[PurePath] = []
    for parent, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(parent).resolve()
        # a link to a folder that holds `parent` would be followed for ever
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not here.is_relative_to((here / name).resolve())
        ]
        relative = PurePath(parent).relative_to(root)
        if not relative.parts:
            top = list(folders)
        files += [relative / name for name in names if not name.startswith(".")]
    return top, files


def _decode(root: Path, entries: list[Entry], classes: tuple[str, ...], size: int, max_bad: int) -> ImageSet:
    pixels = np.empty((len(entries), size, size, 3), np.uint8)
    kept: list[Entry] = []
    bad: list[str] = []
    for entry in tracked(entries, f"reading {root}"):
        try:
            pixels[len(kept)] = read_square(root / entry.file_name, size)
        except DamagedImage as reason:
            bad.append(entry.file_name)
            logger.warning("skipped damaged image %s: %s", root / entry.file_name, reason)
            if len(bad) > max_bad:
                raise DataError(
                    f"{root}: {len(bad)} damaged images, more than max_bad={max_bad}: {', '.join(bad)}"
                ) from reason
        else:
            kept.append(entry)
    left = {entry.label for entry in kept}
    lost = [name for label, name in enumerate(classes) if label not in left]
    if lost or not kept:
        what = f"class folder {lost[0]!r}" if lost else METADATA
        raise DataError(f"{root}: every image of {what} is damaged: {', '.join(bad)}")
    return ImageSet(
        name=root.resolve().name,
        images=torch.from_numpy(pixels[: len(kept)]).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor([entry.label for entry in kept], dtype=torch.int64),
        classes=classes,
        captions=tuple(entry.caption for entry in kept),
        ids=tuple(entry.file_name for entry in kept),
    )
