"""Fields: parts and windows without leakage, scaling, named sets, and what each bad netCDF file says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ditkit.core.errors import ConfigError, DataError, ShapeError
from ditkit.data import fields
from ditkit.data.calendar import Step
from ditkit.data.fields import FieldSet
from ditkit.data.sets import rain, winds

HOURS = np.datetime64("2024-02-28T22:00") + np.arange(10) * np.timedelta64(1, "h")


def tiny(**changes) -> FieldSet:
    """Ten hours of two variables on 2 x 3 cells; the first is 10 n + cell, the second its negative."""
    first = (10.0 * torch.arange(10.0)[:, None] + torch.arange(6.0)).view(10, 1, 2, 3)
    given = {
        "name": "tiny",
        "values": torch.cat([first, -first], 1),
        "times": HOURS,
        "step": Step(1, "hour"),
        "variables": ("up", "down"),
        "units": ("m", "K"),
    }
    return FieldSet(**(given | changes))


# -- the set itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(10, 2, 2)}, r"float32 \[10, 2, 2\], expected torch.float32 \[N, C, H, W\]"),
        ({"units": ("m",)}, "numbers of variables differ.*'units': 1"),
        ({"variables": ("up", "up")}, "numbers of variables differ.*'variables': 1"),
        ({"times": HOURS[:9]}, r"\[9\], expected datetime64 \[10\]"),
        ({"times": HOURS[[*range(9), 8]]}, "index 9 follows 2024-02-29T06:00, expected one step .hour."),
        ({"step": Step(30, "minute")}, "index 1 follows 2024-02-28T22:00"),
        ({"valid": torch.ones(2, 3)}, r"expected torch.bool \[2, 2, 3\]"),
        ({"values": torch.full((10, 2, 2, 3), torch.nan)}, "120 of 120 values are not finite"),
    ],
)
def test_inconsistent_sets_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        tiny(**changes)


def test_windows_are_consecutive_frames():
    given, target = tiny().window(3, observed=2, horizon=4)
    assert given.shape == (2, 2, 2, 3) and target.shape == (2, 4, 2, 3)
    assert given[0, :, 0, 0].tolist() == [30, 40] and target[0, :, 0, 0].tolist() == [50, 60, 70, 80]
    assert target[1, 0, 1, 2].item() == -55
    assert tiny().target_times(3, 2, 4).tolist() == HOURS[5:9].tolist()


def test_batches_cover_every_window_once_in_order():
    batches = list(tiny().batches(observed=2, horizon=3, size=4))
    assert [list(starts) for starts, _, _ in batches] == [[0, 1, 2, 3], [4, 5]]
    firsts = torch.cat([target for _, _, target in batches])[:, 0, 0, 0, 0]
    assert firsts.tolist() == [20, 30, 40, 50, 60, 70]
    assert [list(starts) for starts, _, _ in tiny().batches(2, 3, size=9, stride=4)] == [[0, 4]]


def test_no_window_is_an_error_with_the_numbers():
    assert tiny().count(6, 4) == 1
    with pytest.raises(
        DataError, match="tiny has 10 steps, expected at least 11 for one window of observed=6"
    ):
        tiny().count(6, 5)
    with pytest.raises(ConfigError, match="start=1 should be at most 0"):
        tiny().window(1, 6, 4)
    with pytest.raises(ConfigError, match="horizon=0 should be at least 1"):
        tiny().count(6, 0)


@pytest.mark.parametrize("lead_in", [0, 1, 3])
@pytest.mark.parametrize("observed", [1, 3])
def test_no_target_of_one_part_is_seen_in_another_as_target(lead_in, observed):
    parts = tiny().split(validation=0.2, test=3, lead_in=lead_in)
    assert [len(part) - part.lead_in for part in parts] == [5, 2, 3]
    targets = [
        {t for i in range(part.count(observed, 1)) for t in part.target_times(i, observed, 1).tolist()}
        for part in parts
        if len(part) > max(observed, part.lead_in)
    ]
    assert sum(map(len, targets)) == len(set().union(*targets))
    assert max(targets[0]) == HOURS[4].tolist()
    if lead_in >= observed:
        assert [len(t) for t in targets] == [5 - observed, 2, 3]
        given, target = parts.test.window(0, observed, 1)
        assert given[0, -1, 0, 0] == 60 and target[0, 0, 0, 0] == 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.5, "test": 0.5}, "leave 0 of 10 steps for training, expected at least 1"),
        ({"test": 7, "lead_in": 3}, "leave 2 of 10 steps for training, expected at least 3"),
        ({"validation": 1.5}, "validation=1.5 should be a fraction"),
        ({"test": -1}, "test=-1 should be a fraction"),
        ({"test": True}, "test=True should be a fraction"),
        ({"lead_in": -1}, "lead_in=-1 should be at least 0"),
    ],
)
def test_splits_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny().split(**options)


def test_scaling_is_of_the_training_part_and_has_an_inverse():
    parts = tiny().split(validation=0, test=5)
    scaled = parts.normalised()
    up = parts.training.values[:, 0]
    assert scaled.training.values.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert scaled.training.values.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1])
    assert scaled.test.scaling is scaled.training.scaling
    assert scaled.test.scaling.mean.tolist() == pytest.approx([up.mean().item(), -up.mean().item()])
    assert scaled.test.values.mean() == pytest.approx(0, abs=1e-6)  # up and down cancel
    assert scaled.test.values[:, 0].min() > 1.0  # later hours lie above the training part
    torch.testing.assert_close(scaled.test.scaling.restore(scaled.test.values), parts.test.values.double())
    given, _ = scaled.test.batch([0], 2, 1)
    torch.testing.assert_close(scaled.test.scaling.restore(given)[0, :, 0], parts.test.values[0].double())
    with pytest.raises(ConfigError, match="normalised already"):
        scaled.normalised()


def test_a_constant_variable_has_no_scaling():
    with pytest.raises(DataError, match=r"variable 'up' is constant at 3 in all 10 steps"):
        tiny(values=torch.full((10, 2, 2, 3), 3.0)).fit_scaling()


def test_cropping_and_padding_divide_by_the_patch():
    assert tiny().cropped(2).values.equal(tiny().values[..., :2])
    padded = tiny().padded(4)
    assert padded.values.shape == (10, 2, 4, 4)
    assert padded.values[:, :, :2, :3].equal(tiny().values)
    assert padded.valid.sum().item() == 12 and padded.valid[:, :2, :3].all()
    assert padded.values[:, ~padded.valid].eq(0).all()
    with pytest.raises(ShapeError, match=r"\[2, 3\] cells hold no patch of 4 x 4"):
        tiny().cropped(4)


def test_padding_and_dead_cells_stay_out_of_the_scaling():
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    valid[0, 0, 0] = False
    dead = tiny(valid=valid, values=tiny().values.where(valid, 0))
    live = tiny().values[:, 0].flatten(1)[:, 1:]
    for one in (dead, dead.padded(8)):
        scaling = one.fit_scaling()
        assert scaling.mean[0] == pytest.approx(live.mean().item())
        normalised = one.normalised(scaling)
        assert normalised.values[:, ~one.valid].eq(0).all()


# -- named sets


@pytest.mark.parametrize(("module", "package"), [(winds, "ferret-datasets"), (rain, "r-cran-stars")])
def test_a_set_that_is_not_here_says_what_to_install(module, package, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DEBIAN_FILE", tmp_path / "absent.nc")
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path))
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(DataError, match=f"the {name} set.*apt-get install --no-install-recommends {package}"):
        module.load()
    with pytest.raises(ConfigError, match=f"{name}: size=64, expected none"):
        module.load(64)
    (tmp_path / "absent.nc").write_bytes(b"other")
    with pytest.raises(DataError, match=f"has SHA-256 {hashlib.sha256(b'other').hexdigest()}, expected"):
        module.load()


def loaded(module) -> FieldSet:
    pytest.importorskip("netCDF4")
    try:
        return module.load()
    except DataError as error:
        pytest.skip(str(error))


def test_real_winds():
    found = loaded(winds)
    assert found.values.shape == (132, 2, 73, 144) and found.valid is None and str(found.step) == "month"
    assert [str(found.times[i].astype("M8[M]")) for i in (0, -1)] == ["1982-01", "1992-12"]
    # north is up: the westerlies of the Southern Ocean (52.5 to 45 S) and the trades (7.5 to 15 N) blow as on Earth
    assert found.values[:, 0, 54:58].mean() > 5 and found.values[:, 0, 30:34].mean() < -1


def test_real_rain():
    found = loaded(rain)
    assert found.values.shape == (23, 1, 118, 87) and found.units == ("mm/h",) and str(found.step) == "hour"
    assert found.values.min() == 0 and found.values.max() == 163.75
    assert found.times[0] == np.datetime64("2018-09-13T19:00")
    # north is up: the storm comes ashore and turns to the south-west
    rain_by_row = found.values[:, 0].sum(2)
    row = (rain_by_row * torch.arange(118)).sum(1) / rain_by_row.sum(1)
    assert row[-6:].mean() > row[:6].mean() + 5


# -- a user's netCDF file


def write_netcdf(
    path: Path, values: np.ndarray, stamps=(0, 1, 2, 3), calendar="standard", units=None
) -> Path:
    netCDF4 = pytest.importorskip("netCDF4")
    with netCDF4.Dataset(path, "w") as file:
        for name, length in zip(("time", "y", "x"), values.shape, strict=True):
            file.createDimension(name, length)
        time = file.createVariable("time", "f8", ("time",))
        time.units, time.calendar = units or "days since 2024-01-01", calendar
        time[:] = stamps
        heat = file.createVariable("heat", "i2", ("time", "y", "x"), fill_value=-1)
        heat.units, heat.scale_factor, heat.add_offset = "K", 0.5, 100.0
        heat[:] = np.ma.array(np.nan_to_num(values), mask=np.isnan(values))
        file.createVariable("height", "f4", ("y", "x"))[:] = 1
        file.createVariable("edge", "f4", ("time", "x", "x"))[:] = 1
    return path


def ramp() -> np.ndarray:
    """Four times of 2 x 3 cells: 100 + 10 n + cell, in halves."""
    return 100 + 10.0 * np.arange(4)[:, None, None] + np.arange(6).reshape(2, 3)


def test_netcdf_scaled_values_and_a_cell_that_never_holds_data(tmp_path):
    values = ramp()
    values[:, 1, 1] = np.nan
    found = fields.load(write_netcdf(tmp_path / "heat.nc", values), variables=["heat"])
    assert (found.name, found.variables, found.units, str(found.step)) == ("heat", ("heat",), ("K",), "day")
    assert found.valid.sum() == 5 and not found.valid[0, 1, 1]
    assert found.values[2, 0].tolist() == [[120, 121, 122], [123, 0, 125]]


@pytest.mark.parametrize(("units", "turned"), [("degrees_north", True), ("m", False)])
def test_north_is_up_where_latitudes_lie_over_rows_and_columns(units, turned, tmp_path):
    path = write_netcdf(tmp_path / "heat.nc", ramp())
    with pytest.importorskip("netCDF4").Dataset(path, "a") as file:
        latitude = file.createVariable("lat", "f4", ("y", "x"))
        latitude.units = units
        latitude[:] = [[50, 51, 52], [51, 52, 53]]
        file["heat"].coordinates = "time lat lon"
    first_row = fields.load(path, variables=["heat"]).values[0, 0, 0].tolist()
    assert first_row == ([103, 104, 105] if turned else [100, 101, 102])


def test_latitudes_go_before_an_index_of_rows(tmp_path):
    path = write_netcdf(tmp_path / "heat.nc", ramp())
    with pytest.importorskip("netCDF4").Dataset(path, "a") as file:
        file.createVariable("y", "i4", ("y",))[:] = [0, 1]
        latitude = file.createVariable("lat", "f4", ("y", "x"))
        latitude.units = "degrees_north"
        latitude[:] = [[51, 52, 53], [50, 51, 52]]
        file["heat"].coordinates = "lat lon"
    assert fields.load(path, variables=["heat"]).values[0, 0, 0].tolist() == [100, 101, 102]


def test_a_first_axis_that_is_no_time_is_not_called_one(tmp_path):
    path = tmp_path / "salt.nc"
    with pytest.importorskip("netCDF4").Dataset(path, "w") as file:
        for name in ("depth", "y", "x"):
            file.createDimension(name, 2)
        file.createVariable("depth", "f4", ("depth",)).units = "m"
        file.createVariable("salt", "f4", ("depth", "y", "x"))
    with pytest.raises(DataError, match=r"has no variable over \(time, y, x\) with a time coordinate"):
        fields.load(path)


def test_times_in_fractions_of_a_day_are_even(tmp_path):
    stamps = 40_000 + np.arange(4) / 24
    found = fields.load(
        write_netcdf(tmp_path / "h.nc", ramp(), stamps, units="days since 1900-01-01"), ["heat"]
    )
    assert str(found.step) == "hour"


def test_a_hole_is_an_error_or_interpolated_in_time(tmp_path, caplog):
    values = ramp()
    values[1:3, 0, 2] = values[0, 1, 0] = np.nan
    path = write_netcdf(tmp_path / "heat.nc", values)
    with pytest.raises(DataError) as caught:
        fields.load(path, ["heat"])
    assert str(caught.value) == (
        f"{path}, time step 1: variable 'heat' has no finite value in cell (1, 0) of 2 x 3 (3 missing in all), "
        "expected numbers; repair='interpolate' fills them in time"
    )
    found = fields.load(path, ["heat"], repair="interpolate")
    assert found.values[:, 0, 0, 2].tolist() == [102, 112, 122, 132]
    assert found.values[:, 0, 1, 0].tolist() == [113, 113, 123, 133]  # held before the first known value
    assert "3 of 24 values are interpolated" in caplog.text


@pytest.mark.parametrize(
    ("options", "load", "error", "message"),
    [
        ({}, {}, DataError, r"'heat' lies over \('time', 'y', 'x'\), 'edge' over .*choose with variables="),
        ({}, {"variables": ["heta"]}, ConfigError, "unknown variable 'heta'; did you mean 'heat'"),
        ({}, {"variables": []}, ConfigError, "expected at least one name"),
        ({}, {"repair": "sorted"}, ConfigError, "unknown repair 'sorted'; did you mean 'sort'"),
        (
            {},
            {"variables": ["heat"], "max_bytes": 191},
            DataError,
            "need 192 bytes of memory, more than max_bytes=191",
        ),
        ({"calendar": "mayan"}, {"variables": ["heat"]}, DataError, "unknown calendar of 'time' 'mayan'"),
        (
            {"units": "moons since 2024-01-01"},
            {"variables": ["heat"]},
            DataError,
            "units 'moons since.*not readable",
        ),
        (
            {"units": "hours"},
            {},
            DataError,
            "the times of 'heat' are 'time' in units 'hours', expected units such as 'hours since 2000-01-01'",
        ),
        (
            {"stamps": (0, 2, 1, 3)},
            {"variables": ["heat"]},
            DataError,
            "time step 3: time 2024-01-02.*repair='sort'",
        ),
        ({"stamps": (0, 1, np.nan, 3)}, {"variables": ["heat"]}, DataError, "time step 3: 'time' is missing"),
    ],
)
def test_bad_netcdf(options, load, error, message, tmp_path):
    path = write_netcdf(tmp_path / "heat.nc", ramp(), **options)
    with pytest.raises(error, match=message) as caught:
        fields.load(path, **load)
    assert "\n" not in str(caught.value)


def test_what_is_no_netcdf_with_fields(tmp_path):
    pytest.importorskip("netCDF4")
    with pytest.raises(DataError, match=r"absent.nc as netCDF: No such file"):
        fields.load(tmp_path / "absent.nc")
    (tmp_path / "text.nc").write_text("no")
    with pytest.raises(DataError, match=r"cannot read .*text.nc as netCDF"):
        fields.load(tmp_path / "text.nc")
