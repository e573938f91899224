"""Calendars: the step between time stamps, months of their own lengths, and phases of the year and day."""

from __future__ import annotations

import numpy as np
import pytest

from ditkit.data.calendar import Step, month_of_year, slot_of_day, step_of


def times(*stamps: str) -> np.ndarray:
    return np.array(stamps, dtype="M8[us]")


@pytest.mark.parametrize(
    ("stamps", "step"),
    [
        (["2024-01-31", "2024-02-29", "2024-03-31"], "month"),
        (["2022-01-01", "2023-01-01", "2024-01-01"], "12 months"),
        (["2024-01-01", "2024-01-08", "2024-01-15"], "7 days"),
        (["2024-02-28T23:30", "2024-02-29T00:00", "2024-02-29T00:30"], "30 minutes"),
        (["2024-01-01T00:00:00", "2024-01-01T00:00:00.1"], "100 milliseconds"),
        (["2024-01-01T00", "2024-01-01T01", "2024-01-01T02", "2024-01-01T05"], "hour"),
        (["1982-01-16T20:00", "1982-02-16T06:30", "1982-03-18T17:00"], "month"),
    ],
)
def test_step_of_a_calendar(stamps, step):
    found = step_of(times(*stamps))
    assert str(found) == step
    assert found.index(times(*stamps)).tolist()[:2] == [0, 1]


def test_a_month_keeps_its_day_or_ends_on_its_last():
    after = Step(1, "month").after(times("2024-01-31T12:00")[0], np.arange(4))
    expected = ["2024-01-31T12:00", "2024-02-29T12:00", "2024-03-31T12:00", "2024-04-30T12:00"]
    assert after.tolist() == times(*expected).tolist()


def test_phases_of_year_and_day():
    stamps = times("1969-12-31T23:59", "2024-03-01T06:00")
    assert month_of_year(stamps).tolist() == [11, 2]
    assert slot_of_day(stamps, 24).tolist() == [23, 6]
    assert [Step(1, "hour").per_day, Step(5, "hour").per_day, Step(1, "day").per_day] == [24, 0, 0]
