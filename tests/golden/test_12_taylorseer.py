"""TaylorSeer on DiT, DDIM and ancestral, against Shenyi-Z/TaylorSeer."""

from __future__ import annotations

import re
from typing import Any

from ditkit.caching import TaylorSeer
from ditkit.sample.solvers import Ancestral, Ddim
from golden_support import EXACT, Case, assert_golden, cases, sampled, with_time

SYSTEM = "12-taylorseer"


def policy_of(case: Case) -> TaylorSeer:
    interval, order = map(int, re.findall(r"[NO]=(\d+)", case["name"]))
    return TaylorSeer(interval, order, warmup=2)


def check(case: Case, solver: Any, steps: int, start: str) -> None:
    states, field = sampled(solver, steps, case["cfg_scale"], start, [policy_of(case)], noise=start)
    (receipt,) = field.trajectory.finish()
    assert receipt.full("cond+uncond") == case["results"]["full_evaluations"]
    assert_golden(states[-1], case["results"]["final"], with_time(EXACT))


@cases(SYSTEM, lambda case: "'ddim50'" in case["name"])
def test_ddim(case: Case) -> None:
    check(case, Ddim(), 50, "ts.a")


@cases(SYSTEM, lambda case: "DDIM '50'" in case["name"])
def test_ddim_from_the_last_step(case: Case) -> None:
    check(case, Ddim(spacing="even"), 50, "ts.a")


@cases(SYSTEM, lambda case: "ancestral" in case["name"])
def test_ancestral(case: Case) -> None:
    check(case, Ancestral(), 20, "ts.d")
