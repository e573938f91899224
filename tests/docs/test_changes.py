"""Notes of changes: every file of `changes/` is one that towncrier takes, and says something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTES = [path for path in sorted((ROOT / "changes").iterdir()) if path.name != "README.md"]
TYPES = ("added", "changed", "fixed", "removed")


def test_every_note_is_of_a_type_and_not_empty() -> None:
    for path in NOTES:
        assert path.name.endswith(tuple(f".{kind}.md" for kind in TYPES)), path.name
        assert path.read_text(encoding="utf-8").strip(), path.name


def test_towncrier_puts_every_note_into_the_changelog() -> None:
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "next"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    draft = " ".join(done.stdout.split())
    for path in NOTES:
        assert " ".join(path.read_text(encoding="utf-8").split()) in draft, path.name


def test_the_changelog_has_the_line_where_notes_go() -> None:
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").count(
        "<!-- notes of changes/ are put below -->\n"
    ) == 1
