"""GeoTIFFs of a person's own: a folder of dated images on one grid, with masks, a second sensor and classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.clips import frame_size
from ditkit.data.satellite import Dates, SatelliteSet, Scenes, Weather, calendar_of

SUFFIXES = (".tif", ".tiff")
PARTS = ("optical", "clouds", "radar", "classes")
"""Folders of a place, by what their files hold; its own files are optical."""
SCALES: Mapping[str, float] = {"uint8": 255.0, "uint16": 10_000.0, "int16": 10_000.0}
"""The number that stands for a reflectance of 1, by the type of the files; of other types it is 1."""
TAGS = ("TIFFTAG_DATETIME", "ACQUISITION_DATE", "DATE_ACQUIRED", "SENSING_TIME", "DATETIME", "DATE")
DASHED = re.compile(r"(?<!\d)((?:19|20)\d{2})[-_.:](\d{2})[-_.:](\d{2})(?!\d)")
JOINED = re.compile(r"(?<!\d)((?:19|20)\d{2})(\d{2})(\d{2})(?=\D|$|T?\d{6}(?!\d))")
OF_YEAR = re.compile(r"(?<!\d)((?:19|20)\d{2})(\d{3})(?!\d)")
NAMES = "2024-05-31, 20240531 or 2024152 (year and day of the year)"
HELD_OUT = 5
"""Every fifth crop of a folder is its test split, where there are so many."""
SPLITS = ("all", "train", "test")
MAX_BYTES = 4 * 2**30
Split = Literal["all", "train", "test"]
Crop = tuple[int, int, int]
"""Number of the place, first row and first column."""


class Raster(NamedTuple):
    """A GeoTIFF: values [C, H, W] as they stand, where they are data in every band [H, W], and the grid that they lie on.

    Args:
        crs: of the grid, as text; "" for none. transform: its six numbers, from columns and rows to the crs.
        tags: of the file.
    """

    path: Path
    values: NDArray[Any]
    valid: NDArray[np.bool_]
    crs: str
    transform: tuple[float, ...]
    tags: Mapping[str, str]
    bands: tuple[str, ...] = ()

    @property
    def grid(self) -> str:
        """Put the grid into words: size, first corner, pixel and reference system."""
        a, _, x, _, e, y = self.transform[:6]
        height, width = self.values.shape[-2:]
        where = self.crs.split("[")[0] if self.crs else "no reference system"
        return f"{height} x {width} pixels of {a:g} x {abs(e):g} from ({x:.10g}, {y:.10g}), {where}"

    def on_grid_of(self, other: Raster) -> bool:
        """Return whether both have the same pixels."""
        near = np.allclose(self.transform, other.transform, rtol=1e-9, atol=1e-6 * abs(other.transform[0]))
        return near and self.crs == other.crs and self.values.shape[-2:] == other.values.shape[-2:]

    def corners(self) -> NDArray[np.float64]:
        """Return longitude and latitude of the corners, [2, 2, 2]: north, south; west, east. NaN without a crs."""
        height, width = self.values.shape[-2:]
        if not self.crs:
            return np.full((2, 2, 2), np.nan)
        rasterio = _rasterio()
        a, b, x, d, e, y = self.transform[:6]
        pixels = [(0, 0), (width, 0), (0, height), (width, height)]
        xs, ys = ([p * col + q * row + r for col, row in pixels] for p, q, r in ((a, b, x), (d, e, y)))
        found = rasterio.warp.transform(self.crs, "EPSG:4326", xs, ys)
        return np.array(found).T.reshape(2, 2, 2)


@dataclass(frozen=True, eq=False)
class Place:
    """All dates of one place, in the order of time.

    Args:
        optical: float32 [T, C, H, W] in [-1, 1], 0 where hidden. hidden: [T, H, W] bool.
        files: of the dates. sources: all that belong to the place. first: the earliest raster, whose grid all have. unit: the number of a reflectance of 1.
        radar: float32 [T, R, H, W] of the nearest date, NaN where it has no value; or None.
        classes: int64 [T, H, W], or None.
    """

    name: str
    optical: Tensor
    hidden: Tensor
    dates: Dates
    files: tuple[Path, ...]
    first: Raster
    unit: float
    radar: Tensor | None = None
    classes: Tensor | None = None
    sources: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.dates)


class RasterSeries(SatelliteSet):
    """Windows in time and space of a person's own places; clouds are simulated over what is clear, to learn from.

    Windows follow one another by one date, and crops by their size. A place of fewer dates is filled up at its end.
    """

    def __init__(
        self,
        name: str,
        places: Sequence[Place],
        frames: int,
        size: tuple[int, int],
        weather: Weather,
        seed: int,
    ) -> None:
        self.name, self.places, self.frames, self.size = name, tuple(places), frames, size
        self.weather, self.seed, self.has_split = weather, seed, False
        first = places[0].first
        self.bands = first.bands
        if (radar := places[0].radar) is not None:
            self.radar_bands = tuple(f"radar {i + 1}" for i in range(radar.shape[1]))
        if any(place.classes is not None for place in places):
            most = max(int(p.classes.max()) for p in places if p.classes is not None)
            self.classes = tuple(str(k) for k in range(most + 1))
        self.windows = [
            (p, start, top, left)
            for p, place in enumerate(places)
            for top in corners(place.optical.shape[2], size[0])
            for left in corners(place.optical.shape[3], size[1])
            for start in range(max(1, len(place) - frames + 1))
        ]

    def part(self, split: Split) -> RasterSeries:
        """Keep the windows of a split: every fifth crop is for the test, where there are so many.

        The last crops of a side overlap others: those that share a pixel with the test belong to neither split.
        """
        crops = list(dict.fromkeys((p, top, left) for p, _, top, left in self.windows))
        if self.has_split or split == "all" or len(crops) < HELD_OUT:
            return self
        test = crops[HELD_OUT - 1 :: HELD_OUT]
        kept = set(test) if split == "test" else set(crops) - self._touched(crops, test)
        self.windows = [w for w in self.windows if (w[0], *w[2:]) in kept]
        self.has_split = True
        return self

    def _touched(self, crops: Sequence[Crop], test: Sequence[Crop]) -> set[Crop]:
        """Return all corners of crops that share a pixel with one of the test."""
        near = []
        for axis, length in enumerate(self.size, start=1):
            starts = {crop[axis] for crop in crops}
            near.append({a: [b for b in starts if abs(a - b) < length] for a in starts})
        return {(p, row, column) for p, top, left in test for row in near[0][top] for column in near[1][left]}

    def __len__(self) -> int:
        return len(self.windows)

    def id(self, index: int) -> str:
        """Name the place, the first date and the corner: `farm@2024-05-31+64+0`."""
        p, start, top, left = self.windows[index]
        return f"{self.places[p].name}@{self.places[p].dates[start]}+{top}+{left}"

    def scenes(self, indices: Tensor, skies: Iterable[torch.Generator] | None = None) -> Scenes:
        drawn = [None] * len(indices) if skies is None else skies
        parts = [self._one(i, draw) for i, draw in zip(indices.tolist(), drawn, strict=True)]
        joined: dict[str, Any] = {}
        for name in Scenes._fields:
            values = [getattr(part, name) for part in parts]
            if name != "dates":
                joined[name] = None if values[0] is None else torch.stack(values)
        return Scenes(dates=np.stack([part.dates for part in parts]), **joined)

    def _one(self, index: int, draw: torch.Generator | None = None) -> Scenes:
        p, start, top, left = self.windows[index]
        place, (height, width) = self.places[p], self.size
        count = min(self.frames, len(place) - start)
        frames = torch.arange(start, start + count)
        cut = slice(top, top + height), slice(left, left + width)
        if draw is None:
            own = np.random.SeedSequence((self.seed, index)).generate_state(1)[0]
            draw = torch.Generator().manual_seed(int(own))
        image = self._filled_up(place.optical[frames][:, :, *cut].transpose(0, 1), 0.0)
        missing = self._filled_up(place.hidden[frames][:, *cut][None], True)
        sky = self.weather.draw(self.frames, self.size, draw)
        dates = np.concatenate(
            [
                place.dates[start : start + count],
                np.repeat(place.dates[start + count - 1], self.frames - count),
            ]
        )
        days, day_of_year = calendar_of(dates)
        radar, classes = place.radar, place.classes
        if classes is None and self.classes:  # other places have some
            classes = torch.full_like(place.hidden, -1, dtype=torch.int64)
        return Scenes(
            image=image,
            known=~missing,
            hidden=missing | sky.hidden[None],
            observed=torch.where(missing, image, sky.over(image)),
            days=days,
            day_of_year=day_of_year,
            place=centre(place.first, top + height / 2, left + width / 2),
            present=torch.arange(self.frames) < count,
            dates=dates,
            radar=None
            if radar is None
            else self._filled_up(radar[frames][:, :, *cut].transpose(0, 1), torch.nan),
            labels=None if classes is None else self._filled_up(classes[frames][:, *cut][None], -1)[0],
        )

    def _filled_up(self, x: Tensor, value: float) -> Tensor:
        """Append dates of `value` to [C, T, H, W] until there are `frames`."""
        missing = self.frames - x.shape[1]
        if not missing:
            return x
        return torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), value)], 1)


def load(
    folder: str | Path,
    size: int | tuple[int, int] | None = None,
    frames: int = 8,
    split: Split = "all",
    scale: float | None = None,
    least_cloud: float = 0.5,
    most_cloud: float = 0.85,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> RasterSeries:
    """Load a folder of GeoTIFFs: one place, or a folder for each of several.

    A place holds dated images, in itself or in `optical/`; in `clouds/` masks that are not 0 where something hides the
    ground, in `radar/` a second sensor in decibels (the nearest date is taken), in `classes/` maps of land cover from 0
    on. A date stands in the file's name (2024-05-31, 20240531, 2024152) or in its tags. All files of a place lie on
    one grid.

    Args:
        size: height and width of a crop, 64 unless given.
        frames: dates of a window.
        scale: the number that stands for a reflectance of 1; by the files' type unless given: 10,000 of 16-bit
            integers, 255 of bytes, 1 of other numbers. What is above is cut.
        least_cloud, most_cloud: share of each date over which clouds are simulated, to learn from.
        max_bytes: of the images of a place in memory.

    Raises:
        DataError: no images, no date, other grids or bands, all hidden, smaller than a crop, or too large; names the
            file.
        ConfigError: a number out of range, or the package rasterio is not installed.
    """
    own = frame_size(64 if size is None else size)
    integer("frames", frames, least=2)
    if split not in SPLITS:
        raise ConfigError(unknown("split", split, SPLITS))
    if scale is not None and not 0 < scale < float("inf"):
        raise ConfigError(f"scale={scale}, expected a positive number, such as 10000")
    weather = Weather(least_cloud, most_cloud)
    root = Path(folder)
    places = [read_place(path, scale, max_bytes) for path in places_of(root)]
    first = places[0]
    for place in places:
        _check_alike(first, place)
        if place.optical.shape[2] < own[0] or place.optical.shape[3] < own[1]:
            raise DataError(f"{place.name} has {place.first.grid}, smaller than size={own[0]} x {own[1]}")
    return RasterSeries(root.resolve().name, places, frames, own, weather, seed).part(split)


def holds_rasters(folder: Path) -> bool:
    """Return whether a folder is laid out as a place, or as several, of dated GeoTIFFs."""
    inside = [folder, *(p for p in _folders(folder) if p.name not in PARTS)]
    if any((path / "optical").is_dir() and _tiffs(path / "optical") for path in inside):
        return True
    return any(file for path in inside for file in _tiffs(path) if date_in(file.stem) is not None)


def places_of(root: Path) -> list[Path]:
    """List the folders of places: the root itself, if it holds images, else its folders that do.

    Raises:
        DataError: none does.
    """
    found = [path for path in (root, *_folders(root)) if path.name not in PARTS and _optical(path)]
    if root in found:
        return [root]
    if not found:
        raise DataError(
            f"{root} holds no GeoTIFFs, expected dated files ({NAMES}) in it, in optical/, or in a folder a place"
        )
    return found


def read_place(folder: Path, scale: float | None = None, max_bytes: int = MAX_BYTES) -> Place:
    """Read all dates of one place.

    Raises:
        DataError: as `load` says.
    """
    dated = _dated(_optical(folder))
    earliest, *others = dated.values()
    first = read_raster(earliest)
    need = 4 * len(dated) * first.values.size
    if need > max_bytes:
        raise DataError(
            f"{folder} has {len(dated)} dates of {len(first.values)} bands and {first.grid}: {need:,} bytes, expected "
            f"at most max_bytes={max_bytes:,}; cut the scene into places, or raise it"
        )
    rasters = [first, *map(read_raster, others)]
    for raster in rasters[1:]:
        _check_grid(raster, first, bands=True)
        if scale is None and raster.values.dtype != first.values.dtype:
            raise DataError(
                f"{raster.path} holds {raster.values.dtype}, {earliest.name} holds {first.values.dtype}, expected one "
                "type, or scale=NUMBER for all"
            )
    dates = np.array(list(dated), dtype="M8[D]")
    unit = SCALES.get(first.values.dtype.name, 1.0) if scale is None else scale
    values = np.stack([raster.values for raster in rasters]).astype(np.float32) / unit
    hidden = ~np.stack([raster.valid for raster in rasters]) | ~np.isfinite(values).all(1)
    clouds = _dated(_tiffs(folder / "clouds"))
    for day, path in clouds.items():
        if day not in dated:
            raise DataError(f"{path} is a mask of {day}, of which {folder.name} has no image")
    for i, day in enumerate(dated):
        if day in clouds:
            mask = _on_grid(read_raster(clouds[day]), first)
            hidden[i] |= (mask.values != 0).any(0)
    optical = torch.from_numpy(np.where(hidden[:, None], 0.5, values).clip(0, 1)) * 2 - 1
    radar = _second_sensor(folder / "radar", dates, first)
    if hidden.all() and radar is None:
        raise DataError(
            f"{folder}: every pixel of all {len(dates)} dates is hidden, expected some that are clear"
        )
    return Place(
        name=folder.resolve().name,
        optical=optical.float(),
        hidden=torch.from_numpy(hidden),
        dates=dates,
        files=tuple(dated.values()),
        first=first,
        unit=unit,
        radar=radar,
        classes=_classes(folder / "classes", dates, first),
        sources=(*_optical(folder), *(file for part in PARTS[1:] for file in _tiffs(folder / part))),
    )


def _second_sensor(folder: Path, dates: Dates, first: Raster) -> Tensor | None:
    """Read the second sensor at the date nearest to each, [T, R, H, W]; NaN where it is no data."""
    dated = _dated(_tiffs(folder)) if folder.is_dir() else {}
    if not dated:
        return None
    days = np.array(list(dated), dtype="M8[D]")
    paths = list(dated.values())
    read = {
        i: _on_grid(read_raster(paths[i]), first) for i in {int(abs(days - day).argmin()) for day in dates}
    }
    shapes = {raster.values.shape for raster in read.values()}
    if len(shapes) > 1:
        raise DataError(
            f"{folder}: files of {sorted(count for count, *_ in shapes)} bands, expected one number"
        )
    values = np.stack([read[int(abs(days - day).argmin())].values for day in dates]).astype(np.float32)
    valid = np.stack([read[int(abs(days - day).argmin())].valid for day in dates])[:, None] & np.isfinite(
        values
    )
    return torch.from_numpy(np.where(valid, values, np.float32(np.nan)))


def _classes(folder: Path, dates: Dates, first: Raster) -> Tensor | None:
    """Read class maps, [T, H, W], -1 where a date has none."""
    dated = _dated(_tiffs(folder)) if folder.is_dir() else {}
    if not dated:
        return None
    found = torch.full((len(dates), *first.values.shape[-2:]), -1, dtype=torch.int64)
    for i, day in enumerate(dates.tolist()):
        if np.datetime64(day, "D") in dated:
            raster = _on_grid(read_raster(dated[np.datetime64(day, "D")]), first)
            if len(raster.values) != 1 or raster.values.dtype.kind not in "iu":
                raise DataError(f"{raster.path} should be one band of whole numbers, the classes")
            found[i] = torch.from_numpy(np.where(raster.valid, raster.values[0], -1).astype(np.int64))
    return found


def read_raster(path: Path, content: bytes | None = None) -> Raster:
    """Read a GeoTIFF, or its `content`.

    Raises:
        DataError: it cannot be read, or holds complex numbers. ConfigError: the package rasterio is not installed.
    """
    rasterio = _rasterio()
    try:
        with (
            rasterio.MemoryFile(path.read_bytes() if content is None else content) as memory,
            memory.open() as file,
        ):
            values, valid = file.read(), file.read_masks().all(0)
            crs = "" if file.crs is None else file.crs.to_string()
            named = tuple(name or f"band {i + 1}" for i, name in enumerate(file.descriptions))
            tags = dict(file.tags())
            transform = tuple(file.transform)[:6]
    except (OSError, rasterio.errors.RasterioError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if values.dtype.kind not in "uif":
        raise DataError(f"{path} holds {values.dtype}, expected whole or real numbers")
    return Raster(path, values, valid, crs, transform, tags, named)


def write_raster(path: Path, values: NDArray[Any], like: Raster, bands: Sequence[str], date: Any) -> None:
    """Write values [C, H, W] as a GeoTIFF on the grid of another, with names of bands and a date.

    Raises:
        ConfigError: the file cannot be written.
    """
    rasterio = _rasterio()
    count, height, width = values.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": values.dtype.name,
    }
    placed = {"crs": like.crs or None, "transform": rasterio.Affine(*like.transform)}
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile, **placed, compress="deflate") as file:
            file.write(values)
            file.update_tags(ACQUISITION_DATE=str(date))
            for i, name in enumerate(bands, start=1):
                file.set_band_description(i, name)
        with replacing(path) as draft:
            draft.write_bytes(memory.read())


def date_of(path: Path, tags: Callable[[], Mapping[str, str]] | None = None) -> np.datetime64:
    """Return the day of a file, of its name or else of its tags.

    Raises:
        DataError: neither says one.
    """
    found = date_in(path.stem)
    if found is None:
        known = read_raster(path).tags if tags is None else tags()
        found = next((day for tag in TAGS if tag in known and (day := date_in(known[tag])) is not None), None)
    if found is None:
        raise DataError(
            f"{path} has no date, expected one in its name ({NAMES}) or in a tag ({', '.join(TAGS[:3])} ...)"
        )
    return found


def date_in(text: str) -> np.datetime64 | None:
    """Return the first day that a text names; None if it names none."""
    for pattern in (DASHED, JOINED):
        for year, month, day in pattern.findall(text):
            try:
                return np.datetime64(f"{year}-{month}-{day}", "D")
            except ValueError:
                continue
    for year, day in OF_YEAR.findall(text):
        if 1 <= int(day) <= 366:
            return np.datetime64(f"{year}-01-01", "D") + np.timedelta64(int(day) - 1, "D")
    return None


def corners(length: int, size: int, step: int = 0) -> list[int]:
    """Return where crops begin along a side: `step` after one another, `size` unless given, the last one at the end."""
    starts = list(range(0, length - size + 1, step or size))
    return starts if starts[-1] + size == length else [*starts, length - size]


def centre(raster: Raster, row: float, column: float) -> Tensor:
    """Return longitude and latitude of a pixel, linear between the corners; NaN without a reference system."""
    corner = torch.from_numpy(raster.corners()).float()
    height, width = raster.values.shape[-2:]
    west_east = torch.lerp(corner[0], corner[1], row / height)
    return torch.lerp(west_east[0], west_east[1], column / width)


def _dated(paths: Iterable[Path]) -> dict[np.datetime64, Path]:
    """Map the days of files to their paths, in the order of time.

    Raises:
        DataError: no date, or two files of one day.
    """
    found = sorted(((date_of(path), path) for path in paths), key=lambda pair: (pair[0], pair[1].name))
    for (day, path), (next_day, other) in pairwise(found):
        if day == next_day:
            raise DataError(f"{path} and {other.name} are both of {day}, expected one file a date")
    return dict(found)


def _check_grid(raster: Raster, first: Raster, bands: bool = False) -> None:
    if not raster.on_grid_of(first):
        raise DataError(
            f"{raster.path} lies on another grid than {first.path.name}: {raster.grid}; expected {first.grid}"
        )
    if bands and len(raster.values) != len(first.values):
        count, expected = len(raster.values), len(first.values)
        raise DataError(
            f"{raster.path} has {count} bands, {first.path.name} has {expected}, expected one number"
        )


def _on_grid(raster: Raster, first: Raster) -> Raster:
    _check_grid(raster, first)
    return raster


def _check_alike(first: Place, place: Place) -> None:
    for what, own, other in (
        ("bands", place.optical.shape[1], first.optical.shape[1]),
        ("radar bands", *(0 if p.radar is None else p.radar.shape[1] for p in (place, first))),
    ):
        if own != other:
            raise DataError(f"{place.name} has {own} {what}, {first.name} has {other}, expected one number")
    if place.unit != first.unit:
        kinds = [
            f"{p.name} holds {p.first.values.dtype} ({p.unit:g} is a reflectance of 1)"
            for p in (place, first)
        ]
        raise DataError(f"{', '.join(kinds)}, expected one unit, or scale=NUMBER for all")


def _optical(folder: Path) -> list[Path]:
    return _tiffs(folder / "optical") if (folder / "optical").is_dir() else _tiffs(folder)


def _tiffs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _rasterio() -> Any:
    """Import rasterio, which few need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import rasterio
        import rasterio.warp
    except ImportError as error:
        raise ConfigError("GeoTIFFs need the package rasterio: pip install 'ditkit[satellite]'") from error
    return rasterio
