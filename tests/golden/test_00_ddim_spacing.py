"""DDPM's respaced tables, and DDIM over them, against facebookresearch/DiT."""

from __future__ import annotations

import pytest

from ditkit.core.ddpm import DiscretePath
from ditkit.sample.solvers import Ddim
from golden_support import EXACT, Case, assert_golden, cases, read, sampled, with_time

TABLES = read("00-ddim-spacing")["spaced timesteps and tables of create_diffusion"]["results"]


@pytest.mark.parametrize("spacing", TABLES)
def test_respaced_tables(spacing: str) -> None:
    """ "50" has equal fractional strides and ends at 999, "ddim50" one integer stride."""
    whole, expected = DiscretePath.linear(), TABLES[spacing]
    count = int(spacing.removeprefix("ddim"))
    index = whole.strided(count) if spacing.startswith("ddim") else whole.evenly(count)
    assert index.tolist() == expected["timesteps"]
    path = whole.respaced(index)
    assert path.abar[[0, -1]].tolist() == pytest.approx(expected["alpha_bar_first_and_last"], rel=EXACT)
    assert path.abar.sum().item() == pytest.approx(expected["alpha_bar_sum"], rel=EXACT)
    assert path.beta[-1].item() == pytest.approx(expected["beta_last"], rel=EXACT)


@cases("00-ddim-spacing", lambda case: "DDIM" in case["name"])
def test_ddim(case: Case) -> None:
    solver = Ddim() if "ddim50" in case["name"] else Ddim(spacing="even")
    states, _ = sampled(solver, 50, 4.0, "dd.z")
    for step, expected in case["results"].items():
        assert_golden(states[int(step.split()[-1])], expected, with_time(EXACT))
