"""What the README shows runs, and its figures are those on record."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")


def test_python_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where dataclasses look up their module
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(examples) >= 3
    for example in examples:
        exec(compile(quick(example), "README.md", "exec"), vars(module))
    assert (tmp_path / "outputs" / "compare" / "report.html").is_file()


def quick(example: str) -> str:
    """The same calls with fewer steps: what they print is not the point here."""
    return (
        example.replace("steps=50", "steps=8")
        .replace("seeds=range(4))", "seeds=range(4), steps=8, memory=False)")
        .replace("seeds=[0], memory", "seeds=[0], steps=8, memory")
    )


def test_commands_parse() -> None:
    """Every command's flags exist: its help, asked for after them, is printed."""
    commands = re.findall(r"^    ditkit (.+)$", README, flags=re.M)
    assert len(commands) >= 5
    for command in commands:
        arguments = [a for a in shlex.split(command) if a != "--dry-run"]
        done = subprocess.run(
            [sys.executable, "-m", "ditkit", *arguments, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_tables_are_those_on_record() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
