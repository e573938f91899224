"""Whatever README.md and docs/ show runs, links lead somewhere, and figures are those on record."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ditkit.cli.main import ditkit_commands

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BY_HAND = {name: text for name, text in PAGES.items() if not name.startswith("docs/systems/")}
"""Pages of systems have a test of their own (tests/systems)."""
PYTHON = re.compile(r"```python\n(.*?)```", re.S)
COMMANDS = sorted(
    {line for text in BY_HAND.values() for line in re.findall(r"^    ditkit (.+)$", text, re.M)}
)


@pytest.mark.parametrize("page", [name for name, text in BY_HAND.items() if PYTHON.search(text)])
def test_python_examples_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look up their module
    for example in PYTHON.findall(PAGES[page]):
        exec(compile(quick(example), page, "exec"), vars(module))


def quick(example: str) -> str:
    """Return the same calls with fewer steps: what they print is not the point here."""
    return (
        example.replace("steps=50", "steps=8")
        .replace("steps=28", "steps=12")
        .replace("seeds=range(4)", "seeds=range(2), rounds=1, memory=False")
        .replace("seeds=[0], memory", "seeds=[0], steps=8, rounds=1, memory")
    )


def test_every_fence_is_of_a_kind_that_is_tested() -> None:
    kinds = {kind for text in BY_HAND.values() for kind in re.findall(r"^```(\w+)", text, re.M)}
    assert kinds == {"python", "bibtex", "text"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command's flags exist: its help, asked for after them, is printed."""
    with pytest.raises(SystemExit) as stop:
        ditkit_commands().resolve([*shlex.split(command), "--help"])()
    assert stop.value.code in (0, None), capsys.readouterr()


@pytest.mark.parametrize("page", BY_HAND)
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_read_in_minutes() -> None:
    assert len(PAGES["README.md"].encode()) <= 6 * 1024
    assert PAGES["docs/glossary.md"].count("\n| ") <= 15 + 2  # the head and its rule


def test_tables_are_those_on_record() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "result_tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
