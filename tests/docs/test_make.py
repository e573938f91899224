"""The targets of the Makefile say in one line why they cannot start, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    alone = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # make runs the tests
    return subprocess.run(
        ["make", *words], cwd=folder, env=alone, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment that stands, whose command of the demo is a plain one."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "ditkit").write_text("#!/bin/sh\necho drawn\n")
    (binaries / "ditkit").chmod(0o755)
    (tmp_path / ".venv" / ".base").write_text("")
    return tmp_path


def test_a_demo_runs_once_at_a_time(clone: Path) -> None:
    (clone / ".make-lock").mkdir()
    second = make(clone, "demo")
    assert second.returncode != 0 and second.stdout == ""
    assert second.stderr.splitlines()[0] == "make: another make runs here (if none does: rmdir .make-lock)"
    assert (clone / ".make-lock").is_dir()  # the first one's

    (clone / ".make-lock").rmdir()
    assert make(clone, "demo").stdout == "drawn\n"
    assert not (clone / ".make-lock").exists()


def test_a_demo_that_fails_gives_the_lock_back(clone: Path) -> None:
    (clone / ".venv" / "bin" / "ditkit").write_text("#!/bin/sh\nexit 3\n")
    assert make(clone, "demo").returncode != 0
    assert not (clone / ".make-lock").exists()


def test_an_older_python_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(
        SystemExit, match=r"^ditkit needs Python 3.11 or newer, this is 3.9; try make PYTHON="
    ):
        tool("check_machine").main()


def test_too_little_space_is_one_line_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(SystemExit, match=r"^ditkit needs about 4 GB of disk here, and 1.0 GB are free$"):
        tool("check_machine").main()


def test_an_environment_begins_with_the_check(clone: Path) -> None:
    shutil.rmtree(clone / ".venv")
    (clone / "tools").mkdir()
    (clone / "tools" / "check_machine.py").write_text("import sys\nsys.exit('too little')\n")
    stopped = make(clone, "demo", f"PYTHON={sys.executable}")
    assert stopped.returncode != 0 and stopped.stderr.splitlines()[0] == "too little"
    assert not (clone / ".venv").exists() and not (clone / ".make-lock").exists()


def test_parity_runs_the_tests_of_hosts_and_pipelines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that fits no file would have pytest run the whole suite."""
    parity = tool("parity")
    found = {Path(path).relative_to(ROOT / "tests").parts[0] for path in parity.test_files()}
    assert found == {"hosts", "pipelines"}
    monkeypatch.setattr(parity, "TESTS", ("test_flux*.py",))
    with pytest.raises(SystemExit, match=r"no file of tests/ is called test_flux\*.py"):
        parity.test_files()
