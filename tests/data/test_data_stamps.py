"""CSV files as people have them: dates with two readings, counts of seconds, decimal commas, index columns, packing."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ditkit.core.errors import ConfigError, DataError
from ditkit.data import series
from ditkit.data.clock import Clock
from ditkit.data.loading import load, load_fields, read_options


def written(path: Path, stamps, header: str = "time,load") -> Path:
    path.write_text("\n".join([header, *(f"{stamp},{i}" for i, stamp in enumerate(stamps))]) + "\n")
    return path


def days_of(found) -> list[str]:
    return [str(time) for time in found.times.astype("M8[D]")]


MONTHS = [f"01.{month:02d}.2023" for month in range(1, 13)]


def test_dates_with_two_readings_are_refused_with_both(tmp_path):
    path = written(tmp_path / "s.csv", MONTHS)
    with pytest.raises(DataError) as caught:
        series.load(path)
    assert str(caught.value) == (
        f"{path}, line 3: time column 'time' is '01.02.2023', which is 2023-02-01 (time_format='%d.%m.%Y') or "
        "2023-01-02 (time_format='%m.%d.%Y'); expected time_format="
    )
    found = series.load(path, time_format="%d.%m.%Y")
    assert str(found.step) == "month" and days_of(found)[1] == "2023-02-01"
    assert str(series.load(path, time_format="%m.%d.%Y").step) == "day"


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([*MONTHS, "01.01.2024"][1:], "2023-03-01"),  # as days of January the last is a year late
        ([f"{day:02d}/01/2023" for day in range(8, 16)], "2023-01-09"),  # there is no month 13
        ([f"01/{day:02d}/2023 05:00" for day in range(8, 16)], "2023-01-09"),
        ([f"1/{day}/2023 1:00 PM" for day in range(10, 16)], "2023-01-11"),
        ([f"{day:02d}.02.23" for day in range(24, 29)], "2023-02-25"),
        (["2023-02-01", "2023-02-02", "2023-02-03"], "2023-02-02"),
        (["2023/02/01", "2023/02/02", "2023/02/03"], "2023-02-02"),
        (["05.05.2023", "06.06.2023", "07.07.2023"], "2023-06-06"),  # both readings are one
    ],
)
def test_the_reading_that_fits_all_stamps_with_an_even_step_is_taken(stamps, expected, tmp_path):
    assert days_of(series.load(written(tmp_path / "s.csv", stamps)))[1] == expected


def test_two_digit_years_have_three_readings(tmp_path):
    stamps = [f"{year:02d}/02/03" for year in (1, 2, 3, 4)]
    with pytest.raises(
        DataError, match=r"2003-02-01.*%d/%m/%y.* or 2003-01-02.*%m/%d/%y.* or 2001-02-03.*%y/%m/%d"
    ):
        series.load(written(tmp_path / "s.csv", stamps))


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)])
def test_counts_since_1970(unit, factor, tmp_path):
    path = written(tmp_path / "s.csv", [(1_704_067_200 + 3600 * i) * factor for i in range(3)])
    found = series.load(path, time_format=unit)
    assert found.times[1] == np.datetime64("2024-01-01T01") and str(found.step) == "hour"
    with pytest.raises(DataError, match=r"see time_format=s or time_format=ms of counts since 1970"):
        series.load(path)
    zoned = series.load(path, time_format=unit, zone="Asia/Tokyo")
    assert str(zoned.clock.index(zoned.times)[0]) == "2024-01-01 09:00:00+09:00"


def test_values_far_from_zero_stay_apart(tmp_path):
    meter = 123_456_789 + np.linspace(-10, 10, 64).round(3)
    path = tmp_path / "meter.csv"
    pd.DataFrame({"time": pd.date_range("2024", periods=64, freq="h"), "meter": meter}).to_csv(
        path, index=False
    )
    found = series.load(path)
    assert found.values.flatten().tolist() == meter.tolist()
    scaling = found.fit_scaling()
    scaled = found.normalised(scaling)
    assert len(np.unique(scaled.values.numpy())) == 64 and scaled.values.numpy().dtype == np.float32
    restored = scaling.restore(scaled.values.transpose(0, 1)[None]).flatten().numpy()
    assert np.abs(restored - meter).max() < 1e-5


def test_an_index_column_without_a_name_is_left_out_and_named(tmp_path, caplog):
    path = tmp_path / "s.csv"
    table = pd.DataFrame({"time": pd.date_range("2024", periods=5), "load": range(3, 8), "heat": range(5)})
    table.to_csv(path)
    for options in ({}, {"time": "time"}):
        found = series.load(path, **options)
        assert found.variables == ("load", "heat") and days_of(found)[0] == "2024-01-01"
        assert "column 1 has no name and counts the rows from 0 to 4; it is left out" in caplog.text
        caplog.clear()
    pd.read_csv(path).to_csv(path)
    assert series.load(path, time="time").variables == ("load", "heat")  # twice
    table.set_index("time").rename_axis(None).to_csv(path)
    assert series.load(path).variables == ("load", "heat")  # times without a name are times
    path.write_text("time,\n2024-01-01,5\n2024-01-02,9\n2024-01-03,4\n")
    assert series.load(path).variables == ("",)  # it counts nothing


def test_a_decimal_comma_and_words_for_missing(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("time;load\n2024-01-01;1,5\n2024-01-02;-\n2024-01-03;*\n2024-01-04;3,0\n")
    with pytest.raises(DataError, match=r"see separator=';'"):
        series.load(path)
    with pytest.raises(
        DataError, match=r"line 2: column 'load' is '1,5', expected a number; see decimal=','"
    ):
        series.load(path, separator=";")
    with pytest.raises(
        DataError, match=r"line 3: column 'load' is '-', expected a number; see na='-' for missing"
    ):
        series.load(path, separator=";", decimal=",")
    options = read_options(path, ["separator=;", "decimal=,", "na=-,*", "repair=interpolate"])
    found = load(path, **options)
    assert found.values.flatten().tolist() == [1.5, 2, 2.5, 3]
    path.write_text("time;load\n2024-01-01;1.5\n2024-01-02;2\n")
    with pytest.raises(DataError, match=r"is '1\.5', expected a number"):
        series.load(path, separator=";", decimal=",")


def test_encodings_are_named(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes("time,Wärme\n2024-01-01,1\n2024-01-02,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot read .* as CSV in utf-8.*see encoding="):
        series.load(path)
    assert series.load(path, encoding="latin-1").variables == ("Wärme",)
    with pytest.raises(ConfigError, match=r"encoding='latin-99', expected one that Python knows"):
        series.load(path, encoding="latin-99")


def test_tabs_and_packed_files_are_known_by_their_ending(tmp_path):
    text = "time\tload\n2024-01-01\t1\n2024-01-02\t2\n"
    (tmp_path / "a.tsv").write_text(text)
    with gzip.open(tmp_path / "b.tsv.gz", "wt") as file:
        file.write(text)
    with lzma.open(tmp_path / "c.csv.xz", "wt") as file:
        file.write(text.replace("\t", ","))
    for name in ("a.tsv", "b.tsv.gz", "c.csv.xz"):
        found = load_fields(tmp_path / name)
        assert found.name == name[0] and found.values.flatten().tolist() == [1, 2]
    (tmp_path / "d.csv.gz").write_bytes((tmp_path / "b.tsv.gz").read_bytes()[:-12])
    with pytest.raises(DataError, match=r"cannot read .*d.csv.gz as CSV") as caught:
        load_fields(tmp_path / "d.csv.gz")
    assert "\n" not in str(caught.value)


def test_days_of_a_zone_are_counted_on_its_clock(tmp_path):
    """From midnight to midnight it is 23 hours on the day of the change."""
    stamps = pd.date_range("2024-03-29", periods=5, freq="D", tz="Europe/Berlin")
    found = series.load(written(tmp_path / "s.csv", stamps))
    assert str(found.step) == "day" and found.clock.local
    assert found.clock.index(found.times).tolist() == stamps.tolist()


def test_zones_that_are_none_and_times_that_a_zone_does_not_have(tmp_path):
    path = written(tmp_path / "s.csv", ["2024-03-31 01:30", "2024-03-31 02:30"])
    with pytest.raises(
        ConfigError, match=r"zone='Europe/Berln', expected a name.*did you mean 'Europe/Berlin'"
    ):
        series.load(path, zone="Europe/Berln")
    with pytest.raises(
        DataError, match=r"in zone=Europe/Berlin: .*02:30.*; expected times that its clock shows"
    ):
        series.load(path, zone="Europe/Berlin")


def test_an_hour_that_comes_twice_is_told_apart_by_its_order(tmp_path):
    stamps = pd.date_range("2024-10-27 00:00", periods=6, freq="h", tz="Europe/Berlin")
    path = written(tmp_path / "s.csv", stamps.tz_localize(None))
    found = series.load(path, zone="Europe/Berlin")
    assert (
        found.clock == Clock("Europe/Berlin") and found.clock.index(found.times).tolist() == stamps.tolist()
    )
