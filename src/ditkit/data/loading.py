"""`load`: a set by its name, or a user's own folder or file by its path."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.clips import ClipSet
from ditkit.data.fields import FieldSet
from ditkit.data.fields import load as load_netcdf
from ditkit.data.folder import load as load_folder
from ditkit.data.images import ImageSet
from ditkit.data.series import load as load_csv
from ditkit.data.video_folder import holds_videos
from ditkit.data.video_folder import load as load_video_folder

SETS = "ditkit.data.sets"
Data = ImageSet | ClipSet | FieldSet
KINDS = {ImageSet: "images", ClipSet: "clips", FieldSet: "fields"}
FILES: dict[str, Callable[..., FieldSet]] = {".csv": load_csv, ".nc": load_netcdf, ".nc4": load_netcdf}
"""What reads a file of this suffix."""


def names() -> tuple[str, ...]:
    """The named sets: one module of `ditkit.data.sets` each, with a function `load(size, ...)`."""
    found = (module.name for module in pkgutil.iter_modules(importlib.import_module(SETS).__path__))
    return tuple(sorted(name.replace("_", "-") for name in found))


def load(name_or_path: str | Path, size: int | tuple[int, int] | None = None, **options: Any) -> Data:
    """A named set (`names()`), a folder of images or of videos, a CSV file of series or a netCDF file of fields.

    `options` go to the set's own loader, for example `split="test"` for `fashion`, `frames=16` for clips,
    `max_bad=0` for a folder. A name wins over a folder of that name: write `./emoji` for the folder.

    Args:
        size: height and width in pixels, one number for a square; fields keep the grid that they have.

    Raises:
        DataError: neither a set nor a folder nor a file that is read, or the data is missing, damaged, or not
            what its checksum says.
        ConfigError: an unknown option, or a size that the set cannot give.
    """
    for side in size if isinstance(size, tuple) else (size,):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
            raise ConfigError(f"size={size!r} is not a positive whole number of pixels")
    loader = _loader(name_or_path)
    known = list(inspect.signature(loader).parameters)
    for option in options:
        if option not in known or option == "size":
            raise ConfigError(unknown(f"option of data set {str(name_or_path)!r}:", option, known))
    if "size" in known:
        options["size"] = size
    elif size is not None:
        raise ConfigError(f"{name_or_path}: size={size}, expected none: fields keep their grid")
    found: Data = loader(**options)
    return found


def takes(name_or_path: str | Path, option: str) -> bool:
    """Whether `load` of these data has an option of that name, such as `split`. Raises `DataError` as it does."""
    return option in inspect.signature(_loader(name_or_path)).parameters


def load_images(name_or_path: str | Path, size: int | None = None, **options: Any) -> ImageSet:
    """`load` of images. Raises `ConfigError` where the data are something else."""
    return _of(ImageSet, name_or_path, load(name_or_path, size, **options))


def load_clips(
    name_or_path: str | Path, size: int | tuple[int, int] | None = None, **options: Any
) -> ClipSet:
    """`load` of clips. Raises `ConfigError` where the data are something else."""
    return _of(ClipSet, name_or_path, load(name_or_path, size, **options))


def load_held_out(
    name_or_path: str | Path, size: int | tuple[int, int], frames: int, **options: Any
) -> ClipSet:
    """`load_clips` of the test split; of everything where the loader knows no split."""
    if takes(name_or_path, "split"):
        options = {"split": "test", **options}
    return load_clips(name_or_path, size, frames=frames, **options)


def load_fields(name_or_path: str | Path, **options: Any) -> FieldSet:
    """`load` of fields or series. Raises `ConfigError` where the data are something else."""
    return _of(FieldSet, name_or_path, load(name_or_path, **options))


def _of(kind: Any, name: str | Path, data: Data) -> Any:
    if not isinstance(data, kind):
        held = next(text for other, text in KINDS.items() if isinstance(data, other))
        raise ConfigError(f"{name} holds {held}, expected {KINDS[kind]}")
    return data


def _loader(name_or_path: str | Path) -> Callable[..., Data]:
    if isinstance(name_or_path, str) and name_or_path in names():
        loader: Callable[..., Data] = importlib.import_module(f"{SETS}.{name_or_path.replace('-', '_')}").load
        return loader
    path = Path(name_or_path)
    if path.suffix.lower() in FILES and path.is_file():
        return partial(FILES[path.suffix.lower()], path)
    if os.path.isdir(name_or_path):
        own = load_video_folder if holds_videos(path) else load_folder
        return partial(own, path)
    raise DataError(
        f"{unknown('data set', name_or_path, names())}, and there is no folder, .csv or .nc file of that name"
    )
