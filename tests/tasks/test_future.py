"""Forecasts of the future: stamps that go on, values in the data's units, files that are only ever ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ditkit
from ditkit.cli.main import main
from ditkit.codecs.standardised import Standardised
from ditkit.core.errors import ConfigError, DataError
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.recipes.predformer import predformer_series
from ditkit.tasks.forecast import future as module

FRAMES = 4
ZONE = "Europe/Berlin"


def small(names=("load", "price"), units=None, step="hour", size=(1, 1), **changes) -> PredFormer:
    config = PredFormerConfig(
        channels=len(names), frames=FRAMES, size=size, patch=1, width=8, heads=2, hidden=8, layout="T"
    )
    model = PredFormer(config).eval()
    mean, std = torch.arange(len(names)) * 100.0, torch.ones(len(names)) + 1
    model.codec = Standardised.of(names, units or [""] * len(names), mean, std, step=step)
    return model


def last_again(model, observed, horizon):
    """Persistence, so that values are known."""
    return observed[:, :, -1:].expand(-1, -1, horizon, -1, -1)


@pytest.fixture
def persistent(monkeypatch):
    monkeypatch.setattr(module, "rolled", last_again)


def table(stamps) -> pd.DataFrame:
    n = np.arange(len(stamps), dtype=float)
    return pd.DataFrame({"load": n, "price": 100 + n / 8}, index=pd.DatetimeIndex(stamps, name="time"))


def hours(first="2024-03-30 12:00", count=12, zone=ZONE):
    return pd.date_range(first, periods=count, freq="h", tz=zone)


def later_than(stamps, count, freq):
    return pd.date_range(stamps[-1], periods=count + 1, freq=freq)[1:]


def saved_as(model, folder: Path) -> str:
    return str(model.save(folder / "model"))


def test_a_csv_with_a_zone_goes_on_over_a_change_of_clocks_and_through_pandas(tmp_path, persistent, capsys):
    """The stamps name offsets alone: the change of the past says which clock it is, and so when it changes back."""
    stamps = pd.date_range("2024-03-30 12:00", "2024-10-26 20:00", freq="h", tz=ZONE)
    table(stamps).to_csv(tmp_path / "load.csv")
    out = tmp_path / "out"
    words = ["forecast", saved_as(small(), tmp_path), "--data", str(tmp_path / "load.csv")]
    assert main([*words, "--future", "8", "--out", str(out)]) == 0
    assert (out / "forecast.csv").read_text().splitlines()[0] == "time,load,price"
    written = [line.split(",")[0] for line in (out / "forecast.csv").read_text().splitlines()[1:]]
    assert written[4:8] == [
        "2024-10-27 01:00:00+02:00",
        "2024-10-27 02:00:00+02:00",
        "2024-10-27 02:00:00+01:00",
        "2024-10-27 03:00:00+01:00",
    ]
    again = pd.read_csv(out / "forecast.csv", index_col="time")
    again.index = pd.to_datetime(again.index, utc=True).tz_convert(ZONE)
    expected = later_than(stamps, 8, "h")
    assert (again.index == expected).all()
    price = 100 + (len(stamps) - 1) / 8
    assert again["price"].tolist() == [price] * 8 and again["load"].tolist() == [len(stamps) - 1.0] * 8
    record = json.loads((out / "future.json").read_text())
    assert record["step"] == "hour" and record["command"].endswith("--future 8")
    assert "8 steps (hour) of load, price: 2024-10-26 21:00:00+02:00" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["forecast.csv", "forecast.png", "future.json"]


@pytest.mark.parametrize(
    ("stamps", "freq", "step"),
    [
        (hours(), "h", "hour"),
        (pd.date_range("2024-03-28", periods=8, freq="D", tz=ZONE), "D", "day"),
        (pd.date_range("2023-11-01", periods=7, freq="MS", tz="America/New_York"), "MS", "month"),
        (pd.date_range("2023-06-30", periods=8, freq="ME"), "ME", "month"),
        (pd.date_range("2024-01-01", periods=8, freq="15min", tz="UTC+05:30"), "15min", "15 minutes"),
        (pd.period_range("2024-01", periods=8, freq="M").to_timestamp(), "MS", "month"),
    ],
    ids=["hours", "days", "months", "month ends", "offset", "periods"],
)
def test_stamps_of_a_data_frame_go_on_as_pandas_has_them(stamps, freq, step, persistent):
    found = ditkit.forecast(small(step=step), table(stamps), future=3).to_pandas()
    assert found.index.tolist() == later_than(stamps, 3, freq).tolist()
    assert found.index.dtype.kind == stamps.dtype.kind and str(found.index.tz) in (
        str(stamps.tz),
        "UTC+05:30",
    )
    assert found["load"].tolist() == [len(stamps) - 1.0] * 3


def test_stamps_without_an_offset_are_of_the_zone_that_is_named(tmp_path, persistent):
    table(hours(zone=None)).to_csv(tmp_path / "local.csv")
    found = ditkit.forecast(small(), tmp_path / "local.csv", future=4, options={"zone": ZONE}).to_pandas()
    assert found.index.tolist() == later_than(hours(), 4, "h").tolist()
    assert [stamp.hour for stamp in found.index] == [0, 1, 3, 4]


def test_offsets_that_tell_no_zone_are_held_with_a_warning(tmp_path, persistent, caplog):
    stamps = [
        "2024-01-01 00:00+01:00",
        "2024-01-01 01:00+01:00",
        "2024-01-01 03:00+02:00",
        "2024-01-01 04:00+02:00",
    ]
    (tmp_path / "s.csv").write_text("time,load,price\n" + "".join(f"{stamp},1,2\n" for stamp in stamps))
    found = ditkit.forecast(small(), tmp_path / "s.csv", future=1).to_pandas()
    assert str(found.index[0]) == "2024-01-01 05:00:00+02:00"
    assert "tell no zone" in caplog.text and "name it with zone=" in caplog.text


def test_values_far_from_zero_come_back_exactly(persistent):
    """A meter at 123,456,789 +- 10: float32 has steps of 8 there."""
    stamps, n = hours(), np.arange(12)
    meter = 123_456_789 + 10 * np.sin(n)
    model = small(["meter"])
    model.codec = Standardised.of(
        ["meter"], ["kWh"], torch.tensor([meter.mean()]), torch.tensor([meter.std()])
    )
    found = ditkit.forecast(model, pd.DataFrame({"meter": meter}, index=stamps), future=1)
    assert found.values.item() == pytest.approx(meter[-1], abs=1e-5)


def test_a_long_future_rolls_on_with_a_warning(caplog):
    model, data = small(), table(hours())
    assert len(ditkit.forecast(model, data, future=FRAMES).to_pandas()) == FRAMES and not caplog.text
    rolled = ditkit.forecast(model, data, future=2 * FRAMES + 1).to_pandas()
    assert len(rolled) == 2 * FRAMES + 1 and np.isfinite(rolled.to_numpy()).all()
    assert (
        "9 steps are more than the 4 that the network says at once; its forecasts are fed back" in caplog.text
    )


def test_several_models_have_quantiles_and_one_has_none(tmp_path):
    torch.manual_seed(0)
    models, data = [small() for _ in range(3)], table(hours())
    found = ditkit.forecast(models, data, future=2)
    each = torch.stack([ditkit.forecast(model, data, future=2).values for model in models])
    torch.testing.assert_close(found.values, each.mean(0))
    torch.testing.assert_close(found.quantile(0.9), each.quantile(0.9, 0))
    columns = found.to_pandas()
    assert columns["price_q50"].tolist() == pytest.approx(each.median(0).values[1].flatten().tolist())
    assert (columns["load_q10"] <= columns["load_q90"]).all()
    assert found.plot().height > 500
    with pytest.raises(ConfigError, match="one model that says one value has no quantiles"):
        ditkit.forecast(models[0], data, future=2).quantile(0.5)


def test_a_grid_has_a_row_each_time_and_cell_and_nothing_where_no_data_are(persistent):
    xarray = pytest.importorskip("xarray")
    values = np.arange(6 * 2 * 3, dtype=float).reshape(6, 2, 3)
    values[:, 1, 2] = np.nan
    heat = xarray.DataArray(
        values,
        dims=("time", "lat", "lon"),
        coords={"time": pd.date_range("2024-01-01", periods=6), "lat": [60, 50], "lon": [0, 1, 2]},
        name="heat",
        attrs={"units": "K"},
    )
    found = ditkit.forecast(small(["heat"], ["K"], "day", size=(2, 3)), heat, future=2)
    rows = found.to_pandas()
    assert rows.index.names == ["time", "row", "column"] and len(rows) == 2 * 6
    assert rows.loc["2024-01-07", "heat"].tolist()[:5] == [30, 31, 32, 33, 34]
    assert rows["heat"].isna().sum() == 2
    assert found.plot().width > 0


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "julian"])
@pytest.mark.parametrize(("freq", "step"), [("D", "day"), ("MS", "month")])
def test_the_times_of_another_calendar_go_on_in_it(calendar, freq, step, persistent, tmp_path):
    xarray = pytest.importorskip("xarray")
    stamps = xarray.date_range("2000-02-01", periods=34, freq=freq, calendar=calendar, use_cftime=True)
    data = xarray.Dataset({"load": ("time", np.arange(30.0))}, coords={"time": stamps[:30]})
    found = ditkit.forecast(small(["load"], step=step), data, future=4)
    assert found.to_pandas().index.tolist() == stamps[30:].tolist()
    found.to_csv(tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text().splitlines()[1].startswith(stamps[30].strftime("%Y-%m-%d"))
    assert found.plot().width > 0


def test_columns_are_found_by_name_and_others_left_alone(persistent):
    data = table(hours())[["price", "load"]].assign(wind=1.0)
    assert ditkit.forecast(small(), data, future=1).to_pandas().iloc[0].to_dict() == {
        "load": 11,
        "price": 101.375,
    }


def test_a_model_refuses_other_steps_units_and_variables_by_name(tmp_path):
    daily = table(pd.date_range("2024-01-01", periods=8))
    with pytest.raises(ConfigError, match="a value every day, the model was trained on one every hour"):
        ditkit.forecast(small(), daily, future=1)
    with pytest.raises(
        ConfigError, match=r"DataFrame has \('load', 'price'\), the model was trained on \('heat',\)"
    ):
        ditkit.forecast(small(["heat"]), daily, future=1)
    xarray = pytest.importorskip("xarray")
    celsius = xarray.Dataset(
        {"heat": ("time", np.arange(8.0), {"units": "degC"})}, {"time": pd.date_range("2024", periods=8)}
    )
    with pytest.raises(ConfigError, match="'heat' in degC, the model was trained on it in K"):
        ditkit.forecast(small(["heat"], ["K"], "day"), celsius, future=1)
    with pytest.raises(ConfigError, match="trained on it in K"):  # held-out data likewise
        ditkit.evaluate(small(["heat"], ["K"], "day"), celsius)
    with pytest.raises(ConfigError, match="has 1 x 1 cells, the model was trained on 2 x 2"):
        ditkit.forecast(small(step="day", size=(2, 2)), daily, future=1)


def test_a_codec_of_an_earlier_version_says_no_step_and_is_taken(persistent):
    assert len(ditkit.forecast(small(step=""), table(hours()), future=2).to_pandas()) == 2


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            pd.DataFrame({"load": [1.0, 2]}),
            DataError,
            "DataFrame has no times: its index holds int64, expected a Date",
        ),
        (table(hours()).assign(load="x"), DataError, "column 'load' holds str|object, expected numbers"),
        (table(hours(count=3)), DataError, "has 3 steps, expected at least the 4 that the model looks at"),
        (table(hours().delete(5)), DataError, "expected one step .hour. between them; repair='interpolate'"),
        (np.zeros(4), ConfigError, "data are a ndarray, expected a name, a path, a pandas DataFrame"),
        ("moving-digits", ConfigError, "holds clips, expected fields"),
    ],
)
def test_data_that_are_no_series_are_one_line(data, error, message):
    with pytest.raises(error, match=message) as caught:
        ditkit.forecast(small(), data, future=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("future", "message"), [(0, "at least 1"), (10**20, "at most 100000"), (1.5, "an integer")]
)
def test_futures_that_are_none(future, message):
    with pytest.raises(ConfigError, match=f"future={future} should be {message}"):
        ditkit.forecast(small(), table(hours()), future=future)


@pytest.mark.parametrize("name", ["forecast.csv", "forecast.png", "future.json"])
def test_a_persons_own_file_is_not_overwritten_and_nothing_else_is_written(name, tmp_path, capsys):
    table(hours()).to_csv(tmp_path / "load.csv")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    words = ["forecast", saved_as(small(), tmp_path), "--data", str(tmp_path / "load.csv"), "--out", str(out)]
    assert main([*words, "--future", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{name} is no file that a forecast left there" in error and "\n" not in error
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [(name, "mine")]


def test_our_own_files_are_replaced_unless_they_were_changed(tmp_path, persistent):
    out = tmp_path / "out"
    for steps in (2, 3):
        ditkit.forecast(small(), table(hours()), future=steps).save(out)
    assert len(pd.read_csv(out / "forecast.csv")) == 3
    (out / "forecast.csv").write_text("edited")
    with pytest.raises(ConfigError, match="was changed since"):
        ditkit.forecast(small(), table(hours()), future=2).save(out)
    assert (out / "forecast.csv").read_text() == "edited"


def test_the_future_is_no_horizon(tmp_path, capsys):
    words = ["forecast", saved_as(small(), tmp_path), "--data", "x.csv", "--future", "2", "--horizon", "3"]
    assert main(words) == 2 and "expected one of them" in capsys.readouterr().err


def test_the_recipe_of_series_takes_a_file_and_remembers_its_step(tmp_path):
    table(hours(count=80)).to_csv(tmp_path / "mine.csv")
    recipe = replace(predformer_series(), data=str(tmp_path / "mine.csv"))
    prepared = replace(recipe, model=replace(recipe.model, frames=FRAMES)).prepared()
    assert (prepared.codec.config.step, prepared.codec.config.variables) == ("hour", ("load", "price"))
    assert prepared.recipe.model.size == (1, 1) and prepared.recipe.model.channels == 2
