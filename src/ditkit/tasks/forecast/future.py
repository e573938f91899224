"""Forecasts of what no file holds yet: the values after the last ones of a set, in its own units and calendar."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.loading import load
from ditkit.core.model import Model
from ditkit.core.task import task_of
from ditkit.data.calendar import MONTH, Times
from ditkit.data.fields import FieldSet, Scaling
from ditkit.data.loading import load_fields
from ditkit.report.future import Lines, future_plot
from ditkit.report.legend import below_each_other
from ditkit.report.sheet import png
from ditkit.sample import forecast as rolled
from ditkit.sample.forecast import draw_paths, horizon_of
from ditkit.tasks.forecast.recipe import fitting

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.5, 0.9)
MOST_STEPS = 100_000
MOST_PLOTS = 12
"""Fields that are drawn below each other."""
PATHS = 256
"""Futures drawn from the law of a model that has one."""
SHOWN_PARTS = ("trend", "season")
"""Components that are drawn, each below its series."""
Part = tuple[Tensor, Tensor]
CSV, PICTURE, RECORD = "forecast.csv", "forecast.png", "future.json"


@dataclass(frozen=True, eq=False)
class Future:
    """The values after the last ones of a set, in its own units.

    Args:
        history: the set, not normalised, with the model's variables.
        times: of the forecast, [T], as the set counts them.
        samples: float64 [S, C, T, H, W]: of each of S models one; or draws from their laws.
        observed: steps that the models looked at.
        point: float64 [C, T, H, W], the mean that the models say; None where it is that of the samples.
        parts: components of the last observed steps and of the forecast, float64 [C, L, H, W] and [C, T, H, W], by
            name; of one model that has them.
        drawn: draws of each model; 0 where each says one value.
    """

    history: FieldSet
    times: Times
    samples: Tensor
    observed: int
    point: Tensor | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    drawn: int = 0

    @property
    def values(self) -> Tensor:
        """The mean, float64 [C, T, H, W]; NaN where a cell never holds data."""
        return self._masked(self.samples.mean(0) if self.point is None else self.point)

    def quantile(self, share: float) -> Tensor:
        """Return a quantile of the samples at each place, linear between them: float64 [C, T, H, W].

        Raises:
            ConfigError: there is one sample, which has no distribution, or no such share.
        """
        if len(self.samples) < 2:
            raise ConfigError(
                "one model that says one value has no quantiles, expected several models, such as of other seeds"
            )
        if not 0 <= share <= 1:
            raise ConfigError(f"quantile={share!r} should be from 0 to 1")
        return self._masked(self.samples.quantile(share, 0))

    def to_pandas(self) -> DataFrame:
        """Return a table: a row each time, in the data's zone and calendar, and a column each variable.

        Of several samples, each variable's quantiles follow as VARIABLE_q10 and so on. A grid has a row for each time
        and cell.
        """
        import pandas as pd

        columns = dict(zip(self.history.variables, self.values, strict=True))
        if len(self.samples) > 1:
            shares = {f"q{round(100 * share)}": self.quantile(share) for share in QUANTILES}
            for i, name in enumerate(self.history.variables):
                columns |= {f"{name}_{share}": found[i] for share, found in shares.items()}
        index = self.history.clock.index(self.times)
        height, width = self.samples.shape[3:]
        if height * width > 1:
            axes = [index, range(height), range(width)]
            index = pd.MultiIndex.from_product(axes, names=["time", "row", "column"])
        return pd.DataFrame({name: found.flatten().numpy() for name, found in columns.items()}, index=index)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, which `pandas.read_csv` and `ditkit forecast` read.

        Raises:
            ConfigError: it cannot be written.
        """
        with replacing(Path(path)) as draft:
            self._write_csv(draft)

    def plot(self) -> Image.Image:
        """Draw the end of the history, the forecast and the band of its quantiles, of each of the first variables.

        Below each its components, where the model has some. Of a grid, the mean over the cells that hold data.
        """
        names = [name for name in SHOWN_PARTS if name in self.parts]
        shown = range(len(self.history.variables[: MOST_PLOTS // (1 + len(names))]))
        pages = [[self._lines(i), *(self._part_lines(i, name) for name in names)] for i in shown]
        return below_each_other([future_plot(lines) for own in pages for lines in own])

    def save(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> list[str]:
        """Write forecast.csv, forecast.png and future.json, all or none; the names of the files.

        Args:
            about: what future.json says beside the files' digests.

        Raises:
            ConfigError: a file of that name is there that is not as a forecast left it, or none can be written.
        """
        folder = Path(folder)
        check_own(folder)
        with ExitStack() as stack:
            table, picture, record = (
                stack.enter_context(replacing(folder / name)) for name in (CSV, PICTURE, RECORD)
            )
            self._write_csv(table)
            picture.write_bytes(png(self.plot()))
            files = {CSV: _digest(table), PICTURE: _digest(picture)}
            content = {**(about or {}), **self.as_dict(), "files": files}
            record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")
        return [CSV, PICTURE, RECORD]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what was forecast, from what, and when."""
        stamps = [str(stamp) for stamp in self.history.clock.index(self.times[[0, -1]])]
        return {
            "data": self.history.name,
            "variables": list(self.history.variables),
            "units": list(self.history.units),
            "step": str(self.history.step),
            "zone": self.history.clock.zone,
            "calendar": self.history.clock.calendar,
            "observed": self.observed,
            "future": len(self.times),
            "samples": len(self.samples),
            **({"drawn": self.drawn} if self.drawn else {}),
            "first": stamps[0],
            "last": stamps[1],
        }

    def _write_csv(self, path: Path) -> None:
        self.to_pandas().to_csv(path, encoding="utf-8", lineterminator="\n")

    def _masked(self, values: Tensor) -> Tensor:
        valid = self.history.valid
        return values if valid is None else values.masked_fill(~valid[:, None], torch.nan)

    def _cells(self, i: int) -> Tensor:
        """Cells of a variable that hold data, bool [H, W]."""
        valid = self.history.valid
        return torch.ones(self.samples.shape[3:], dtype=torch.bool) if valid is None else valid[i]

    def _name(self, i: int) -> str:
        name, (height, width) = self.history.variables[i], self.samples.shape[3:]
        return name if height * width == 1 else f"{name}, mean of the cells"

    def _part_lines(self, i: int, name: str) -> Lines:
        """Lines of one component, over the steps that the model looked at and those that it says."""
        past, later = (part[i][:, self._cells(i)].mean(-1).numpy() for part in self.parts[name])
        return Lines(
            variable=f"the {name} of {self._name(i)}",
            unit=self.history.units[i],
            history=past,
            forecast=later,
            dates=self._dates(np.concatenate([self.history.times[-len(past) :], self.times])),
            history_name="learned",
        )

    def _lines(self, i: int) -> Lines:
        cells = self._cells(i)
        kept = max(self.observed, 2 * len(self.times))
        past = self.history.values[-kept:, i, cells].double().mean(-1).numpy()
        later = self.samples[:, i, :, cells].mean(-1)
        low, _, high = (later.quantile(share, 0).numpy() for share in QUANTILES)
        mean = later.mean(0) if self.point is None else self.point[i][:, cells].mean(-1)
        return Lines(
            variable=self._name(i),
            unit=self.history.units[i],
            history=past,
            forecast=mean.numpy(),
            dates=self._dates(np.concatenate([self.history.times[-kept:], self.times])),
            band=(low, high) if len(later) > 1 else None,
            band_name=f"{QUANTILES[0]:.0%} to {QUANTILES[-1]:.0%} of {len(later)} "
            + ("draws" if self.drawn else "models"),
        )

    def _dates(self, times: Times) -> list[str]:
        """Format dates as fine as the step; a clock stands on a line of its own."""
        form = {MONTH: "%Y-%m", "day": "%Y-%m-%d"}.get(self.history.step.unit, "%Y-%m-%d\n%H:%M")
        return [stamp.strftime(form) for stamp in self.history.clock.index(times)]


@torch.no_grad()
def forecast(
    model: Model | str | Path | Sequence[Model | str | Path],
    data: Any,
    future: int,
    *,
    options: Mapping[str, Any] | None = None,
) -> Future:
    """Forecast the steps after the last ones of `data`.

    A future longer than what the network says at once rolls on: its forecasts are fed back, with a warning. Quantiles
    are of several models, or of draws from the law of a model that has one.

    Args:
        model: of fields or series, or its folder; of several, each gives one sample or as many draws.
        data: a named set, a netCDF or CSV file, a pandas DataFrame, or an xarray Dataset.
        future: steps to forecast.
        options: of the data's loader, such as `zone` and `columns` of a CSV file.

    Raises:
        ConfigError: a model of another task, data of another step, unit or variables than learned, or no such number
            of steps.
        DataError: the data are missing, damaged, without times, or shorter than what the model looks at.
    """
    future = integer("future", future, least=1, most=MOST_STEPS)
    given = [model] if isinstance(model, Model | str | Path) else list(model)
    models: list[Any] = [load(one) if isinstance(one, str | Path) else one for one in given]
    if not models:
        raise ConfigError("forecast: got no model, expected one or several")
    for one in models:
        if (task := task_of(one)).name != "forecast":
            raise ConfigError(f"forecast: got a model of {task.noun}s, expected one of fields or series")
    fields = load_fields(data, **(options or {}))
    known = [fitting(one, fields) for one in models]
    history = fields.chosen(known[0].variables)
    found = [_after(one, own, history, future) for one, own in zip(models, known, strict=True)]
    drawn = max(len(one.samples) for one in found) > 1
    least = min(horizon_of(one) for one in models)
    if future > least:
        logger.warning(
            "forecast: %d steps are more than the %d that the network says at once; its forecasts are fed back, and "
            "errors add up",
            future,
            least,
        )
    return Future(
        history=history,
        times=fields.step.following(fields.times, future),
        samples=torch.cat([one.samples for one in found]),
        observed=max(one.config.frames for one in models),
        point=torch.stack([one.point for one in found]).mean(0) if drawn else None,
        parts=found[0].parts if len(found) == 1 else {},
        drawn=PATHS if drawn else 0,
    )


def check_own(folder: Path) -> None:
    """Raise ConfigError where a file of a forecast's name is none that a forecast left there."""
    files: Any = {}
    record = folder / RECORD
    if record.exists():
        try:
            files = json.loads(record.read_text(encoding="utf8"))["files"]
            files = {name: files[name] for name in (CSV, PICTURE)}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _not_ours(record) from error
    for name in (CSV, PICTURE):
        path = folder / name
        if path.exists() and (not path.is_file() or files.get(name) != _digest(path)):
            raise _not_ours(path)


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is no file that a forecast left there, or was changed since; expected another folder, or move it"
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _After(NamedTuple):
    """One model's forecast in the set's units, without padding.

    Args:
        point: float64 [C, T, H, W]. samples: [S, C, T, H, W], of a law; else the point alone.
        parts: as of `Future`.
    """

    point: Tensor
    samples: Tensor
    parts: Mapping[str, Part]


def _after(model: Model, known: FieldSet, history: FieldSet, future: int) -> _After:
    """Forecast what follows a normalised set, by one model."""
    if tuple(known.variables) != tuple(history.variables):
        raise ConfigError(
            f"the models were trained on {history.variables} and {known.variables}, expected the same variables"
        )
    frames = model.config.frames
    if len(known) < frames:
        raise DataError(
            f"{history.name} has {len(known)} steps, expected at least the {frames} that the model looks at"
        )
    observed = known.values[-frames:].transpose(0, 1)[None].contiguous()
    scaling = known.scaling
    assert scaling is not None
    height, width = history.values.shape[2:]

    def in_units(x: Tensor) -> Tensor:
        return scaling.restore(x)[..., :height, :width].cpu()

    point = in_units(rolled(model.eval(), observed, future))[0]
    samples = in_units(draw_paths(model, observed, future, PATHS)) if has_law(model) else point[None]
    return _After(point, samples, _parts(model, observed, future, scaling))


def has_law(model: Model) -> bool:
    """Return whether a model says a distribution of each later value."""
    return getattr(model.config, "distribution", "none") != "none"


def _parts(model: Any, observed: Tensor, future: int, scaling: Scaling) -> dict[str, Part]:
    """Components of a forecast in the set's units, as far as one pass says them; none of a longer one."""
    if future > horizon_of(model) or not hasattr(model, "components"):
        return {}
    found: dict[str, Part] = {}
    for name, (past, later) in model.components(observed).items():
        level = scaling.mean if name == "trend" else torch.zeros_like(scaling.mean)
        own = Scaling(level, scaling.std)
        found[name] = own.restore(past)[0].cpu(), own.restore(later[:, :, :future])[0].cpu()
    return found
