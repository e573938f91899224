"""The table of systems is true, and everything that is not so is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ditkit.cli.systems import summary, systems
from ditkit.core.errors import ConfigError
from ditkit.systems import check as checking
from ditkit.systems.check import check, checkout, claims_of, script_of
from ditkit.systems.claims import Claim, Claims
from ditkit.systems.code import component_digests, file_digest
from ditkit.systems.pages import page_of, write_page
from ditkit.systems.rows import COUNT, STATUSES, Deviation, System, load, row_files

EXAMPLES = "```python\nimport ditkit\n```\n\n```sh\nditkit systems 0\n```\n"


@pytest.fixture
def working() -> System:
    """A row that is true in `repository`."""
    return System(
        stem="00-it",
        number=0,
        name="It",
        title="It works",
        arxiv="2501.00001",
        status="works",
        components=("ditkit.systems.rows:System",),
        recipe="ditkit.systems.rows:load",
        tests=("tests/test_it.py", "tests/test_it.py::TestIt::test_one"),
        composes=("tests/test_it.py::TestIt",),
        experiment="benchmarks/results/it.json",
        claims="benchmarks/results/claims/00-it.json",
        gpu=("python benchmarks/it.py --peak 1",),
        deviations=(Deviation(what="it is smaller", why="to fit"),),
    )


@pytest.fixture
def repository(tmp_path: Path, working: System) -> Path:
    """A checkout with a test file, a recorded result, a claims script with its file, and a page."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("class TestIt:\n    def test_one(self): ...\n")
    (tmp_path / "benchmarks" / "results" / "claims").mkdir(parents=True)
    (tmp_path / "benchmarks" / "claims").mkdir()
    (tmp_path / "benchmarks" / "it.py").write_text("")
    (tmp_path / "benchmarks" / "results" / "it.json").write_text("{}")
    (tmp_path / script_of(working)).write_text("FIGURE = 1\n")
    record(working, tmp_path)
    write_page(working, tmp_path)
    page = tmp_path / page_of(working)
    page.write_text(page.read_text().replace("# It\n", f"# It\n\nWords by hand.\n\n{EXAMPLES}", 1))
    return tmp_path


def record(row: System, root: Path, **changes: object) -> None:
    """Write a true claims file of a row, but for `changes` of its keys."""
    script = script_of(row)
    claims = Claims(
        system=row.stem,
        command=f"python {script}",
        date="2026-12-01T00:00:00+00:00",
        device="a processor",
        threads=1,
        versions={"python": "3.11.7"},
        code={**component_digests(row.components), script: file_digest(root / script)},
        claims=(
            Claim.tried(
                "it is fast", paper="2x", ours=2.0, interval=(1.5, 2.5), claimed=(1.0, None), unit="x"
            ),
            Claim.untried("it is good", paper="FID 2", reason="takes ImageNet"),
        ),
    )
    text = json.dumps({**claims.as_json(), **changes})
    (root / claims_of(row)).write_text(text, encoding="utf-8")


def problems_of(row: System, root: Path) -> list[str]:
    """Return what `check` finds in a row that stands for row 0, among bare others."""
    bare = [
        System(stem=o.stem, number=o.number, name=o.name, title=o.title, arxiv="", status="planned")
        for o in load()[1:]
    ]
    return [line.removeprefix(f"{row.number} {row.name}: ") for line in check([row, *bare], root)]


def test_the_shipped_table_is_true() -> None:
    assert check(load()) == []


def test_the_shipped_table_has_every_system_once() -> None:
    rows = load()
    assert [row.number for row in rows] == list(range(COUNT))
    assert len({row.name for row in rows}) == len({row.title for row in rows}) == COUNT == 45
    numbered = [row.arxiv for row in rows if row.arxiv]
    assert len(set(numbered)) == len(numbered) == 44  # YingVideo-MV's specification gives none
    assert {file.name for file in row_files()} == {f"{row.stem}.toml" for row in rows}


def test_the_checkout_is_found_from_the_source_tree() -> None:
    assert checkout() == Path(__file__).resolve().parents[2]


def test_a_true_row_has_no_problems(working: System, repository: Path) -> None:
    assert problems_of(working, repository) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stem": "01-it"}, "its file is 01-it.toml, expected 00-name.toml"),
        ({"stem": "00-It"}, "its file is 00-It.toml, expected 00-name.toml"),
        ({"status": "work"}, "unknown status 'work'; did you mean 'works'?"),
        ({"arxiv": "arXiv:1"}, "arxiv = 'arXiv:1', expected YYMM.NNNNN"),
        ({"title": ""}, "name and title must not be empty"),
        ({"components": ()}, "status is 'works' but components is empty"),
        ({"tests": ()}, "status is 'works' but tests is empty"),
        ({"composes": ()}, "status is 'works' but composes is empty"),
        ({"claims": ""}, "status is 'works' but claims is empty"),
        ({"status": "planned"}, "status is 'planned' but components is not empty"),
        ({"status": "planned"}, "status is 'planned' but claims is not empty"),
        ({"status": "partial", "components": ()}, "status is 'partial' but components is empty"),
        ({"components": ("ditkit.nowhere:It",)}, "component 'ditkit.nowhere:It' does not import"),
        ({"components": ("ditkit.systems.rows:It",)}, "ditkit.systems.rows has no It"),
        ({"components": ("json:dumps",)}, "component 'json:dumps', expected ditkit.module:Name"),
        ({"recipe": "ditkit.systems.rows.load"}, "recipe 'ditkit.systems.rows.load', expected ditkit.module"),
        ({"tests": ("tests/test_no.py",)}, "no file tests/test_no.py"),
        ({"composes": ("tests/test_no.py",)}, "no file tests/test_no.py"),
        ({"tests": ("tests/test_it.py::test_two",)}, "tests/test_it.py defines no test_two"),
        ({"experiment": "benchmarks/results/no.json"}, "'benchmarks/results/no.json' does not exist"),
        ({"experiment": "tests/test_it.py"}, "expected a .json file under benchmarks/results"),
        (
            {"experiment": "benchmarks/results/../../it.json"},
            "expected a .json file under benchmarks/results",
        ),
        ({"claims": "benchmarks/results/it.json"}, "expected benchmarks/results/claims/00-it.json"),
        ({"gpu": ("python benchmarks/no.py",)}, "no file benchmarks/no.py"),
        ({"gpu": ("rm benchmarks/it.py",)}, "expected python benchmarks/SCRIPT.py"),
        ({"deviations": (Deviation(what="it is red", why=""),)}, "deviation 'it is red' without its reason"),
        ({"deviations": (Deviation(what="", why="it is"),)}, "deviation '' without its words"),
    ],
)
def test_an_untrue_row_is_named(
    working: System, repository: Path, change: dict[str, object], expected: str
) -> None:
    assert any(expected in line for line in problems_of(replace(working, **change), repository))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"claims": []}, "no claim was tried"),
        ({"command": ""}, "command is empty"),
        ({"versions": {}}, "versions is empty"),
        ({"system": "01-other"}, "system = '01-other', expected '00-it'"),
        (
            {"code": {"ditkit.systems.rows:System": "0"}},
            "is of other code than the row's: benchmarks/claims/00_it.py",
        ),
    ],
)
def test_an_untrue_claims_file_is_named(
    working: System, repository: Path, changes: dict[str, object], expected: str
) -> None:
    record(working, repository, **changes)
    assert any(expected in line for line in problems_of(working, repository))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"interval": None}, "verdict is 'held' without its interval"),
        ({"claimed": None}, "verdict is 'held' without its claimed"),
        ({"verdict": "refuted"}, "verdict is 'refuted', but 'held' follows"),
        ({"verdict": "hold"}, "unknown verdict 'hold'; did you mean 'held'?"),
        (
            {"verdict": "not tried", "ours": None, "interval": None},
            "verdict is 'not tried' without its reason",
        ),
        ({"verdict": "not tried", "reason": "late"}, "verdict is 'not tried' and a figure is given"),
        ({"ours": 9.0}, "ours = 9.0 lies outside its interval"),
        ({"interval": [float("nan"), 1.0]}, "expected finite numbers"),
        ({"interval": 3}, "interval = 3, expected [low, high]"),
        ({"interval": [None, 3.0]}, "expected [low, high]"),
        ({"ours": "2"}, "ours = '2', expected a number or null"),
        ({"paper": 2.0}, "paper = 2.0, expected a string"),
        ({"paper": ""}, "claim and paper must not be empty"),
        ({"note": "x"}, "claim 1: unknown key 'note'"),
    ],
)
def test_an_untrue_claim_is_named(
    working: System, repository: Path, change: dict[str, object], expected: str
) -> None:
    path = repository / claims_of(working)
    document = json.loads(path.read_text())
    document["claims"][0].update(change)
    path.write_text(json.dumps(document))
    assert any(expected in line for line in problems_of(working, repository))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "00-it.json is not JSON"),
        ("[]", "should hold a JSON object"),
        ("{}", "missing key system, command"),
    ],
)
def test_a_claims_file_that_cannot_be_read_is_named(
    working: System, repository: Path, text: str, expected: str
) -> None:
    (repository / claims_of(working)).write_text(text)
    assert any(expected in line for line in problems_of(working, repository))


def test_what_is_missing_is_named(working: System, repository: Path) -> None:
    (repository / claims_of(working)).unlink()
    (repository / page_of(working)).unlink()
    problems = problems_of(working, repository)
    assert any("cannot read 00-it.json" in line for line in problems)
    assert any("'works' but docs/systems/00-it.md does not exist" in line for line in problems)
    (repository / script_of(working)).unlink()
    assert any("00_it.py does not exist" in line for line in problems_of(working, repository))


def test_a_script_that_changed_after_its_run_is_noticed(working: System, repository: Path) -> None:
    script = repository / script_of(working)
    script.write_text('"""The same, with words."""\nFIGURE = 1  # and a comment\n')
    assert problems_of(working, repository) == []
    script.write_text("FIGURE = 2\n")
    expected = f"{claims_of(working)} is of other code than the row's: {script_of(working)}; run python "
    assert any(expected in line for line in problems_of(working, repository))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "it is smaller",
            "it is larger",
            "is not what the row and its claims give; run python tools/system_pages.py",
        ),
        ("<!-- end of the row -->", "", "expected one part from"),
        ("```sh", "```text", "has no ```sh block"),
        ("```python", "```text", "has no ```python block"),
    ],
)
def test_a_page_that_is_not_the_rows_is_named(
    working: System, repository: Path, old: str, new: str, expected: str
) -> None:
    page = repository / page_of(working)
    page.write_text(page.read_text().replace(old, new))
    assert any(expected in line for line in problems_of(working, repository))


def test_files_without_a_row_are_named(working: System, repository: Path) -> None:
    (repository / "docs" / "systems" / "77-it.md").write_text("")
    (repository / "benchmarks" / "results" / "claims" / "78-it.json").write_text("{}")
    assert problems_of(working, repository) == [
        "benchmarks/results/claims/78-it.json: no row has it",
        "docs/systems/77-it.md: no row has it",
    ]


def test_a_partial_row_needs_no_claims_and_no_page(working: System, repository: Path) -> None:
    (repository / page_of(working)).unlink()
    (repository / claims_of(working)).unlink()
    assert problems_of(replace(working, status="partial", claims="", composes=()), repository) == []


@pytest.mark.parametrize(
    ("renumber", "expected"),
    [
        (lambda n: n + 1, "missing 0; outside 45"),
        (lambda n: 3 if n == 4 else n, "missing 4; repeated 3"),
        (lambda n: COUNT - 1 - n, "another order"),
    ],
)
def test_numbers_run_from_0_to_44(renumber: Callable[[int], int], expected: str) -> None:
    problems = check([replace(row, number=renumber(row.number)) for row in load()])
    assert problems[0] == f"expected the numbers 0 to 44 in order, got {expected}"


def test_without_a_checkout_files_are_not_looked_up(working: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "checkout", lambda: None)
    gone = replace(working, tests=("tests/test_no.py",), experiment="benchmarks/results/no.json")
    assert check([gone, *load()[1:]]) == []


def test_the_table_fits_80_columns_and_names_every_system(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    systems()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line for line in lines if re.match(r" ?\d+  ", line)]
    for row, line in zip(load(), heads, strict=True):
        assert line.split()[0] == str(row.number) and row.name in line and row.status in line


def test_one_row_is_shown_with_its_claims(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    systems("baselines")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for expected in ("0 Baselines", "2212.09748", "ditkit.models.dit:DiT", "held", "not tried", "order 2"):
        assert expected in out
    untried = next((row for row in load() if row.status == "partial" and not row.claims), None)
    if untried is None:  # every row that began has its claims
        return
    systems(str(untried.number))
    assert "None of its claims has been tried here yet." in capsys.readouterr().out


def test_json_holds_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    systems(json=True)
    rows = json.loads(capsys.readouterr().out)
    for row in rows:
        row.update({key: tuple(value) for key, value in row.items() if isinstance(value, list)})
        row["deviations"] = tuple(Deviation(**deviation) for deviation in row["deviations"])
    assert tuple(System(**row) for row in rows) == load()
    systems("7", json=True)
    assert json.loads(capsys.readouterr().out)["name"] == "VDT"


def test_check_counts_a_true_table(capsys: pytest.CaptureFixture[str]) -> None:
    systems(check=True)
    assert capsys.readouterr().out == summary(load()) + "\n"
    assert summary(load()).startswith("45 systems: ")
    assert all(status in summary(load()) for status in STATUSES)


def test_check_exits_2_with_one_line_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [row for row in load() if row.status == "planned"][
        :2
    ]  # those have no page that would differ
    changed = {first.number: replace(first, status="done"), second.number: replace(second, arxiv="x")}
    broken = tuple(changed.get(row.number, row) for row in load())
    monkeypatch.setattr("ditkit.systems.rows.load", lambda: broken)
    with pytest.raises(SystemExit) as caught:
        systems(check=True)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"{r.number} {r.name}" for r in (first, second)
    ]


def test_flags_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="both --json and --check"):
        systems(json=True, check=True)
    with pytest.raises(ConfigError, match="both '12' and --check"):
        systems("12", check=True)
