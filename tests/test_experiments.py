"""The experiments of the specifications, each the command of `benchmarks/` that records it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_baselines_on_toy_latents(monkeypatch):
    """Fewer MACs, worse loss; the average beats the last weights; guidance raises class accuracy."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    eight, four, two = runpy.run_path(str(BENCHMARKS / "baselines.py"))["rows"](1500)
    assert eight["macs"] < four["macs"] < two["macs"]
    assert eight["loss_averaged"] > four["loss_averaged"] > two["loss_averaged"]
    for row in (eight, four, two):
        assert row["loss_averaged"] < row["loss"]
    assert two["accuracy_guidance_1.0"] < two["accuracy_guidance_2.0"] < two["accuracy_guidance_4.0"]
