"""A trained network at work on a person's own folder of GeoTIFFs: files on the same grid, a strip, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.checkpoint import replacing, write_json
from ditkit.core.errors import ConfigError, DataError
from ditkit.data.rasters import Place, RasterSeries, corners, places_of, read_place, read_raster, write_raster
from ditkit.data.satellite import Weather
from ditkit.models.units import UniTS
from ditkit.report.sheet import png
from ditkit.sample import Sampling
from ditkit.tasks.remote_sensing.figures import class_strip, series_strip
from ditkit.tasks.remote_sensing.jobs import check_data, given, past_of

CLEAR = Weather(0.0, 0.0)
"""No cloud but those that are there."""
AT_ONCE = 64
"""Crops that are held at once."""
STRIP_PX = 256
"""The longest side of a strip's cut of the scene."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Processed:
    """A place, and what a network predicted of all of it.

    Args:
        place: with the dates to come, if it is forecast.
        predicted: [T, C, H, W], images in [-1, 1] or scores of classes.
    """

    model: UniTS
    place: Place
    predicted: Tensor

    @property
    def shown(self) -> slice:
        """Return the dates that are written: all, or those to come."""
        forecasts = self.model.config.job == "forecasting"
        return slice(past_of(self.model.config.frames), None) if forecasts else slice(None)

    def save(self, folder: Path, about: Mapping[str, Any]) -> list[str]:
        """Write a GeoTIFF a date, strip.png and satellite.json; return the names of the files.

        Raises:
            ConfigError: a file cannot be written, or would replace one that was read.
        """
        dates = list(range(len(self.place)))[self.shown]
        names = [f"{self.place.dates[t]}.tif" for t in dates]
        read = {path.resolve() for path in self.place.sources}
        if taken := [name for name in names if (folder / name).resolve() in read]:
            raise ConfigError(f"{folder / taken[0]} was read, and is not replaced; expected another --out")
        for t, name in zip(dates, names, strict=True):
            bands = ("class",) if self._classes else self.place.first.bands
            write_raster(folder / name, self._values(t), self.place.first, bands, self.place.dates[t])
        with replacing(folder / "strip.png") as draft:
            draft.write_bytes(png(self._strip()))
        write_json(folder / "satellite.json", {**about, **self.as_dict()})
        return [*names, "strip.png", "satellite.json"]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        hidden = self.place.hidden[self.shown]
        return {
            "place": self.place.name,
            "job": self.model.config.job,
            "grid": self.place.first.grid,
            "dates": [str(day) for day in self.place.dates[self.shown]],
            "hidden_share": hidden.float().mean((1, 2)).tolist(),
            "classes": list(self.model.config.land_cover),
        }

    @property
    def _classes(self) -> bool:
        return self.model.config.job == "change-detection"

    def _values(self, t: int) -> NDArray[Any]:
        """Return what is written of a date: as the file's own type and unit, its clear pixels untouched; or classes."""
        if self._classes:
            return self.predicted[t].argmax(0, keepdim=True).to(torch.uint8).numpy()
        kind = self.place.first.values.dtype
        values = (self.predicted[t].clamp(-1, 1).numpy().astype(np.float64) + 1) / 2 * self.place.unit
        values = (np.rint(values) if kind.kind in "iu" else values).astype(kind)
        if self.model.config.job == "reconstruction":
            own = read_raster(self.place.files[t]).values
            values = np.where(self.place.hidden[t].numpy(), values, own)
        return values

    def _strip(self) -> Any:
        """Draw the north-west of the scene at each date."""
        cut = slice(None), slice(None), slice(STRIP_PX), slice(STRIP_PX)
        observed, predicted = (x.transpose(0, 1)[cut] for x in (self.place.optical, self.predicted))
        hidden, dates = self.place.hidden[None][cut], [str(day) for day in self.place.dates]
        bands = self.place.first.bands
        if self._classes:
            maps = predicted.argmax(0)
            return class_strip(
                images=observed, maps=maps, dates=dates, classes=self.model.config.land_cover, bands=bands
            )
        if self.model.config.job == "reconstruction":
            predicted = torch.where(hidden, predicted, observed)
        white = torch.where(hidden, 1.0, observed)
        return series_strip(observed=white, filled=predicted, hidden=hidden, dates=dates, bands=bands)


def process(
    model: UniTS,
    folder: str | Path,
    *,
    sampling: Sampling,
    scale: float | None = None,
    dates: Sequence[str] = (),
    progress: Progress | None = None,
) -> Processed:
    """Let a network work on all dates and all pixels of one place, in overlapping crops that are blended.

    Args:
        sampling: its seed is that of the first crop, and further ones follow.
        scale: as `ditkit.data.rasters.load` takes it.
        dates: days to forecast, for a network that does; the last ones of the folder are given to it.

    Raises:
        ConfigError: the folder has several places, dates where nothing is forecast or none where it is, or they do not
            fit the network. DataError: as `ditkit.data.rasters.load` says.
    """
    config = model.config
    roots = places_of(Path(folder))
    if len(roots) > 1:
        raise ConfigError(f"{folder} has {len(roots)} places, expected one of them, such as {roots[0]}")
    place = _with_future(read_place(roots[0], scale), config, dates)
    height, width = config.shape[1:]
    own = place.optical.shape[2:]
    if own[0] < height or own[1] < width:
        raise DataError(f"{place.name} has {place.first.grid}, smaller than the network's {height} x {width}")
    if place.hidden.flatten(1).all(1).all() and not (config.radar_channels and place.radar is not None):
        raise DataError(f"{folder}: every pixel of all dates is hidden, expected some that are clear")
    series = RasterSeries(place.name, [place], config.frames, (height, width), CLEAR, 0)
    check_data(config, series)
    starts = corners(len(place), config.frames) if len(place) >= config.frames else [0]
    series.windows = [
        (0, start, top, left)
        for start in starts
        for top in corners(own[0], height, height // 2 or 1)
        for left in corners(own[1], width, width // 2 or 1)
    ]
    first, parts = sampling.seeds[0], []
    for some in torch.arange(len(series)).split(AT_ONCE):
        start, count = int(some[0]), len(series)
        drawn = generate(
            model,
            cond=given(config, series.scenes(some)),
            shape=model.sample_shape,
            sampling=sampling.changed(seeds=(first + some).tolist()),
            progress=None if progress is None else _shifted(progress, start, len(some), count),
        )
        parts.append(drawn.samples)
    return Processed(model, place, _blended(torch.cat(parts), series, place))


def _shifted(progress: Progress, start: int, some: int, count: int) -> Progress:
    """Report what is done of some crops, after `start` others, as a share of all."""
    return lambda done, total: progress(start * total // some + done, count * total // some)


def _blended(samples: Tensor, series: RasterSeries, place: Place) -> Tensor:
    """Join crops [n, C, T, H, W] into [T, C, H, W], each counting most in its middle."""
    height, width = series.size
    ramp = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float() for n in (height, width)]
    weight = ramp[0][:, None] * ramp[1]
    whole = torch.zeros(len(place), samples.shape[1], *place.optical.shape[2:])
    total = torch.zeros(len(place), 1, *place.optical.shape[2:])
    for sample, (_, start, top, left) in zip(samples, series.windows, strict=True):
        count = min(series.frames, len(place) - start)
        at = slice(start, start + count), slice(None), slice(top, top + height), slice(left, left + width)
        whole[at] += sample.transpose(0, 1)[:count] * weight
        total[at] += weight
    return whole / total


def _with_future(place: Place, config: Any, dates: Sequence[str]) -> Place:
    """Return the place with its last dates, and those to be forecast, which are hidden.

    Raises:
        ConfigError: no dates, one that is none or lies in the past, or too many; or dates for another network.
        DataError: too few that are given.
    """
    if config.job != "forecasting":
        if dates:
            raise ConfigError(f"--dates {dates[0]}: the network was trained for {config.job}, expected none")
        return place
    past = past_of(config.frames)
    most = config.frames - past
    if not 1 <= len(dates) <= most:
        raise ConfigError(f"{len(dates)} dates to forecast, expected 1 to {most}: --dates 2024-05-31 ...")
    if len(place) < past:
        raise DataError(f"{place.name} has {len(place)} dates, the network forecasts from {past}")
    future = np.array([_day(text) for text in dates], dtype="M8[D]")
    whole = np.concatenate([place.dates[-past:], future])
    if (np.diff(whole.astype(np.int64)) <= 0).any():
        raise ConfigError(f"--dates {' '.join(dates)}, expected days after {place.dates[-1]}, in their order")
    blank = place.optical.new_zeros(len(future), *place.optical.shape[1:])
    return replace(
        place,
        optical=torch.cat([place.optical[-past:], blank]),
        hidden=torch.cat([place.hidden[-past:], torch.ones_like(blank[:, 0], dtype=torch.bool)]),
        dates=whole,
        files=place.files[-past:],
        radar=None,
        classes=None,
    )


def _day(text: str) -> np.datetime64:
    try:
        return np.datetime64(text, "D")
    except ValueError as error:
        raise ConfigError(f"--dates {text}, expected a day such as 2024-05-31") from error
