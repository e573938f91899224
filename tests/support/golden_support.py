"""Cases of a golden file by name, float64 models, and the comparison of a tensor with its summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import formula
import pytest
import torch
from torch import Tensor

EXACT = 1e-9
"""Relative, of float64; a case that says otherwise has its own."""


@contextmanager
def float64() -> Iterator[None]:
    """Make new parameters float64, so that weights are not rounded to float32 as they are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def read(system: str) -> dict[str, Any]:
    """Return the cases of tests/golden/SYSTEM.json by name."""
    path = Path(__file__).parents[1] / "golden" / f"{system}.json"
    return {case["name"]: case for case in json.loads(path.read_text())["cases"]}


def assert_golden(x: Tensor, expected: Mapping[str, Any], tolerance: float = EXACT) -> None:
    """Compare a tensor with its summary: relative to the value, or to the root mean square where that is more."""
    found = formula.summary(x)
    assert found["shape"] == expected["shape"]
    typical = expected["norm"] / sqrt(x.numel())
    assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert found["abs"] == pytest.approx(expected["abs"], rel=tolerance)
    assert found["sum"] == pytest.approx(expected["sum"], abs=tolerance * expected["abs"])
    picked = {place: x.flatten()[int(place)].item() for place in expected["at"]}
    assert picked == pytest.approx(expected["at"], rel=tolerance, abs=tolerance * typical)
