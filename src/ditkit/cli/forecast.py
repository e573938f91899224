"""`ditkit forecast`: what follows, how wrong it is by lead time, and what persistence and climatology would say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from ditkit.cli.evaluate import flags
from ditkit.cli.options import (
    Number,
    Options,
    for_stage,
    load_maker,
    options_of,
    progress,
    with_training_options,
    writable,
)
from ditkit.core.checkpoint import replacing, write_json
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError
from ditkit.tasks.forecast.figures import write_pictures
from ditkit.tasks.forecast.scores import (
    ClipForecasts,
    FieldForecasts,
    called,
    clip_forecasts,
    field_forecasts,
    forecasts_fields,
)

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]


def forecast(
    models: Models,
    *,
    data: str,
    option: Options = (),
    horizon: Number = None,
    count: int = 64,
    validation: float = 0.1,
    test: float = 0.2,
    show: int = 0,
    max_bad: Number = None,
    out: Path = Path("outputs/forecast"),
) -> None:
    """Forecast data that was not trained on, and measure the error by lead time.

    Examples:
        ditkit forecast runs/predformer/model --data moving-digits
        ditkit forecast runs/predformer/model runs/convlstm/model --data moving-digits --horizon 20
        ditkit forecast runs/predformer-winds/model --data winds
        ditkit forecast runs/mine/model --data load.csv --horizon 24
        ditkit forecast runs/mine/model --data load.csv --option repair=interpolate

    Writes into the folder of --out:
        forecast.json    every number, and the settings
        leadtime.png     the error against lead time, beside the baselines
        MODEL.png        one forecast: what was seen, what followed, and the error;
                         of fields and series one for each variable
        MODEL.mp4, .gif  the same as a film, not of series

    Args:
        models: Folders that ditkit train wrote, or owner/name on the Hugging Face hub; all for the same data.
        data: What the models were trained on or the like: a named set (moving-digits, vizdoom, winds, rain), a folder
            of video files, a netCDF file, or a CSV file of series.
        option: Of the loader of --data, such as repair=sort,interpolate, fps=10 or columns=load,wind. Repeat it for
            several. Default, where the first model was trained on these data: as it was.
        horizon: Frames to forecast; beyond a model's own, its forecasts are fed back. Default: the model's own.
        count: Clips to forecast, at most. Of fields, every window of the test part is.
        validation: Of fields, the share or number of steps before the test part, as in training.
        test: Of fields, the last part in time, as in training.
        show: The clip or window that is drawn.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        out: Folder to write to.
    """
    if not models:
        raise ConfigError("forecast: got no model, expected a folder such as runs/predformer/model")
    if twice := [name for i, name in enumerate(models) if name in models[:i]]:
        raise ConfigError(f"forecast: {twice[0]} is given twice, expected different models")
    names = called(models)
    named = {name: load_maker(m, "forecasts") for name, m in zip(names, models, strict=True)}
    first = next(iter(named.values()))
    horizon = first.config.frames if horizon is None else integer("--horizon", horizon, least=1)
    option = with_training_options(data, option, *named.values())
    options = options_of(data, option, max_bad)
    given = {"data": data, "option": list(option), "horizon": horizon, "count": count}
    given |= {"validation": validation, "test": test, "show": show, "max_bad": max_bad}
    command = shlex.join(["ditkit", "forecast", *models, *flags(given)])
    with writable(out), progress() as advance:
        found: ClipForecasts | FieldForecasts
        if forecasts_fields(named):
            found = field_forecasts(named, data, horizon, validation, test, show, options)
        else:
            found = clip_forecasts(
                named,
                data,
                horizon,
                integer("--count", count, least=1),
                show,
                options,
                for_stage(advance, "forecasting"),
            )
        write_json(out / "forecast.json", {"command": command, **found.as_dict()})
        files = [["forecast.json", "leadtime.png"], *draw(found, out)]
    Console().print(found.table())
    print(f"wrote {out}:", *map(", ".join, files), sep="\n  ")


@torch.no_grad()
def draw(found: ClipForecasts | FieldForecasts, out: Path) -> list[list[str]]:
    """The plot, and one forecast of each model; the names of the files of each forecast."""
    with replacing(out / "leadtime.png") as draft:
        draft.write_bytes(found.plot().png())
    return [write_pictures(out, name, example) for name, example in found.examples()]
