"""Every test: one thread, its own seed, and memory that was never written holds NaN."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

from digits_support import squares

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: pytest-xdist has a worker a core
# a deadline and "too slow" are the machine's, not the code's
hypothesis.settings.register_profile(
    "ditkit", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ditkit")


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same random numbers whichever tests ran before; `torch.empty` holds NaN, as in fla's tests."""
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def nothing_installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No set of this machine is visible, except to the tests on the real packages."""
    if request.node.name.startswith("test_real_"):
        return
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.delenv("DITKIT_DATA", raising=False)
    monkeypatch.setattr("ditkit.data.sets.fashion.DEBIAN_FOLDER", elsewhere / "absent")


@pytest.fixture
def drawn_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving digits without their download: squares bounce."""
    monkeypatch.setattr("ditkit.data.sets.moving_digits.read_digits", squares)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with Ctrl-C ignored, and CI may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


BUDGET_SECONDS = 25.0
"""Processor time that a system's tests may take, that of the processes they start included."""
BEGAN: pytest.StashKey[float] = pytest.StashKey()
SPENT = "core_seconds"


def core_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = core_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and BEGAN in item.stash:
        report.user_properties.append((SPENT, core_seconds() - item.stash[BEGAN]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the core-seconds of each system's tests, those above the budget marked; of systems that ran."""
    from ditkit.core.catalog import every
    from ditkit.core.model import Model
    from ditkit.systems.rows import load

    spent = {
        report.nodeid: seconds
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, seconds in getattr(report, "user_properties", ())
        if name == SPENT
    }
    systems = load()
    named = {system.stem: {c.partition(":")[2].lower() for c in system.components} for system in systems}
    everyone = set().union(*named.values(), (kind.__name__.lower() for kind in every(Model)))  # type: ignore[type-abstract]
    rows = []
    for system in systems:
        own, others = named[system.stem], everyone - named[system.stem]
        seconds = sum(
            spent[node]
            for node in spent
            if any(_is_of(node, test) for test in system.tests) and not _is_of_others(node, own, others)
        )
        if seconds >= 1:
            rows.append((seconds, f"{seconds:6.1f} s  {system.number:>2} {system.name}"))
    if rows:
        terminalreporter.section(f"tests of systems, {BUDGET_SECONDS:g} core-seconds each at most", sep="-")
        for seconds, line in sorted(rows, reverse=True):
            terminalreporter.line(line + ("  over" if seconds > BUDGET_SECONDS else ""))


def _is_of(nodeid: str, test: str) -> bool:
    """Return whether a test belongs to an entry of a row, a file or FILE::name."""
    return nodeid == test or nodeid.startswith((test + "::", test + "["))


def _is_of_others(nodeid: str, own: set[str], others: set[str]) -> bool:
    """Return whether a contract test, which runs over whole families, has another system's component for its case."""
    cases = set(nodeid.partition("[")[2].removesuffix("]").lower().split("-"))
    return bool(cases & others) and not cases & own
