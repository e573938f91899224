"""CG-Taylor on DiT against liuxiao-guan/CG-Taylor-DiT: its gate, its decisions, and what it draws."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

from ditkit.caching import ConfidentTaylor, confident_taylor
from ditkit.sample.solvers import Ddim
from golden_support import EXACT, Case, assert_golden, cases, sampled, with_time


@cases("16-cg-taylor")
def test_gate_decisions_and_samples(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    threshold, first, last, warmup = re.findall(r"[\d.]+", case["name"])
    errors: list[float] = []

    def noted(forecast: Tensor, h: Tensor) -> Tensor:
        error = (forecast - h).abs().mean() / h.abs().mean()
        errors.append(error.item())
        return error

    monkeypatch.setattr(confident_taylor, "relative_error", noted)
    policy = ConfidentTaylor(float(threshold), int(first), int(last), int(warmup))
    states, field = sampled(Ddim(), 50, 1.5, "cg.a", [policy])
    (receipt,) = field.trajectory.finish()
    expected = case["results"]
    full = receipt.full("cond+uncond")
    assert (full, len(full)) == (expected["full_evaluations"], expected["number"])
    gated = {str(i): error for i, error in enumerate(errors, start=int(warmup) + 1)}
    # ours is taken in float32, of a difference of nearly equal states
    assert {i: gated[i] for i in expected["first_gate_values"]} == pytest.approx(
        expected["first_gate_values"], rel=1e-4
    )
    assert_golden(states[-1], expected["final"], with_time(EXACT))
