"""A CSV of several series: one cell of a field, with its bad rows named and its gaps repaired on request."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditkit.core.errors import ConfigError, DataError
from ditkit.data import series


@pytest.fixture
def csv(tmp_path):
    pytest.importorskip("pandas")

    def write(*rows: str, header: str = "time,load,heat") -> Path:
        path = tmp_path / "s.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def test_series_become_a_field_of_one_cell(csv):
    path = csv("2024-01-31,1,2e3", "2024-02-29, 3 ,4", "", "2024-03-31,5,6")
    found = series.load(path)
    assert found.values.shape == (3, 2, 1, 1) and found.values.flatten().tolist() == [1, 2000, 3, 4, 5, 6]
    assert (found.name, found.variables, str(found.step), found.valid) == (
        "s",
        ("load", "heat"),
        "month",
        None,
    )
    assert series.load(path, columns=["heat"]).values.flatten().tolist() == [2000, 4, 6]


def test_time_column_format_separator_and_offsets(csv):
    path = csv("1;31.03.2024 01:00+01:00", "2;31.03.2024 03:00+02:00", header="load;when")
    found = series.load(path, time="when", time_format="%d.%m.%Y %H:%M%z", separator=";")
    assert [str(t) for t in found.times.astype("M8[h]")] == ["2024-03-31T00", "2024-03-31T01"]


DAYS = ("2024-01-01,1,2", "2024-01-02,3,4", "2024-01-03,5,6")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "holds no lines of data, expected a header and at least 2"),
        (DAYS[:1], "lines with data: 1, expected at least 2"),
        ((*DAYS, "2024-01-04,x,4"), "line 5: column 'load' is 'x', expected a number"),
        ((*DAYS, "2024-01-04,True,4"), "line 5: column 'load' is 'True', expected a number"),
        (
            (*DAYS, "2024-01-04,,4"),
            r"line 5: column 'load' has no finite value \(1 missing.*repair='interpolate'",
        ),
        ((*DAYS, "2024-01-04,inf,4"), "line 5: column 'load' has no finite value"),
        ((*DAYS, "2024-01-04,1e300,4"), "line 5: column 'load' has no finite value"),
        ((*DAYS, "2024-01-04,7"), "line 5: column 'heat' has no finite value"),
        ((*DAYS, "2024-01-04,7,8,9"), "Expected 3 fields in line 5, saw 4"),
        (
            (*DAYS, "soon,7,8"),
            "line 5: time column 'time' is 'soon', expected a time stamp like '2024-01-01'",
        ),
        ((*DAYS, "2024-01-32,7,8"), "line 5: time column 'time' is '2024-01-32'"),
        ((*DAYS, ",7,8"), "line 5: time column 'time' is empty"),
        (
            ("0,7,8", "1,7,8"),
            "line 2: time column 'time' is '0', expected a time stamp like 2024-01-31 18:00",
        ),
        (("2024-01-01,7,8,9",), "line 2: 4 values, expected 3 as in the header, separated by ','"),
        (DAYS[::-1], "line 3: time 2024-01-02T00:00 comes after 2024-01-03T00:00.*repair='sort'"),
        ((*DAYS, DAYS[2]), "line 5: time 2024-01-03T00:00 again, first on line 4.*repair='first'"),
        (
            (*DAYS, "", "2024-01-06,7,8"),
            r"line 6: time 2024-01-06T00:00 follows 2024-01-03T00:00, expected one step \(day\).*\(2 steps in all\)",
        ),
        (("2024-01-01,1,", "2024-01-02,1,"), "column 'heat' holds no number at all"),
    ],
)
def test_bad_rows_are_named(csv, rows, message):
    with pytest.raises(DataError, match=message) as caught:
        series.load(csv(*rows))
    assert "\n" not in str(caught.value) and "s.csv" in str(caught.value)


def test_a_time_between_two_steps_has_no_repair(csv):
    rows = [f"2024-01-01 0{i}:00,1,2" for i in range(4)]
    with pytest.raises(
        DataError, match=r"line 6: time 2024-01-01T04:20 is no whole number of steps \(hour\)"
    ):
        series.load(csv(*rows, "2024-01-01 04:20,1,2"), repair="interpolate")


def test_bad_headers_and_columns(csv):
    with pytest.raises(DataError, match="line 1: column 'a' appears 2 times"):
        series.load(csv("2024-01-01,1,2", header="time,a,a"))
    with pytest.raises(ConfigError, match="unknown column 'laod'; did you mean 'load'"):
        series.load(csv(*DAYS), columns=["laod"])
    with pytest.raises(ConfigError, match="at least one series, each column once"):
        series.load(csv(*DAYS), columns=["time"])
    with pytest.raises(ConfigError, match="time_format='%Q': 'Q' is a bad directive"):
        series.load(csv(*DAYS), time_format="%Q")
    for separator in ("", r"\t"):
        with pytest.raises(ConfigError, match="expected one character"):
            series.load(csv(*DAYS), separator=separator)
    with pytest.raises(DataError, match="No such file"):
        series.load("absent.csv")


def test_every_repair_at_once(csv, caplog):
    path = csv("2024-01-05,1,2", "2024-01-01,1,2", "2024-01-01,9,9", "2024-01-02,,3", "2024-01-04,7,5")
    found = series.load(path, repair=("sort", "first", "interpolate"))
    assert [str(t) for t in found.times.astype("M8[D]")] == [f"2024-01-0{i}" for i in range(1, 6)]
    assert found.values[:, :, 0, 0].tolist() == [[1, 2], [3, 3], [5, 4], [7, 5], [1, 2]]
    assert "1 of 5 steps are missing and interpolated" in caplog.text


def test_a_gap_of_a_month_is_filled_on_its_last_day(csv):
    found = series.load(csv("2024-01-31,1,2", "2024-03-31,3,2", "2024-04-30,4,1"), repair="interpolate")
    assert [str(t) for t in found.times.astype("M8[D]")] == [
        "2024-01-31",
        "2024-02-29",
        "2024-03-31",
        "2024-04-30",
    ]
    assert found.values[:, 0, 0, 0].tolist() == [1, 2, 3, 4]


def test_a_wrong_century_is_not_filled(csv):
    with pytest.raises(DataError, match=r"line 5: gaps need 36521 steps \(day\) made up from 4 given ones"):
        series.load(csv(*DAYS, "2124-01-01,1,2"), repair="interpolate")
