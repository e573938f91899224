"""The tests of host views and of `accelerate` on every minor version of diffusers that pyproject.toml supports.

    python tools/parity.py                  # all of them
    python tools/parity.py --versions 0.41  # one of them

Each version, with what it requires, is installed in a folder of its own that comes before the environment's
packages and is gone afterwards. Exits 1 if a test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import tyro
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TESTS = ("hosts/test_*.py", "pipelines/test_*.py")


@dataclass(frozen=True)
class Arguments:
    """What to run.

    Args:
        versions: minor versions of diffusers; none stands for all that are supported.
        select: of the tests, as pytest's -k.
    """

    versions: tuple[str, ...] = ()
    select: str = ""


def main(arguments: Arguments) -> None:
    rows = [run(version, arguments.select) for version in arguments.versions or supported()]
    table = Table(*rows[0], title="host views")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    sys.exit(any(row["failed"] or not row["passed"] for row in rows))


def supported() -> list[str]:
    """Minor versions in the range of the extra `hosts`: of >=0.41,<0.43 these are 0.41 and 0.42."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    wanted = {r.name: r for r in map(Requirement, project["optional-dependencies"]["hosts"])}["diffusers"]
    bounds = {bound.operator: Version(bound.version) for bound in wanted.specifier}
    if bounds.keys() != {">=", "<"}:
        sys.exit(f"pyproject.toml: got {str(wanted)!r}, expected a range such as 'diffusers>=0.41,<0.43'")
    return [f"0.{minor}" for minor in range(bounds[">="].minor, bounds["<"].minor)]


def run(version: str, select: str) -> dict[str, object]:
    """The newest release of a minor version: how many tests passed on it, and the seconds they took."""
    with TemporaryDirectory() as folder:
        packages, report = Path(folder) / "packages", Path(folder) / "report.xml"
        install = ("pip", "install", "-qq", "--disable-pip-version-check", "--target", str(packages))
        python(*install, f"diffusers=={version}.*", check=True)
        paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        beside = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        start = time.perf_counter()
        files = test_files()
        options = ("-m", "not slow", "-k", select, "-p", "no:cacheprovider", f"--junitxml={report}")
        python("pytest", *options, *files, environment=beside)
        seconds = time.perf_counter() - start
        return {"diffusers": release(packages), **counts(report), "seconds": round(seconds)}


def test_files() -> list[str]:
    files = {pattern: sorted(map(str, (ROOT / "tests").glob(pattern))) for pattern in TESTS}
    for pattern, found in files.items():
        if not found:  # pytest would run everything in their place
            sys.exit(f"no file of tests/ is called {pattern}")
    return [path for found in files.values() for path in found]


def python(*module: str, environment: Mapping[str, str] | None = None, check: bool = False) -> None:
    subprocess.run([sys.executable, "-m", *module], cwd=ROOT, env=environment, check=check)


def release(packages: Path) -> str:
    """The version of diffusers that is installed in this folder."""
    (found,) = packages.glob("diffusers-*.dist-info")
    return found.name.split("-")[1].removesuffix(".dist")


def counts(report: Path) -> dict[str, int]:
    """Of the tests in pytest's report."""
    (suite,) = ElementTree.parse(report).getroot()
    tests, *bad, skipped = (int(suite.attrib[n]) for n in ("tests", "failures", "errors", "skipped"))
    return {"passed": tests - sum(bad) - skipped, "failed": sum(bad), "skipped": skipped}


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
