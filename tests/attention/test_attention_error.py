"""The harness of `benchmarks/attention_error.py` on a tiny clip model, and the controls that it draws."""

from __future__ import annotations

import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditkit.core.grid import Grid
from ditkit.core.policy import Policy
from ditkit.models.video_dit import VideoDiT
from ditkit.sample import Sampler
from patterns_support import planned_mask, tiny_clip_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from attention_controls import BestBlocks, Diagonal, RandomBlocks, Reuse
from attention_error import PATTERNS, Arguments, experiment, forced, shown

STEPS = 6
GRID = Grid(4, 6, 8)


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    return tiny_clip_model(size=(12, 16)).float()


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("each", [1, 3, 24])
@pytest.mark.parametrize("control", [RandomBlocks, Diagonal])
def test_blocks_have_as_many_others_and_themselves(
    control: type[RandomBlocks] | type[Diagonal], each: int, others: int
) -> None:
    pairs = planned_mask(control(each=each, block=8).plan(GRID, others))
    blocks = pairs[: GRID.length, : GRID.length].view(24, 8, 24, 8).transpose(1, 2)
    assert torch.equal(blocks.any((2, 3)), blocks.all(3).all(2))
    assert (blocks.any((2, 3)).sum(1) == each).all() and blocks.any((2, 3)).diagonal().all()
    assert pairs[GRID.length :].all() and pairs[:, GRID.length :].all()


def test_a_diagonal_is_that_of_the_sequence() -> None:
    chosen = Diagonal(each=3).chosen(5)
    assert chosen.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]


def test_the_best_blocks_keep_most_of_the_softmax() -> None:
    """Against every choice of two blocks of five, one query block and head at a time; the last block is padded."""
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, 2, 40, 4, generator=generator) for _ in range(2))
    control = BestBlocks(each=2, block=8)
    plan = control.plan(Grid(1, 6, 6), 0)  # 36 tokens in 40 slots
    kept = control.kept(plan, plan.queries, q, k)
    assert kept.shape == (2, 2, 5, 5) and (kept.sum(-1) == 2).all()
    mass = (q @ k[:, :, :36].mT / 2).softmax(-1)
    parts = [range(8 * i, min(8 * i + 8, 36)) for i in range(5)]
    for b, n, i in product(range(2), range(2), range(5)):
        of_blocks = [float(mass[b, n][list(parts[i])][:, list(part)].sum()) for part in parts]
        best = max(combinations(range(5), 2), key=lambda two: sum(of_blocks[j] for j in two))
        assert tuple(kept[b, n, i].nonzero().flatten().tolist()) == best


def drawn(model: VideoDiT, *policies: Policy) -> Tensor:
    return Sampler.of(model, steps=STEPS, guidance=1.0, batch_size=1).draw(policies=policies).samples


def test_reuse_computes_as_often_as_it_says(model: VideoDiT) -> None:
    dense = drawn(model)
    assert torch.equal(drawn(model, Reuse(0)), dense)
    work = Sampler.of(model, steps=STEPS, guidance=1.0, batch_size=1).draw(policies=[Reuse(2)])
    (receipt,) = work.receipts
    assert receipt.as_dict()["lanes"] == {"cond": {"computed": "0 3", "reused": "1-2 4-5"}}
    assert not torch.allclose(work.samples, dense, atol=1e-3)


def test_rows_stand_beside_controls_that_cost_as_much(model: VideoDiT) -> None:
    static, warmed = "grouped:group=2+2+2,block=8,reach=0", "grouped:group=2+2+2,block=8,reach=0,warmup=4"
    arguments = Arguments(
        patterns=(static, warmed), count=1, steps=STEPS, converged_steps=STEPS + 1, rounds=1
    )
    first, second = experiment(model, arguments)
    assert first["visited_share"] == first["pairs_share"] == 1 / 24
    assert first["attention_share"] == pytest.approx(1 / 24)
    assert second["attention_share"] == pytest.approx((4 + 2 / 24) / 6)
    assert (first["control_blocks_share"], second["control_blocks_share"]) == (1 / 24, 16 / 24)
    assert (first["reuse_dense_evaluations"], second["reuse_dense_evaluations"]) == (1, 4)
    for row in (first, second):
        assert row["macs_share"] < 1 and row["seconds"] > 0
        assert all(row[key] > 0 for key in row if key.endswith("_db") and not key.startswith("tuned"))
    assert second["psnr_db"] > first["psnr_db"]
    assert shown(first)["pattern"] == "grouped:block=8,reach=0,group=2+2+2"


def test_a_student_stands_beside_its_teacher(model: VideoDiT, tmp_path: Path, monkeypatch) -> None:
    """One that learned nothing is as far from the dense run as its teacher under the pattern."""
    text = "grouped:group=2+2+2,block=8,reach=0"
    student = model.holding(model.config, model.state_dict(), "a copy", [forced(text)])
    arguments = Arguments(
        patterns=(),
        students=(str(student.save(tmp_path)),),
        count=1,
        steps=STEPS,
        converged_steps=7,
        rounds=1,
    )
    (row,) = experiment(model, arguments)
    assert row["tuned_psnr_db"] == pytest.approx(row["psnr_db"], abs=1e-3)


def test_patterns_skip_also_where_it_does_not_pay() -> None:
    assert {forced(text).kernel for text in PATTERNS} == {"cpu"}
    assert forced("grouped").kernel == "cpu" and forced("grouped:kernel=reference").kernel == "reference"


@pytest.mark.parametrize("text", PATTERNS)
def test_every_pattern_has_a_plan_for_the_model_it_is_meant_for(text: str) -> None:
    plan = forced(text).plan(Grid(16, 8, 8), 0)
    assert plan.queries == 1024 and 0 < plan.density < 0.7
