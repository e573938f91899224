"""HarmoniCa's table, mixtures, proxy and training against ModelTC/HarmoniCa."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import formula
from ditkit.api.harmonise import Drawn, Harmonising, ModelProcess, Training, table_of
from ditkit.caching.harmonica import Reused
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.run import Call, Run
from ditkit.models.dit import DiT, DiTConfig
from ditkit.sample import ClassifierFree
from ditkit.sample.sampler import Sampling
from ditkit.sample.solvers import Ddim
from golden_support import adaln_shapes, adaln_state, assert_golden, float64, read, with_time

SYSTEM = "13-harmonica"
TOLERANCE = with_time(1e-6)
SLOPES = with_time(1e-5)
"""Gradients, and what AdamW makes of them."""
TABLE = read(SYSTEM)["schedule and table, T=5"]["results"]
PATHS = read(SYSTEM)["dense, soft and hard DDIM trajectories, T=5"]
PROXY = read(SYSTEM)["image error proxy, T=5"]
TRAINED = read(SYSTEM)["step-wise denoising training, two trajectories, T=5"]


@cache
def network() -> DiT:
    constructor = PATHS["constructor"]
    state = adaln_state(adaln_shapes(constructor, outs=8), final=0.3)
    config = DiTConfig(size=8, patch=2, channels=4, width=24, depth=2, heads=3, classes=10, convention=DDPM)
    with float64():
        return DiT.from_original({"pos_embed": torch.zeros(1), **state}, config).eval().requires_grad_(False)


def training(**changed: object) -> Training:
    """Return the training of the published loop, with the formula's logits."""
    sampling = Sampling(
        steps=5, solver=Ddim(spacing="even"), guidance=ClassifierFree(1.5, channels=3), batch_size=2
    )
    found = Training(ModelProcess(network(), sampling), Harmonising(beta=1e-3, **changed))  # type: ignore[arg-type]
    rows = [nn.Parameter(4 * formula.tensor(f"harm1.prob.{row}", (4,))) for row in (3, 2, 1, 0)]
    found.router.rows, found.router.first = rows, torch.full((4,), 5.0, dtype=torch.float64)
    found.optimizer = torch.optim.AdamW(rows, lr=0.01, weight_decay=0.0)
    return found


def start(process: ModelProcess, name: str = "harm1.x") -> Drawn:
    return process.begin(formula.tensor(name, (2, 4, 8, 8)), Cond(label=torch.tensor([3, 7])))


def test_schedule_and_table() -> None:
    found = training()
    assert [round(1000 * t - 1) for t in reversed(found.process.times)] == TABLE["timestep_map"]
    for row, expected in zip(reversed(found.rates().tolist()), TABLE["r"], strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    table = table_of(found, "DiT", "", "")
    assert [[int(on) for on in row] for row in reversed(table.rows)] == TABLE["compute"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "soft", "hard"])
def test_trajectories(kind: str) -> None:
    found = training()
    process, state = found.process, start(found.process)  # type: ignore[arg-type]
    rates = found.router.rates()
    hard = Reused(found.branches, table_of(found, "DiT", "", "").rows)
    soft = found._session()
    for index in range(5):
        if kind == "hard":

            def run(call: Call) -> Run:
                return Run(hard.enter(call))

            out = process.predict(state, index, run)
            hard.commit()
        else:
            out = found._predict(state, index, soft, None if kind == "dense" else rates[index])
        state = process.step(state, index, out)
    assert_golden(state.x, PATHS["results"][kind], TOLERANCE)


def test_image_error_proxy() -> None:
    found = training()
    weights = found.proxies(start(found.process))  # type: ignore[arg-type]
    expected = {int(row): value for row, value in PROXY["results"]["lambda_by_row"].items()}
    assert weights[0] == 0
    for row, value in expected.items():
        assert weights[4 - row] == pytest.approx(value, rel=1e-4 if value < 1e-9 else TOLERANCE)


def test_step_wise_denoising_training() -> None:
    """Losses, gradients and logits of each step, and what the two trajectories end with."""
    found = training()
    found.weights = [0.0, *(TRAINED["lambda_by_row"][str(row)] for row in (3, 2, 1, 0))]
    steps, finals = iter(TRAINED["results"]["steps"]), []
    states: list[Tensor] = []
    step = found.process.step
    found.process.step = lambda *args: _noted(step(*args), states)  # type: ignore[method-assign]
    for number in range(2):
        for lesson in found.trajectory(start(found.process, f"harm1.x.{number}")):  # type: ignore[arg-type]
            golden, row = next(steps), found.router.rows[lesson.index - 1]
            assert (golden["trajectory"], golden["row"]) == (number, 4 - lesson.index)
            tight = {"rel": TOLERANCE, "abs": 1e-12}
            assert lesson.error == pytest.approx(golden["data_loss"], **tight)
            assert lesson.computed == pytest.approx(golden["sum_r"], **tight)
            assert lesson.loss == pytest.approx(golden["loss"], **tight)
            assert row.grad is not None
            assert row.grad.tolist() == pytest.approx(golden["gradient"], rel=SLOPES, abs=1e-9)
            assert row.tolist() == pytest.approx(golden["prob_after"], rel=SLOPES)
        finals.append(states[-1])
    for x, expected in zip(finals, TRAINED["results"]["final"], strict=True):
        assert_golden(x, expected, TOLERANCE)


def _noted(state: Drawn, states: list[Tensor]) -> Drawn:
    states.append(state.x)
    return state
