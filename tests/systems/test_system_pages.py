"""Pages of systems: one part is made from the row, the rest is kept, and what they show runs."""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from ditkit.cli.main import ditkit_commands
from ditkit.systems.pages import END, FOLDER, START, examples, filled, page_of, write_page
from ditkit.systems.rows import Deviation, System, find

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / FOLDER).glob("*.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_what_is_written_by_hand_is_kept(tmp_path: Path) -> None:
    row = replace(find("12"), claims="")
    assert write_page(row, tmp_path)
    path = tmp_path / page_of(row)
    by_hand = path.read_text().replace("# TaylorSeer\n", "# TaylorSeer\n\nBefore.\n") + "\nAfter | it.\n"
    path.write_text(by_hand)
    assert not write_page(row, tmp_path)
    assert path.read_text() == by_hand
    path.write_text(re.sub(r"arXiv \d+", "arXiv 0000", by_hand))
    assert write_page(row, tmp_path)
    assert path.read_text() == by_hand


def test_the_made_part_has_the_row(tmp_path: Path) -> None:
    row = System(
        stem="00-it",
        number=0,
        name="It",
        title="All of it",
        arxiv="2501.00001",
        status="partial",
        components=("ditkit.core.grid:Grid",),
        gpu=("python benchmarks/it.py",),
        deviations=(Deviation(what="it is smaller", why="To fit."),),
    )
    page = filled(row, tmp_path, f"{START}\n{END}")
    for part in (
        "All of it",
        "2501.00001",
        "**partial**",
        "core.grid:Grid",
        "Not tried yet.",
        "To fit.",
        "it.py",
    ):
        assert part in page


def test_examples_are_those_written_by_hand() -> None:
    page = f"```sh\nditkit a\n```\n\n{START}\n```sh\nditkit b\n```\n{END}\n\n```python\nx = 1\n```\n"
    assert examples(page, "sh") == ["ditkit a\n"]
    assert examples(page, "python") == ["x = 1\n"]


@pages
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in examples(page.read_text(encoding="utf-8"), "python"):
        exec(compile(example, page.name, "exec"), {"__name__": "example"})


@pages
def test_commands_on_a_page_parse(page: Path) -> None:
    """Every line is a command of ours with flags and values that exist; it is bound, and not run."""
    for block in examples(page.read_text(encoding="utf-8"), "sh"):
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "ditkit" and callable(ditkit_commands().resolve(words))


def test_the_tool_writes_nothing_where_all_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "tools" / "system_pages.py"))["main"]([])
    assert capsys.readouterr().out == ""
