"""Scores, baselines and skill of forecasts, against values worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from ditkit.core.errors import ConfigError, DataError, ShapeError
from ditkit.data.calendar import step_of
from ditkit.data.fields import FieldSet, Scaling
from ditkit.metrics.baselines import Climatology
from ditkit.metrics.forecast import (
    Quantity,
    compare_forecasts,
    persistence,
    quantities_of,
    score,
    skill,
)

ONE = (Quantity("rain", "mm"),)


def clip(*frames) -> torch.Tensor:
    """[1, 1, T, 1, W] of one window."""
    return torch.tensor(frames, dtype=torch.float32)[None, None, :, None]


def series(values, first: str, unit: str, name: str = "s") -> FieldSet:
    """One number a time, [N, 1, 1, 1]; `unit` as in datetime64."""
    times = np.datetime64(first, unit) + np.arange(len(values))
    return FieldSet(
        name=name,
        values=torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1),
        times=times,
        step=step_of(times),
        variables=("load",),
        units=("MW",),
    )


# -- scores


def test_errors_by_lead_time_by_hand():
    found = score([(clip([1, 2], [0, 0]), clip([0, 4], [0, 3]))], ONE)
    assert found.mse == ((2.5, 4.5),)  # (1 + 4) / 2, (0 + 9) / 2
    assert found.mae == ((1.5, 1.5),)
    assert found.rmse == ((math.sqrt(2.5), math.sqrt(4.5)),)
    assert (found.mse_all, found.mae_all, found.windows) == ((2.5, 4.5), (1.5, 1.5), 1)


def test_a_frame_is_summed_and_windows_are_averaged():
    pairs = [(clip([1, 2], [0, 0]), clip([0, 4], [0, 3])), (clip([0, 0], [0, 1]), clip([0, 0], [0, 0]))]
    found = score(pairs, ONE, per="frame")
    assert found.mse == ((2.5, 5.0),)  # (1 + 4 + 0) / 2 windows, (9 + 1) / 2
    assert found.mae == ((1.5, 2.0),)


def test_moving_mnist_convention_is_the_published_formula():
    forecast, truth = torch.rand(6, 3, 4, 5, 7).double(), torch.rand(6, 3, 4, 5, 7).double()
    found = score(
        [(forecast[:4], truth[:4]), (forecast[4:], truth[4:])], [Quantity(c) for c in "rgb"], per="frame"
    )
    error = (forecast - truth).numpy()
    assert np.mean(found.mse_all) == pytest.approx((error**2).mean((0, 2)).sum())
    assert np.mean(found.mae_all) == pytest.approx(np.abs(error).mean((0, 2)).sum())


def test_units_are_those_of_each_variable_and_all_is_normalised():
    quantities = (Quantity("wind", "m/s", 2.0), Quantity("heat", "K", 10.0))
    truth = torch.zeros(1, 2, 1, 1, 1)
    found = score([(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1, 1), truth)], quantities)
    assert found.mae == ((6.0,), (10.0,)) and found.mse == ((36.0,), (100.0,))
    assert found.mae_all == (2.0,) and found.mse_all == (5.0,)


def test_cells_that_are_not_valid_count_for_nothing():
    forecast, truth = torch.zeros(2, 2, 1, 1, 3), torch.ones(2, 2, 1, 1, 3)
    truth[:, 0, :, :, 2] = 1000.0
    valid = torch.tensor([[[True, True, False]], [[True, True, True]]])
    quantities = (Quantity("a"), Quantity("b"))
    assert score([(forecast, truth)], quantities, valid).mae == ((1.0,), (1.0,))
    assert score([(forecast, truth)], quantities, valid).mae_all == (1.0,)
    assert score([(forecast, truth)], quantities, valid, per="frame").mae == ((2.0,), (3.0,))
    assert score([(forecast, truth)], quantities, valid, per="frame").mae_all == (5.0,)


def test_batches_do_not_matter():
    forecast, truth = torch.randn(7, 1, 3, 2, 2), torch.randn(7, 1, 3, 2, 2)
    whole = score([(forecast, truth)], ONE)
    parts = score(zip(forecast.split(3), truth.split(3), strict=True), ONE)
    assert parts.windows == 7
    assert parts.mse[0] == pytest.approx(whole.mse[0]) and parts.mae_all == pytest.approx(whole.mae_all)


def test_what_cannot_be_scored():
    good = clip([1, 2])
    with pytest.raises(ShapeError, match=r"forecast \[1, 1, 1, 1, 2\] and truth \[1, 1, 2, 1, 2\]"):
        score([(good, clip([1, 2], [1, 2]))], ONE)
    with pytest.raises(ShapeError, match=r"expected both \[B, 2, T, H, W\]"):
        score([(good, good)], ONE * 2)
    with pytest.raises(DataError, match="1 of 2 values of the forecast are not finite"):
        score([(clip([1, math.nan]), good)], ONE)
    with pytest.raises(DataError, match="expected at least one window"):
        score([], ONE)
    with pytest.raises(DataError, match="no valid cell of 'rain'"):
        score([(good, good)], ONE, torch.zeros(1, 1, 2, dtype=torch.bool))
    with pytest.raises(ConfigError, match="per='pixel', expected 'cell' or 'frame'"):
        score([(good, good)], ONE, per="pixel")


def test_skill():
    assert skill([1.0, 2.0, 3.0, 0.0], [2.0, 2.0, 0.0, 1.0]) == (0.5, 0.0, None, 1.0)


# -- baselines


def test_persistence_repeats_the_last_frame():
    observed = torch.randn(2, 3, 4, 5, 6)
    forecast = persistence(observed, 3)
    assert forecast.shape == (2, 3, 3, 5, 6)
    assert all(forecast[:, :, t].equal(observed[:, :, -1]) for t in range(3))


def test_climatology_by_calendar_month():
    values = [float(10 * year + month) for year in range(3) for month in range(12)]
    found = Climatology.fit(series(values, "1990-01", "M"))
    assert found.name == "climatology (calendar month)"
    # the mean of three years is that of the middle one: 10 + month
    assert found.at(np.array(["2001-01", "1980-12"], "M8[M]")).flatten().tolist() == [10, 21]


def test_climatology_by_hour_of_day():
    values = [float(100 * day + hour) for day in range(2) for hour in range(24)]
    found = Climatology.fit(series(values, "2024-05-01T00", "h"))
    assert found.name == "climatology (hour of day)"
    assert found.at(np.array(["2024-07-09T05:00"], "M8[us]")).item() == 55.0


def test_climatology_by_month_and_hour_where_two_years_are_there():
    hours = np.arange(np.datetime64("2023-01-01T00", "h"), np.datetime64("2025-01-01T00", "h"))
    month, hour = hours.astype("M8[M]").astype(int) % 12, hours.astype(int) % 24
    found = Climatology.fit(series(list(100.0 * month + hour), "2023-01-01T00", "h"))
    assert found.name == "climatology (calendar month and hour of day)"
    assert found.means.shape == (288, 1, 1, 1)
    assert found.at(np.array(["2030-03-05T07:00"], "M8[us]")).item() == 207.0


@pytest.mark.parametrize(
    ("first", "unit", "count", "name"),
    [
        ("1990-01", "M", 23, "mean"),  # one December
        ("1990-01", "M", 24, "calendar month"),
        ("1990", "Y", 30, "mean"),
        ("2023-01-01", "D", 700, "mean"),  # ends before its second December
        ("2023-01-01", "D", 702, "calendar month"),
        ("2024-01-01T00", "h", 47, "mean"),
        ("2024-01-01T06", "h", 48, "hour of day"),
        ("2024-01-01T00:00", "m", 1440 * 2, "hour of day"),
    ],
)
def test_a_cycle_needs_two_of_each_phase(first, unit, count, name):
    training = series([float(i) for i in range(count)], first, unit)
    found = Climatology.fit(training)
    assert found.cycle.name == name
    if name == "mean":
        assert found.at(training.times[:1]).item() == pytest.approx((count - 1) / 2)


def test_an_empty_training_part_has_no_climatology():
    parts = series([1.0, 2.0, 3.0], "1990-01", "M").split(validation=0, test=1)
    with pytest.raises(ConfigError, match=r"s \(validation\) has no steps"):
        Climatology.fit(parts.validation)


# -- all together


def months() -> FieldSet:
    """Five years of 10 * month, one higher each year, as normalised with mean 50 and deviation 10."""
    values = [10.0 * month + year for year in range(5) for month in range(12)]
    return series(values, "1990-01", "M").normalised(Scaling(torch.tensor([50.0]), torch.tensor([10.0])))


def test_a_comparison_by_hand():
    parts = months().split(validation=12, test=12, lead_in=2)
    report = compare_forecasts({"zero": lambda x: 0 * x}, parts.training, parts.test, observed=2, horizon=2)
    assert report.baselines == ("persistence", "climatology (calendar month)")
    assert report.settings | {"data": "", "per": ""} == {
        "data": "",
        "first_target": "1994-01-01T00:00",
        "last_target": "1994-12-01T00:00",
        "step": "month",
        "observed": 2,
        "horizon": 2,
        "windows": 11,
        "per": "",
    }
    # the mean of years 0, 1, 2 is 1; year 4 lies 3 above it, in every month
    climatology = report.scores["climatology (calendar month)"]
    assert climatology.mae == (pytest.approx((3.0, 3.0), abs=1e-5),)
    assert climatology.mae_all == pytest.approx((0.3, 0.3), abs=1e-6)
    # one lead: from December 113 to January 4, then ten steps of 10; two leads: 113 -> 14, 4 -> 24 ...
    first, second = (109 + 10 * 10) / 11, (99 + 10 * 20) / 11
    first_lead = report.scores["persistence"].mae[0]
    assert first_lead == pytest.approx((first, (second)), abs=1e-4)
    skills = report.skills("climatology (calendar month)")["persistence"]
    assert skills == pytest.approx((1 - 3 / first, 1 - 3 / second, 1 - 6 / (first + second)), abs=1e-5)
    assert quantities_of(parts.test) == (Quantity("load", "MW", 10.0),)
    own_units = quantities_of(series([1.0, 2.0], "1990-01", "M"))
    assert own_units == (Quantity("load", "MW", 1.0),)


def test_the_truth_has_full_skill_and_the_report_is_json():
    parts = months().split(validation=12, test=12, lead_in=2)
    windows = parts.test.batches(2, 2, size=16)
    report = compare_forecasts(
        {"truth": lambda _: next(windows)[2]}, parts.training, parts.test, observed=2, horizon=2
    )
    assert report.skills("truth") == dict.fromkeys(report.baselines, (1.0, 1.0, 1.0))
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["scores"]["truth"]["mean"] == {"mse": 0, "mae": 0, "rmse": 0}
    assert found["scores"]["persistence"]["mae_skill"]["persistence"] == [0, 0, 0]
    assert found["scores"]["persistence"]["quantities"] == [{"name": "load", "unit": "MW", "scale": 10.0}]


@pytest.mark.parametrize("variable", [None, "load"])
def test_the_table_fits_80_columns(variable):
    parts = months().split(validation=1, test=12, lead_in=12)
    report = compare_forecasts(
        {"PredFormer Quadruplet-TSST": lambda x: x[:, :, :12]}, parts.training, parts.test, 12, 12
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(variable))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(word in text for word in ("persistence", "windows: 1", "mean", "0.0%"))
    assert ("MAE of load MW" in text) == (variable == "load")
    assert "…" not in text


def test_comparisons_that_make_no_sense():
    parts = months().split(validation=12, test=12, lead_in=2)
    with pytest.raises(ConfigError, match="'persistence' has the name of a baseline"):
        compare_forecasts({"persistence": lambda x: x}, parts.training, parts.test, 2, 2)
    with pytest.raises(ConfigError, match=r"s \(training\) and s \(test\) are scaled differently"):
        raw = series([1.0, 2.0, 3.0, 4.0], "1990-01", "M").split(validation=0, test=2)
        compare_forecasts({}, raw.normalised().training, raw.test, 1, 1)
    with pytest.raises(ShapeError, match=r"\[1, 1, 1\] and .*\[1, 4, 4\], expected the same"):
        compare_forecasts({}, parts.training, parts.test.padded(4), 2, 2)
    report = compare_forecasts({}, parts.training, parts.test, 2, 2)
    with pytest.raises(ConfigError, match="unknown variable 'laod'; did you mean 'load'"):
        report.table("laod")


def test_padding_changes_no_score():
    parts = months().split(validation=12, test=12, lead_in=2)
    plain = compare_forecasts({}, parts.training, parts.test, 2, 2)
    padded = compare_forecasts({}, parts.training.padded(4), parts.test.padded(4), 2, 2)
    assert padded.as_dict()["scores"] == plain.as_dict()["scores"]
