"""The table of systems is true, and its reader refuses what is not a table of systems."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditkit.cli.systems import summary, systems
from ditkit.core.errors import ConfigError
from ditkit.core.systems import COUNT, STATUSES, System, check, checkout, load

ROW = '[[system]]\nnumber = 1\nname = "A"\ntitle = "T"\narxiv = ""\nstatus = "planned"\n'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with one test file and one recorded result."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("class TestIt:\n    def test_one(self): ...\n")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "it.json").write_text("{}")
    return tmp_path


@pytest.fixture
def working() -> System:
    """A row that is true in `repository`."""
    return System(
        number=1,
        name="It",
        title="It works",
        arxiv="2501.00001",
        status="works",
        components=("ditkit.core.systems:System",),
        recipe="ditkit.core.systems:load",
        tests=("tests/test_it.py", "tests/test_it.py::TestIt::test_one"),
        experiment="benchmarks/results/it.json",
    )


def problems_of(row: System, root: Path) -> list[str]:
    others = (replace(other, number=n) for n, other in enumerate(load()[1:], start=2))
    return [line for line in check([row, *others], root) if line.startswith(f"{row.number} {row.name}:")]


def test_the_shipped_table_is_true() -> None:
    assert check(load()) == []


def test_the_shipped_table_has_every_system_once() -> None:
    rows = load()
    assert [row.number for row in rows] == list(range(1, COUNT + 1))
    assert len({row.name for row in rows}) == len({row.title for row in rows}) == COUNT
    numbered = [row.arxiv for row in rows if row.arxiv]
    assert len(set(numbered)) == len(numbered) == 43  # YingVideo-MV's specification gives none


def test_the_checkout_is_found_from_the_source_tree() -> None:
    assert checkout() == Path(__file__).resolve().parents[2]


def test_a_true_row_has_no_problems(working: System, repository: Path) -> None:
    assert problems_of(working, repository) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"status": "work"}, "unknown status 'work'; did you mean 'works'?"),
        ({"arxiv": "arXiv:1"}, "arxiv = 'arXiv:1', expected YYMM.NNNNN"),
        ({"title": ""}, "name and title must not be empty"),
        ({"components": ()}, "status is 'works' but components is empty"),
        ({"tests": ()}, "status is 'works' but tests is empty"),
        ({"experiment": ""}, "status is 'works' but experiment is empty"),
        ({"status": "planned"}, "status is 'planned' but components is not empty"),
        ({"status": "partial", "components": ()}, "status is 'partial' but components is empty"),
        ({"components": ("ditkit.nowhere:It",)}, "component 'ditkit.nowhere:It' does not import"),
        ({"components": ("ditkit.core.systems:It",)}, "ditkit.core.systems has no It"),
        ({"components": ("json:dumps",)}, "component 'json:dumps', expected ditkit.module:Name"),
        ({"recipe": "ditkit.core.systems.load"}, "recipe 'ditkit.core.systems.load', expected ditkit.module"),
        ({"tests": ("tests/test_no.py",)}, "no file tests/test_no.py"),
        ({"tests": ("tests/test_it.py::test_two",)}, "tests/test_it.py defines no test_two"),
        ({"experiment": "benchmarks/results/no.json"}, "'benchmarks/results/no.json' does not exist"),
        ({"experiment": "tests/test_it.py"}, "expected a .json file under benchmarks/results"),
        (
            {"experiment": "benchmarks/results/../../it.json"},
            "expected a .json file under benchmarks/results",
        ),
    ],
)
def test_an_untrue_row_is_named(
    working: System, repository: Path, change: dict[str, object], expected: str
) -> None:
    assert any(expected in line for line in problems_of(replace(working, **change), repository))


@pytest.mark.parametrize(
    ("renumber", "expected"),
    [
        (lambda n: n + 1, "missing 1; outside 45"),
        (lambda n: 3 if n == 4 else n, "missing 4; repeated 3"),
        (lambda n: COUNT + 1 - n, "another order"),
    ],
)
def test_numbers_run_from_1_to_44(renumber: Callable[[int], int], expected: str) -> None:
    problems = check([replace(row, number=renumber(row.number)) for row in load()])
    assert problems == [f"expected the numbers 1 to 44 in order, got {expected}"]


def test_without_a_checkout_files_pass_unseen(working: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.core.systems.checkout", lambda: None)
    gone = replace(working, tests=("tests/test_no.py",), experiment="benchmarks/results/no.json")
    assert check([gone, *load()[1:]]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("number = ", "expected TOML"),
        ("systems = 1", "unknown key 'systems'; did you mean 'system'?"),
        ("system = 1", "got system = 1"),
        (ROW + 'componets = ["x"]', "row 1: unknown key 'componets'; did you mean 'components'?"),
        (ROW + ROW.replace('title = "T"\n', ""), "row 2: missing key title"),
        (ROW + 'tests = "tests/test_it.py"', "tests = 'tests/test_it.py', expected a list of strings"),
        (ROW + "deviations = [1]", "deviations = [1], expected a list of strings"),
        (ROW.replace("number = 1", "number = true"), "number = True, expected an integer"),
        (ROW.replace('arxiv = ""', "arxiv = 2501.0"), "arxiv = 2501.0, expected a string"),
    ],
)
def test_a_malformed_table_is_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text() | st.text("[]system=\n\"'{}, 1").map(lambda text: ROW + text))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        rows = load(text)
    except ConfigError:
        return
    assert len(rows) == len(tomllib.loads(text).get("system", []))


def test_the_table_fits_80_columns_and_names_every_system(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    systems()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for row, line in zip(load(), lines[1:], strict=False):
        assert line.split()[0] == str(row.number) and row.name in line and row.status in line


def test_json_holds_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    systems(json=True)
    rows = json.loads(capsys.readouterr().out)
    for row in rows:
        row.update({key: tuple(value) for key, value in row.items() if isinstance(value, list)})
    assert tuple(System(**row) for row in rows) == load()


def test_check_counts_a_true_table(capsys: pytest.CaptureFixture[str]) -> None:
    systems(check=True)
    assert capsys.readouterr().out == summary(load()) + "\n"
    assert summary(load()).startswith("44 systems: ")
    assert all(status in summary(load()) for status in STATUSES)


def test_check_exits_2_with_one_line_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *rest = load()
    broken = (replace(first, status="done"), replace(second, arxiv="x"), *rest)
    monkeypatch.setattr("ditkit.core.systems.load", lambda: broken)
    with pytest.raises(SystemExit) as caught:
        systems(check=True)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["1 YingVideo-MV", "2 DiMR"]


def test_json_and_check_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="both --json and --check"):
        systems(json=True, check=True)
