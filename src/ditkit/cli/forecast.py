"""`ditkit forecast`: the future of data; or held-out data, and the error by lead time beside that of baselines."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditkit.cli.evaluate import save
from ditkit.cli.options import Number, Options, load_of, options_of, with_training_options, words_of, writable
from ditkit.cli.placing import on_device
from ditkit.core.errors import ConfigError
from ditkit.core.terminal import progress
from ditkit.data.loading import names_of
from ditkit.sample.forecast import horizon_of
from ditkit.tasks.forecast.future import check_own
from ditkit.tasks.forecast.future import forecast as go_on
from ditkit.tasks.forecast.scores import called, evaluate_forecasts

SETS = ", ".join((*names_of("clips"), *names_of("fields")))
ForecastData = Annotated[
    str,
    tyro.conf.arg(
        metavar="STR",
        help=f"Data of the kind that the models were trained on: a named set ({SETS}), a folder of video files, "
        "a netCDF file, or a CSV file of series.",
    ),
]
Share = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
DEFAULTS = {"count": 64, "validation": 0.1, "test": 0.2, "show": 0}
"""The flags of measuring on held-out data, which a forecast of the future has no use for."""
Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]


@on_device
def forecast(
    models: Models,
    *,
    data: ForecastData,
    option: Options = (),
    future: Number = None,
    horizon: Number = None,
    count: Number = None,
    validation: Share = None,
    test: Share = None,
    show: Number = None,
    max_bad: Number = None,
    out: Path = Path("outputs/forecast"),
) -> None:
    """Forecast what comes after the data, or data that was not trained on with the error by lead time.

    Examples:
        ditkit forecast runs/mine/model --data load.csv --future 24
        ditkit forecast runs/mine/model --data load.csv --future 24 --option zone=Europe/Berlin
        ditkit forecast runs/predformer/model --data moving-digits
        ditkit forecast runs/predformer/model runs/convlstm/model --data moving-digits --horizon 20
        ditkit forecast runs/predformer-winds/model --data winds
        ditkit forecast runs/mine/model --data load.csv --horizon 24
        ditkit forecast runs/mine/model --data load.csv --option repair=interpolate

    Writes into the folder of --out:
        forecast.json    every number, and the settings
        leadtime.png     the error against lead time, beside the baselines
        MODEL.png        one forecast: observed, followed, forecast, and the error;
                         of fields and series one for each variable
        MODEL.mp4, .gif  the same as a film, not of series

    With --future, of fields and series:
        forecast.csv     the values after the last ones of --data, in its units, zone and calendar;
                         of several models their mean and quantiles
        forecast.png     the same as lines after the history
        future.json      what was forecast from what, and digests of both files

    Args:
        models: Folders that ditkit train wrote, or owner/name on the Hugging Face hub; all for the same data.
        option: Of the loader of --data, such as repair=sort,interpolate, fps=10 or columns=load,wind. Repeat it for
            several. Default, where the first model was trained on these data: as it was.
        future: Steps to forecast after the last one of the data; nothing is measured then.
        horizon: Frames of held-out data to forecast; beyond a model's own, its forecasts are fed back. Default: the
            model's own.
        count: Clips to forecast, at most. Of fields, every window of the test part is. Default: 64.
        validation: Of fields, the share or number of steps before the test part, as in training. Default: 0.1.
        test: Of fields, the last part in time, as in training. Default: 0.2.
        show: The clip or window that is drawn. Default: 0.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        out: Folder to write to.
    """
    if not models:
        raise ConfigError("forecast: got no model, expected a folder such as runs/predformer/model")
    if twice := [name for i, name in enumerate(models) if name in models[:i]]:
        raise ConfigError(f"forecast: {twice[0]} is given twice, expected different models")
    measuring = {"horizon": horizon, "count": count, "validation": validation, "test": test, "show": show}
    if future is not None and (given_too := [name for name, value in measuring.items() if value is not None]):
        raise ConfigError(
            f"--{given_too[0]} {measuring[given_too[0]]} with --future {future}: one measures on held-out data, the "
            "other goes beyond them; expected one of them"
        )
    named = {name: load_of(m, "forecast") for name, m in zip(called(models), models, strict=True)}
    option = with_training_options(data, option, *named.values())
    options = options_of(data, option, max_bad)
    given: dict[str, Any] = {"data": data, "option": list(option)}
    if future is not None:
        _go_on(
            list(named.values()),
            models,
            future,
            options,
            {**given, "future": future, "max_bad": max_bad},
            out,
        )
        return
    first = next(iter(named.values()))
    settings: dict[str, Any] = {"horizon": horizon_of(first), **DEFAULTS}
    settings |= {name: value for name, value in measuring.items() if value is not None}
    given |= {**settings, "max_bad": max_bad}
    with writable(out), progress() as advance:
        found = evaluate_forecasts(named, data, options=options, progress=advance, **settings)
        save(found, out, "forecast.json", ["forecast", *models], given)


def _go_on(
    models: list[Any],
    names: Models,
    future: int,
    options: dict[str, Any],
    given: dict[str, Any],
    out: Path,
) -> None:
    """Forecast what comes after the data, into `out`."""
    with writable(out):
        check_own(out)
        found = go_on(models, given["data"], future, options=options)
        words = shlex.join(["ditkit", "forecast", *names, *words_of(given)])
        files = found.save(out, {"command": words})
    about = found.as_dict()
    variables, span = ", ".join(about["variables"]), f"{about['first']} to {about['last']}"
    print(f"{future} steps ({about['step']}) of {variables}: {span}")
    print(f"wrote {out}: {', '.join(files)}")
