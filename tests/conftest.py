"""Every test: one thread, its own seed, and memory that was never written holds NaN."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


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
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with Ctrl-C ignored, and CI may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
