"""The house keeps its shape: light to import, imports point down, files stay short."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "ditkit"
HEAVY = ("diffusers", "transformers", "matplotlib", "peft", "torchmetrics")
LONGEST = 600


def run(*command: str) -> str:
    """Output of a command run from the repository's root, which must exit with 0."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_ditkit_is_light() -> None:
    code = f"import sys, ditkit; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run(sys.executable, "-c", code).split() == []


def test_imports_point_down() -> None:
    run(str(Path(sys.executable).with_name("lint-imports")), "--no-logo")


def test_every_package_has_a_layer() -> None:
    # import-linter does not look at a package that no layer names
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = config["tool"]["importlinter"]["contracts"][0]
    layered = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
    packages = {f"ditkit.{folder.parent.name}" for folder in SOURCE.glob("*/__init__.py")}
    assert layered == packages


def test_no_task_knows_another() -> None:
    tasks = SOURCE / "tasks"
    names = {folder.parent.name for folder in tasks.glob("*/__init__.py")}
    assert {"image", "video", "forecast"} <= names
    for path in tasks.glob("*/task.py"):
        others = names - {path.parent.name}
        text = path.read_text(encoding="utf-8")
        assert [name for name in others if f"ditkit.tasks.{name}" in text] == [], path


def test_files_stay_short() -> None:
    files = [
        path for folder in (SOURCE, ROOT / "tests", ROOT / "benchmarks") for path in folder.rglob("*.py")
    ]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert lengths
    assert {path.relative_to(ROOT): n for path, n in lengths.items() if n > LONGEST} == {}
