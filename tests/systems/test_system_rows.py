"""Rows of systems: read from TOML, found by number or name, and refused in one line where they are no rows."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditkit.core.errors import ConfigError
from ditkit.systems.rows import find, parse

ROW = 'number = 1\nname = "A"\ntitle = "T"\narxiv = ""\nstatus = "planned"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("number = ", "01-a.toml: expected TOML"),
        (ROW + 'componets = ["x"]', "01-a.toml: unknown key 'componets'; did you mean 'components'?"),
        (ROW + 'stem = "x"', "unknown key 'stem'"),
        (ROW.replace('title = "T"\n', ""), "01-a.toml: missing key title"),
        (ROW + 'tests = "tests/test_it.py"', "tests = 'tests/test_it.py', expected a list of strings"),
        (ROW + "deviations = [1]", "deviations = [1], expected [[deviations]] tables of what and why"),
        (ROW + '[[deviations]]\nwhat = "x"', "deviations 1: missing key why"),
        (ROW + '[[deviations]]\nwhat = "x"\nwhy = 1', "deviations 1: why = 1, expected a string"),
        (ROW.replace("number = 1", "number = true"), "number = True, expected an integer"),
        (ROW.replace('arxiv = ""', "arxiv = 2501.0"), "arxiv = 2501.0, expected a string"),
    ],
)
def test_a_malformed_row_is_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "01-a.toml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text() | st.text("[]system=\n\"'{}, 1").map(lambda text: ROW + text))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        row = parse(text, "01-a.toml")
    except ConfigError:
        return
    assert row.name == tomllib.loads(text)["name"]


@pytest.mark.parametrize("text", ["12", " 012", "taylorseer", "TaylorSeer", "12-taylorseer"])
def test_a_row_is_found_by_number_and_name(text: str) -> None:
    assert find(text).name == "TaylorSeer"


def test_a_row_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown system 'taylorsear'; did you mean 'TaylorSeer'"):
        find("taylorsear")
