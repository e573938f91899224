"""A user's own folder: images in class folders, with captions, or by themselves; with splits or without."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
import torch

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.decode import DamagedImage, is_image, read_square
from ditkit.data.images import ImageSet
from ditkit.data.metadata import BESIDE, METADATA, TABLE, Entry, beside, metadata_of, read_metadata
from ditkit.data.progress import tracked

logger = logging.getLogger(__name__)

Blank = Literal["keep", "drop"]
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits by the names of their folders, as Hugging Face's imagefolder knows them."""
SHOWN = 3
LAYOUTS = (
    f"expected class folders (cat/1.png, dog/2.jpg), or images with a {METADATA} with lines like "
    '{"file_name": "1.png", "text": "a red bird"}, or with a caption each in 1.txt beside 1.png'
)


def load(
    root: Path,
    size: int | None = None,
    split: str | None = None,
    blank: Blank = "keep",
    max_bad: int = 10,
    max_bytes: int = 4 * 2**30,
) -> ImageSet:
    """Read a folder into memory as RGB, cropped as ADM does; damaged or missing files are logged by name and skipped.

    With a `metadata.jsonl` or `metadata.csv` the set has captions and no classes. Otherwise each folder below `root`
    is a class, numbered in alphabetical order, and its name is the caption; images outside of folders are a set
    without classes. A text `1.txt` beside `1.png` is its caption. A folder that holds nothing but one other folder of
    such a layout is that folder, and folders named train, val, test are splits. Files that nothing reads are named in
    one warning.

    Args:
        split: train, validation or test, of a folder that has splits; by default train, or the only one.
        blank: keep pictures whose caption is missing or empty, or drop them.

    Raises:
        ConfigError: no size given, a negative limit, or a split that is not there.
        DataError: unreadable or empty folder, another layout, a wrong metadata line, more than `max_bad`
            damaged or missing files, a class left without images, or more than `max_bytes` of pixels.
    """
    if size is None:
        raise ConfigError(f"{root}: a folder of images needs a size in pixels, for example size=64")
    if max_bad < 0:
        raise ConfigError(f"max_bad={max_bad}, expected 0 or more damaged files to skip")
    if blank not in ("keep", "drop"):
        raise ConfigError(unknown("blank", blank, ("keep", "drop")))
    whole, name, root = root, root.resolve().name, chosen_split(unwrapped(root), split)
    classes, entries = read_entries(root)
    warn_of_links(whole, [root / entry.file_name for entry in entries])
    if blank == "drop":
        entries = _with_captions(root, entries)
    needed = len(entries) * 3 * size * size
    if needed > max_bytes:
        raise DataError(
            f"{root}: {len(entries)} images at {size} x {size} need {needed:,} bytes of memory, more than "
            f"max_bytes={max_bytes:,}; give a smaller size or raise max_bytes"
        )
    return replace(_decode(root, entries, classes, size, max_bad), name=name)


def unwrapped(root: Path) -> Path:
    """Return the folder that holds the layout: `root`, or what it wraps in folders that hold nothing else."""
    while True:
        folders, files = _directly(root)
        if files or len(folders) != 1:
            return root
        inner = root / folders[0]
        below, beside_them = _directly(inner)
        if metadata_of(inner) is None and (not below or _holds_image(inner, beside_them)):
            return root  # one class
        root = inner


def chosen_split(root: Path, split: str | None) -> Path:
    """Return the folder of a split; `root` itself where it has none.

    Raises:
        ConfigError: there is no such split.
    """
    folders, files = _directly(root)
    known = {kind: name for name in folders for kind, names in SPLITS.items() if name.lower() in names}
    if not known or len(known) < len(folders) or _holds_image(root, files) or metadata_of(root) is not None:
        if split is not None:
            raise ConfigError(f"{root}: split={split!r}, but there are no folders train, val or test")
        return root
    wanted = next((kind for kind, names in SPLITS.items() if split in names), split)
    if wanted is None:
        wanted = "train" if "train" in known else next(iter(known))
        if len(known) > 1:
            logger.info("%s: of the splits %s, %s is read", root, ", ".join(known), wanted)
    if wanted not in known:
        raise ConfigError(unknown(f"split of {root}:", split or "", known))
    return root / known[wanted]


def read_entries(root: Path) -> tuple[tuple[str, ...], list[Entry]]:
    """Read class names and images with their captions, by whatever layout the folder has."""
    _, files = walk(root)
    classes: tuple[str, ...] = ()
    if metadata_of(root) is not None:
        entries = read_metadata(root)
        used = {METADATA, TABLE}
    else:
        classes, entries = read_class_folders(root)
        texts = {f.as_posix() for f in files if f.suffix.lower() == BESIDE}
        used = {PurePath(e.file_name).with_suffix(BESIDE).as_posix() for e in entries} & texts
        if used:
            entries = [replace(e, caption=beside(root, e.file_name)) for e in entries]
    _warn_of_unread(root, files, used | {entry.file_name for entry in entries})
    return classes, entries


def read_class_folders(root: Path) -> tuple[tuple[str, ...], list[Entry]]:
    """Class names, and the images below each class folder; no classes where no image is in a folder.

    Hidden files and folders are left out.
    """
    folders, files = walk(root)
    images = [f for f in files if is_image(root / f)]
    if not images:
        raise DataError(f"{root} holds no images; {LAYOUTS}")
    loose = [f for f in images if len(f.parts) == 1]
    if len(loose) == len(images):
        return (), [Entry(f.as_posix(), "") for f in sorted(images)]
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


def _holds_image(folder: Path, names: Sequence[str]) -> bool:
    return any(is_image(folder / name) for name in names)


def _with_captions(root: Path, entries: list[Entry]) -> list[Entry]:
    kept = [entry for entry in entries if entry.caption.strip()]
    if not kept:
        raise DataError(f"{root}: none of {len(entries)} images has a caption, expected some for blank=drop")
    if len(kept) < len(entries):
        logger.warning(
            "%s: %d of %d images have no caption and are left out",
            root,
            len(entries) - len(kept),
            len(entries),
        )
    return kept


def _warn_of_unread(root: Path, files: Sequence[PurePath], used: Collection[str]) -> None:
    """Name in one warning the files that no reader uses."""
    unread = sorted(name for f in files if (name := f.as_posix()) not in used)
    if unread:
        some = ", ".join(unread[:SHOWN]) + (" ..." if len(unread) > SHOWN else "")
        logger.warning("%s: %d files are not read: %s", root, len(unread), some)


def warn_of_links(root: Path, files: Sequence[Path]) -> None:
    """Say in one warning that links lead out of a folder and are followed."""
    home, real = root.resolve(), dict[Path, Path]()
    leaving = []
    for file in files:
        parent = real.get(file.parent) or real.setdefault(file.parent, file.parent.resolve())
        place = (parent / file.name).resolve() if file.is_symlink() else parent
        if not place.is_relative_to(home):
            leaving.append(file.relative_to(root).as_posix())
    if leaving:
        some = ", ".join(leaving[:SHOWN]) + (" ..." if len(leaving) > SHOWN else "")
        logger.warning(
            "%s: %d files lie elsewhere, where links lead, and are read: %s", root, len(leaving), some
        )


def _directly(root: Path) -> tuple[list[str], list[str]]:
    """List the folders and files directly in a folder, without hidden ones.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error
    folders = sorted(entry.name for entry in visible if entry.is_dir())
    return folders, [entry.name for entry in visible if not entry.is_dir()]


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
                    f"{root}: {len(bad)} damaged or missing images, more than max_bad={max_bad}: {', '.join(bad)}"
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
