"""`load`: a set by its name, or a user's own folder or file by its path."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.core.files import is_file, is_folder
from ditkit.core.spec import read_value
from ditkit.data.clips import ClipSet
from ditkit.data.decode import is_image
from ditkit.data.event_files import is_event_list
from ditkit.data.event_files import load as load_event_file
from ditkit.data.events import EventSet
from ditkit.data.fields import FieldSet
from ditkit.data.fields import load as load_netcdf
from ditkit.data.folder import load as load_folder
from ditkit.data.folder import walk
from ditkit.data.frames import is_in_memory
from ditkit.data.frames import load as load_frame
from ditkit.data.images import ImageSet
from ditkit.data.rasters import holds_rasters
from ditkit.data.rasters import load as load_rasters
from ditkit.data.satellite import SatelliteSet
from ditkit.data.series import load as load_csv
from ditkit.data.series import suffix_of
from ditkit.data.video_folder import holds_videos
from ditkit.data.video_folder import load as load_video_folder

SETS = "ditkit.data.sets"
Data = ImageSet | ClipSet | FieldSet | EventSet | SatelliteSet
KINDS: Mapping[type, str] = {
    ImageSet: "images",
    FieldSet: "fields",
    EventSet: "events",
    SatelliteSet: "satellite series",
    ClipSet: "clips",
}
FILES: dict[str, Callable[..., Any]] = {
    ".csv": load_csv,
    ".tsv": load_csv,
    ".nc": load_netcdf,
    ".nc4": load_netcdf,
    ".parquet": load_event_file,
}
"""The reader of files of each suffix."""
PART = ("split", "length", "episodes", "max_bad", "max_bytes")
"""Options of loaders that say how much of the data is taken, not what they look like."""


def names() -> tuple[str, ...]:
    """List the named sets: one module of `ditkit.data.sets` each, with a function `load(size, ...)`."""
    found = (module.name for module in pkgutil.iter_modules(importlib.import_module(SETS).__path__))
    return tuple(sorted(name.replace("_", "-") for name in found))


def names_of(kind: str) -> tuple[str, ...]:
    """Return the named sets of one kind, a text of `KINDS`: images, clips, fields ..."""
    return tuple(name for name in names() if KINDS[_kind(_loader(name))] == kind)


def load(name_or_path: str | Path, size: int | tuple[int, int] | None = None, **options: Any) -> Data:
    """Load a named set, or a folder or file of a user's own.

    A folder holds images, videos or dated GeoTIFFs; a file is a CSV of series, a netCDF of fields, or an event list in
    CSV (columns `source` and `destination`) or Parquet.

    `options` go to the set's own loader, for example `split="test"` for `fashion`, `frames=16` for clips,
    `max_bad=0` for a folder. A name wins over a folder of that name: write `./emoji` for the folder.

    Args:
        size: height and width in pixels, one number for a square; fields keep the grid that they have.

    Raises:
        DataError: neither a set nor a folder nor a file that is read, or the data is missing, damaged, or not
            what its checksum says.
        ConfigError: an unknown option, or a size that the set cannot give.
    """
    found: Data = _load(_loader(name_or_path), name_or_path, size, options)
    return found


def read_options(
    name_or_path: str | Path, texts: Sequence[str], decided: Collection[str] = ()
) -> dict[str, Any]:
    """Options for `load` of these data out of texts such as `fps=10`, each read as its loader declares it.

    Several values of one option stand between commas, or with a plus as in a policy's text: `repair=sort,interpolate`,
    `repair=sort+interpolate`. Those `decided` elsewhere are unknown here.

    Raises:
        DataError: no such data, as `load` says.
        ConfigError: an unknown option, one given twice, or a value of another type.
    """
    own = _options_of(name_or_path)
    if Path(name_or_path).suffix.lower() == ".csv" and is_file(name_or_path):
        own = {**_options(partial(load_event_file, name_or_path)), **own}  # which it is, the recipe knows
    known = {name: kind for name, kind in own.items() if name not in decided}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"option {text!r}, expected NAME=VALUE such as fps=10")
        if name not in known:
            raise _unknown_option(name_or_path, name, known)
        if name in given:
            raise ConfigError(f"option {text!r}: {name} is given twice, expected once")
        given[name] = read_value(known[name], value, f"option {text!r}", commas=True)
    return given


def dataset_name(name_or_path: str | Path) -> str:
    """Return the name by which a model remembers data: of a set, or of a folder or file without its parents."""
    if is_in_memory(name_or_path):
        return type(name_or_path).__name__
    return Path(name_or_path).resolve().name if os.path.exists(name_or_path) else str(name_or_path)


def accepts_option(name_or_path: str | Path, option: str) -> bool:
    """Return whether `load` of these data has an option of that name, such as `split`."""
    return option in _options_of(name_or_path)


def load_images(name_or_path: str | Path, size: int | None = None, **options: Any) -> ImageSet:
    """`load` of images. Raises `ConfigError` where the data are something else."""
    found: ImageSet = _load(_loader_of(ImageSet, name_or_path), name_or_path, size, options)
    return found


def load_clips(
    name_or_path: str | Path, size: int | tuple[int, int] | None = None, **options: Any
) -> ClipSet:
    """`load` of clips. Raises `ConfigError` where the data are something else."""
    found: ClipSet = _load(_loader_of(ClipSet, name_or_path), name_or_path, size, options)
    return found


def load_held_out(
    name_or_path: str | Path, size: int | tuple[int, int], frames: int, **options: Any
) -> ClipSet:
    """`load_clips` of the test split; of everything where the loader knows no split."""
    if accepts_option(name_or_path, "split"):
        options = {"split": "test", **options}
    return load_clips(name_or_path, size, frames=frames, **options)


def load_fields(name_or_path: Any, **options: Any) -> FieldSet:
    """`load` of fields or series, which may be a table of pandas or a data set of xarray.

    Raises:
        ConfigError: the data are something else. What `load` raises.
    """
    found: FieldSet = _load(_loader_of(FieldSet, name_or_path), name_or_path, None, options)
    return found


def joined(name_or_path: Any) -> tuple[str, ...]:
    """Return the parts of sets joined by a plus, such as electricity+traffic; of anything else, itself alone."""
    if not isinstance(name_or_path, str) or os.path.exists(name_or_path):
        return (name_or_path,)
    return tuple(name_or_path.split("+"))


def load_several_fields(names_or_paths: Any, **options: Any) -> list[FieldSet]:
    """`load_fields` of each of some sets, joined by a plus.

    Raises:
        ConfigError: one stands twice. What `load_fields` raises.
    """
    parts = joined(names_or_paths)
    if twice := [part for i, part in enumerate(parts) if part in parts[:i]]:
        raise ConfigError(f"data={names_or_paths!r} name {twice[0]!r} twice, expected each set once")
    return [load_fields(part, **options) for part in parts]


def load_events(name_or_path: str | Path, **options: Any) -> EventSet:
    """`load` of events of a graph. Raises `ConfigError` where the data are something else."""
    found: EventSet = _load(_loader_of(EventSet, name_or_path), name_or_path, None, options)
    return found


def load_satellite(
    name_or_path: str | Path, size: int | tuple[int, int] | None = None, **options: Any
) -> SatelliteSet:
    """`load` of satellite series. Raises `ConfigError` where the data are something else."""
    found: SatelliteSet = _load(_loader_of(SatelliteSet, name_or_path), name_or_path, size, options)
    return found


def _load(
    loader: partial[Any],
    name_or_path: str | Path,
    size: int | tuple[int, int] | None,
    options: Mapping[str, Any],
) -> Any:
    for side in size if isinstance(size, tuple) else (size,):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
            raise ConfigError(f"size={size!r} is not a positive whole number of pixels")
    known = _options(loader)
    for option in options:
        if option not in known:
            raise _unknown_option(name_or_path, option, known)
    if "size" in inspect.signature(loader).parameters:
        return loader(**options, size=size)
    if size is not None:
        raise ConfigError(f"{name_or_path}: size={size}, expected none: fields keep their grid")
    return loader(**options)


def _loader_of(kind: type, name_or_path: str | Path) -> partial[Any]:
    """Find the loader of these data, which are of this kind.

    Raises:
        ConfigError: they are of another.
        DataError: a folder that holds nothing of any kind; what `_loader` raises.
    """
    loader = _loader(name_or_path)
    if is_in_memory(name_or_path):
        if kind is not FieldSet:
            raise ConfigError(f"a {dataset_name(name_or_path)} holds fields, expected {KINDS[kind]}")
        return loader
    path = Path(name_or_path)
    if kind is ImageSet and loader.func is load_video_folder and _holds_images(path):
        return partial(load_folder, path)  # a GIF among pictures does not make them films
    held = _kind(loader)
    if held is kind:
        return loader
    if is_folder(path) and SatelliteSet in (kind, held):
        if kind is SatelliteSet:
            return partial(load_rasters, path)  # which says what it misses
        if kind is ImageSet:
            return partial(load_folder, path)  # pictures may have dates in their names
    if kind is EventSet and path.suffix.lower() == ".csv" and is_file(path):
        return partial(load_event_file, path)  # its columns have other names
    if loader.func is load_folder and not _holds_images(path):
        raise DataError(f"{name_or_path} holds no videos and no images, expected {KINDS[kind]}")
    raise ConfigError(f"{name_or_path} holds {KINDS[held]}, expected {KINDS[kind]}")


def _kind(loader: partial[Any]) -> type:
    """Return the class of `KINDS` that a loader's annotation names."""
    loaded = get_type_hints(loader.func)["return"]
    # ClipSet is a protocol with attributes, which issubclass does not take
    kinds = (ImageSet, FieldSet, EventSet, SatelliteSet)
    return next((k for k in kinds if issubclass(loaded, k)), ClipSet)


def _holds_images(root: Path) -> bool:
    return any(is_image(root / f) for f in walk(root)[1])


def _options(loader: partial[Any]) -> dict[str, Any]:
    """Map a loader's options to their annotations: all parameters but the path and the size."""
    hints = get_type_hints(loader.func)
    return {name: hints[name] for name in inspect.signature(loader).parameters if name != "size"}


def _options_of(name_or_path: str | Path) -> dict[str, Any]:
    """`_options` of the loader of these data; of several sets, those that all take."""
    first, *others = [_options(_loader(part)) for part in joined(name_or_path)]
    return {name: kind for name, kind in first.items() if all(name in other for other in others)}


def _unknown_option(name_or_path: str | Path, option: str, known: Mapping[str, Any]) -> ConfigError:
    name = dataset_name(name_or_path) if is_in_memory(name_or_path) else str(name_or_path)
    return ConfigError(unknown(f"option of data set {name!r}:", option, known or ("none",)))


def _loader(name_or_path: str | Path) -> partial[Any]:
    """Find the loader of these data; its function's annotation says what kind they are."""
    if is_in_memory(name_or_path):
        return partial(load_frame, name_or_path)
    if not isinstance(name_or_path, str | os.PathLike):
        raise ConfigError(
            f"data are a {type(name_or_path).__name__}, expected a name, a path, a pandas DataFrame or an "
            "xarray Dataset"
        )
    if isinstance(name_or_path, str) and name_or_path in names():
        return partial(importlib.import_module(f"{SETS}.{name_or_path.replace('-', '_')}").load)
    path = Path(name_or_path)
    if (suffix := suffix_of(path)) in FILES and is_file(path):
        events = path.suffix.lower() == ".csv" and is_event_list(path)
        return partial(load_event_file if events else FILES[suffix], path)
    if is_folder(name_or_path):
        if holds_videos(path):
            return partial(load_video_folder, path)
        return partial(load_rasters if holds_rasters(path) else load_folder, path)
    raise DataError(
        f"{unknown('data set', name_or_path, names())}, and there is no folder, .csv, .tsv, .parquet or .nc file of "
        "that name"
    )
