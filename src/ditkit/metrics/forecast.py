"""Forecasts against what came, by lead time, beside persistence and climatology.

B windows, C variables, T lead times, H W cells. Every cell counts alike: there is no weight for its area.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError, ShapeError, unknown
from ditkit.data.fields import FieldSet
from ditkit.metrics.baselines import Climatology

if TYPE_CHECKING:
    from ditkit.core.terminal import Table

Forecaster = Callable[[Tensor], Tensor]  # observed frames [B, C, T, H, W] -> [B, C, horizon, H, W]
Per = Literal["cell", "frame"]

PERSISTENCE = "persistence"
LEADS_SHOWN = 5  # in 80 columns


@dataclass(frozen=True)
class Quantity:
    """A variable of a forecast: a difference of 1 in the tensors is `scale` in its unit."""

    name: str
    unit: str = ""
    scale: float = 1.0


def quantities_of(fields: FieldSet) -> tuple[Quantity, ...]:
    """List the variables of a set, normalised or not."""
    scales = [1.0] * len(fields.units) if fields.scaling is None else fields.scaling.std.tolist()
    return tuple(Quantity(*q) for q in zip(fields.variables, fields.units, scales, strict=True))


@dataclass(frozen=True)
class ForecastScore:
    """Errors by lead time, as means over windows.

    `per="cell"`: the mean over cells; `per="frame"`: the sum over the cells of a frame, and for `all` over the
    variables too, the convention of Moving MNIST and TaxiBJ (PredFormer, Tables 2 and 4; pictures in [0, 1]).
    """

    quantities: tuple[Quantity, ...]
    windows: int
    per: Per
    mse: tuple[tuple[float, ...], ...]  # [C][T], in the unit squared
    mae: tuple[tuple[float, ...], ...]  # [C][T], in the unit
    mse_all: tuple[float, ...]  # [T], over all variables as the tensors hold them: normalised
    mae_all: tuple[float, ...]

    @property
    def rmse(self) -> tuple[tuple[float, ...], ...]:
        """The root of `mse`, in the unit: [C][T]."""
        return tuple(tuple(math.sqrt(value) for value in row) for row in self.mse)

    @property
    def rmse_all(self) -> tuple[float, ...]:
        """The root of `mse_all`: [T]."""
        return tuple(math.sqrt(value) for value in self.mse_all)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `mean` is that over lead times, of which the RMSE is the root of the mean square."""
        means = {"mse": mean(self.mse_all), "mae": mean(self.mae_all), "rmse": math.sqrt(mean(self.mse_all))}
        return asdict(self) | {"rmse": self.rmse, "rmse_all": self.rmse_all, "mean": means}


def score(
    pairs: Iterable[tuple[Tensor, Tensor]],
    quantities: Sequence[Quantity],
    valid: Tensor | None = None,
    per: Per = "cell",
) -> ForecastScore:
    """Score batches of (forecast, truth), each [B, C, T, H, W], over the cells of `valid`, [C, H, W].

    Raises:
        ShapeError: unequal shapes, or another number of variables or lead times.
        DataError: no batch, no valid cell of some variable, or values that are not finite.
        ConfigError: an unknown `per`.
    """
    if per not in ("cell", "frame"):
        raise ConfigError(f"per={per!r}, expected 'cell' or 'frame'")
    square: Tensor | float = 0.0
    absolute: Tensor | float = 0.0
    windows, cells = 0, torch.ones(())
    for forecast, truth in pairs:
        error = _error(forecast, truth, len(quantities))
        inside = (
            torch.ones_like(error[0, :, 0], dtype=torch.bool) if valid is None else valid.to(error.device)
        )
        error = error * inside[:, None]
        square, absolute = square + error.square().sum((0, 3, 4)), absolute + error.abs().sum((0, 3, 4))
        windows, cells = windows + len(error), inside.sum((1, 2))
    if not isinstance(square, Tensor) or not isinstance(absolute, Tensor) or not windows:
        raise DataError("score: expected at least one window of forecast and truth, got none")
    if not cells.all():
        raise DataError(f"score: no valid cell of {quantities[int(cells.argmin())].name!r}")
    of_one = cells[:, None] if per == "cell" else torch.ones_like(cells[:, None])
    of_all = cells.sum() if per == "cell" else 1
    scales = torch.tensor([[q.scale] for q in quantities], dtype=torch.float64, device=square.device)
    return ForecastScore(
        quantities=tuple(quantities),
        windows=windows,
        per=per,
        mse=_rows(square / of_one / windows * scales**2),
        mae=_rows(absolute / of_one / windows * scales),
        mse_all=_rows(square.sum(0, keepdim=True) / of_all / windows)[0],
        mae_all=_rows(absolute.sum(0, keepdim=True) / of_all / windows)[0],
    )


def persistence(observed: Tensor, horizon: int) -> Tensor:
    """Repeat the last frame: [B, C, T, H, W] -> [B, C, horizon, H, W]."""
    return observed[:, :, -1:].expand(-1, -1, integer("horizon", horizon, least=1), -1, -1)


def seasonal_naive(observed: Tensor, horizon: int, period: int) -> Tensor:
    """Repeat the last `period` frames: [B, C, T, H, W] -> [B, C, horizon, H, W].

    Raises:
        ConfigError: fewer frames are observed.
    """
    frames = observed.shape[2]
    integer("period", period, least=1, most=frames)
    places = (
        frames - period + torch.arange(integer("horizon", horizon, least=1), device=observed.device) % period
    )
    return observed[:, :, places]


def skill(own: Sequence[float], reference: Sequence[float]) -> tuple[float | None, ...]:
    """1 - own / reference for each lead time: 1 perfect, 0 as good, None where the reference has no error."""
    return tuple(1 - a / b if b else None for a, b in zip(own, reference, strict=True))


@dataclass(frozen=True)
class ForecastReport:
    """Forecasters on the same windows, with both baselines."""

    scores: Mapping[str, ForecastScore]  # the two baselines last
    settings: Mapping[str, Any]

    @property
    def baselines(self) -> tuple[str, str]:
        """The names of persistence and climatology."""
        first, second = list(self.scores)[-2:]
        return first, second

    def skills(self, name: str) -> dict[str, tuple[float | None, ...]]:
        """1 - MAE / MAE of each baseline, by lead time and then over all of them."""
        own = _with_mean(self.scores[name].mae_all)
        return {b: skill(own, _with_mean(self.scores[b].mae_all)) for b in self.baselines}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: each score with its skills, the last number of which is that of the mean MAE."""
        scores = {name: s.as_dict() | {"mae_skill": self.skills(name)} for name, s in self.scores.items()}
        return {"scores": scores, "settings": dict(self.settings)}

    def table(self, variable: str | None = None) -> Table:
        """MAE by lead time for a terminal of 80 columns: normalised over all, or of one variable in its unit.

        Raises:
            ConfigError: an unknown variable.
        """
        from rich import box

        from ditkit.core.terminal import Table

        quantities = next(iter(self.scores.values())).quantities
        names = [q.name for q in quantities]
        if variable is not None and variable not in names:
            raise ConfigError(unknown("variable", variable, names))
        row = None if variable is None else names.index(variable)
        what = "normalised MAE" if row is None else f"MAE of {variable} {quantities[row].unit}".rstrip()
        leads = _shown(self.settings["horizon"])
        table = Table(
            title=f"{what} by lead time ({self.settings['step']}), windows: {self.settings['windows']}",
            caption="skill: 1 - MAE / MAE of persistence (pers.) or of climatology (clim.), of the mean",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("forecast", max_width=22)
        for head in (*(str(lead + 1) for lead in leads), "mean", "skill\npers.", "skill\nclim."):
            table.add_column(head, justify="right", no_wrap=True)
        rows = {name: s.mae_all if row is None else s.mae[row] for name, s in self.scores.items()}
        for name, mae in rows.items():
            skills = [skill([mean(mae)], [mean(rows[b])])[0] for b in self.baselines]
            cells = [f"{value:.4g}" for value in (*(mae[lead] for lead in leads), mean(mae))]
            table.add_row(name, *cells, *("-" if s is None else f"{s:.1%}" for s in skills))
        return table


def compare_forecasts(
    forecasters: Mapping[str, Forecaster],
    training: FieldSet,
    test: FieldSet,
    observed: int,
    horizon: int,
    batch_size: int = 16,
    per: Per = "cell",
) -> ForecastReport:
    """Score forecasters on every window of `test`, and persistence and the climatology of `training` beside them.

    Raises:
        ConfigError: a forecaster with the name of a baseline, or parts that are scaled differently.
        DataError, ShapeError: no window, or a forecast that is not finite or of another shape.
    """
    if training.scaling is not test.scaling:
        raise ConfigError(
            f"{training.name} and {test.name} are scaled differently, expected parts of one set"
        )
    grids = training.values.shape[1:], test.values.shape[1:]
    if grids[0] != grids[1]:
        raise ShapeError(
            f"{training.name} has [C, H, W] = {list(grids[0])} and {test.name} {list(grids[1])}, expected the same"
        )
    climatology = Climatology.fit(training)
    for name in (PERSISTENCE, climatology.name):
        if name in forecasters:
            raise ConfigError(f"forecaster {name!r} has the name of a baseline, expected another")

    windows = partial(test.batches, observed, horizon, batch_size)

    def pairs_of(forecast: Forecaster) -> Iterator[tuple[Tensor, Tensor]]:
        return ((forecast(given), truth) for _, given, truth in windows())

    def usual() -> Iterator[tuple[Tensor, Tensor]]:
        for starts, _, truth in windows():
            times = [test.target_times(start, observed, horizon) for start in starts]
            yield torch.stack([climatology.at(t) for t in times]), truth

    pairs = {name: pairs_of(f) for name, f in forecasters.items()}
    pairs |= {PERSISTENCE: pairs_of(partial(persistence, horizon=horizon)), climatology.name: usual()}
    scored = {name: score(p, quantities_of(test), test.valid, per) for name, p in pairs.items()}
    settings = {
        "data": test.name,
        "first_target": test.clock.shown(test.target_times(0, observed, horizon)[0]),
        "last_target": test.clock.shown(test.times[-1]),
        "step": str(test.step),
        "observed": observed,
        "horizon": horizon,
        "windows": test.count(observed, horizon),
        "per": per,
    }
    return ForecastReport(scored, settings)


def mean(values: Sequence[float]) -> float:
    """Compute the arithmetic mean."""
    return sum(values) / len(values)


def _with_mean(values: Sequence[float]) -> list[float]:
    return [*values, mean(values)]


def _shown(horizon: int) -> list[int]:
    """Up to five lead times from the first to the last, evenly spread."""
    count = min(horizon, LEADS_SHOWN)
    return [round(i * (horizon - 1) / max(count - 1, 1)) for i in range(count)]


def _error(forecast: Tensor, truth: Tensor, variables: int) -> Tensor:
    """Compute forecast - truth in float64, both [B, variables, T, H, W] and finite."""
    if forecast.shape != truth.shape or truth.ndim != 5 or truth.shape[1] != variables:
        raise ShapeError(
            f"score: forecast {list(forecast.shape)} and truth {list(truth.shape)}, expected both "
            f"[B, {variables}, T, H, W]"
        )
    for role, tensor in (("forecast", forecast), ("truth", truth)):
        if broken := int((~tensor.isfinite()).sum()):
            raise DataError(f"score: {broken} of {tensor.numel()} values of the {role} are not finite")
    return forecast.double() - truth.double()


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())
