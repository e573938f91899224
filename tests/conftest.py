"""Every test: one thread, its own seed, and memory that was never written holds NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same random numbers whichever tests ran before; `torch.empty` is filled with NaN (after fla's conftest)."""
    torch.manual_seed(0)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
