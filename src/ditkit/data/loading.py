"""`load`: a set by its name, or a folder by its path."""

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
from ditkit.data.folder import load as load_folder
from ditkit.data.images import ImageSet

SETS = "ditkit.data.sets"


def names() -> tuple[str, ...]:
    """The named sets: one module of `ditkit.data.sets` each, with a function `load(size, ...)`."""
    return tuple(
        sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(SETS).__path__))
    )


def load(name_or_path: str | Path, size: int | None = None, **options: Any) -> ImageSet:
    """Load a named set (`names()`) or a folder of images, at `size` x `size` pixels.

    `options` go to the set's own loader, for example `split="test"` for `fashion`, `skin_tones=True` for
    `emoji`, `max_bad=0` for a folder. A name wins over a folder of that name: write `./emoji` for the folder.

    Raises:
        DataError: neither a set nor a folder, or the data is missing, damaged, or not what its checksum says.
        ConfigError: an unknown option, or a size that the set cannot give.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"size={size!r} is not a positive whole number of pixels")
    loader = _loader(name_or_path)
    known = [option for option in inspect.signature(loader).parameters if option != "size"]
    for option in options:
        if option not in known:
            raise ConfigError(unknown(f"option of data set {str(name_or_path)!r}:", option, known))
    return loader(size=size, **options)


def _loader(name_or_path: str | Path) -> Callable[..., ImageSet]:
    if isinstance(name_or_path, str) and name_or_path in names():
        loader: Callable[..., ImageSet] = importlib.import_module(f"{SETS}.{name_or_path}").load
        return loader
    if os.path.isdir(name_or_path):
        return partial(load_folder, Path(name_or_path))
    raise DataError(f"{unknown('data set', name_or_path, names())}, and there is no folder of that name")
