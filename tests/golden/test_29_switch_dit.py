"""Switch-DiT's prior, gate, experts, network and prior loss against byeongjun-park/Switch-DiT."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.model import parameter_count
from ditkit.models.switch_dit import SwitchDiT, SwitchDiTConfig
from ditkit.nn.experts import Experts, choices, chosen
from ditkit.nn.task_windows import prior
from ditkit.train.denoising import NoisyBatch
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.diffusion_prior import DiffusionPrior, costs, divergence, matched
from golden_support import adaln_shapes, assert_golden, float64, read, with_time

CASES = read("29-switch-dit")
TOLERANCE = with_time(1e-6)
EVERY = torch.arange(1000)


@pytest.mark.parametrize("name", CASES["prior"]["expect"])
def test_prior(name: str) -> None:
    expected = CASES["prior"]["expect"][name]
    rows = prior(EVERY, *(int(number) for number in re.findall(r"\d+", name)), alpha=4.0)
    assert set(rows.sum(1).tolist()) == set(expected["ones"])
    first = rows.int().argmax(1)
    assert {t: int(first[int(t)]) for t in expected["offset"]} == expected["offset"]
    assert int(first.sum()) == expected["sum_of_offsets"]


def test_gate_and_experts() -> None:
    case = CASES["router"]
    expected = case["expect"]
    with float64():
        gate, experts = torch.nn.Linear(12, 3), Experts(3, 12)
    named = {
        "f_gate.1.weight": gate.weight,
        "f_gate.1.bias": gate.bias,
        "experts.w": experts.weight,
        "experts.b": experts.bias,
    }
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(formula.weight(name, parameter.shape))
    x, table = (formula.tensor(*case["inputs"][name]) for name in ("x", "task_table"))
    x.requires_grad_(True)
    every = gate(F.silu(table)).softmax(-1)
    p = every[case["inputs"]["t"]]
    values, index = chosen(p, 2)
    assert index.tolist() == expected["topk_index"]
    assert torch.allclose(values, torch.tensor(expected["topk_gate"], dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(p, torch.tensor(expected["probs_active"], dtype=torch.float64), rtol=1e-9)
    assert choices(every, 2).sum(0).tolist() == expected["usage_per_expert_over_all_tasks"]
    assert choices(p, 2).sum(0).tolist() == expected["expert_rows"]
    mask = 1 + experts(x, p, 2)
    assert_golden(mask, expected["mask"])
    mask.square().sum().backward()
    for name, gradient in expected["gradients_of_sum_of_squares"].items():
        assert_golden(named[name].grad, gradient)
    assert_golden(x.grad, expected["gradient_x"])


def published_shapes(constructor: dict[str, int], experts: int) -> dict[str, tuple[int, ...]]:
    shapes, width = adaln_shapes(constructor, outs=8), constructor["hidden_size"]
    for k in range(constructor["depth"]):
        shapes |= {
            f"routers.{k}.f_gate.1.weight": (experts, width),
            f"routers.{k}.f_gate.1.bias": (experts,),
            f"routers.{k}.experts.w": (experts, width, width),
            f"routers.{k}.experts.b": (experts, width),
        }
    return shapes


def wave(rows: int, columns: int, rate: float = 1.0, shift: float = 0.0) -> Tensor:
    """cos(rate (i + 1) (j + 1) + shift), as the cases turn their gates up."""
    i, j = torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)
    return torch.cos(rate * (i * j).double() + shift)


def published() -> SwitchDiT:
    """Return the network of the cases, loaded from its published names, tables of tasks included."""
    constructor = CASES["forward"]["constructor"]["DiT(router=TaskMoE)"]
    state = formula.weights(published_shapes(constructor, 3))
    state["t_embedder.mlp.0.weight"] = wave(24, 256, 0.05) / 4
    state["t_embedder.mlp.2.weight"] = wave(24, 24, 0.7) / 4
    for k in range(3):
        state[f"routers.{k}.f_gate.1.weight"] = wave(3, 24, shift=k)
    tables = {"pos_embed": torch.zeros(1), "full_time": EVERY, "prior._unit_mapping": torch.zeros(1000, 9)}
    config = SwitchDiTConfig(
        size=8, patch=2, channels=4, width=24, depth=3, heads=3, classes=10, convention=DDPM
    )
    with float64():
        return SwitchDiT.from_original({**tables, **state}, config).eval()


def run(model: SwitchDiT, case: dict[str, Any]) -> tuple[Any, Tensor]:
    """Return the output with its tap of the routes, and the tasks."""
    given = case["inputs"]
    label, t = torch.tensor(given["y"]), torch.tensor(given["t"])
    cond = Cond(label=label.clamp(max=9), drop=label == 10)
    found = run_with_taps(model, model, ["route"], (4, 8, 8), formula.tensor(*given["x"]), t.double(), cond)
    return found, t


def test_forward() -> None:
    case = CASES["forward"]
    model = published()
    found, _ = run(model, case)
    assert_golden(found.out.detach(), case["expect"]["output"], TOLERANCE)
    assert parameter_count(model) + 16 * 24 == case["expect"]["parameters"]
    routes = found.taps["route"]
    uses = choices(routes.tasks(), routes.active).sum(0)
    for block, expected in case["expect"]["gates_by_block"].items():
        probabilities = torch.tensor(expected["probs"], dtype=torch.float64)
        assert torch.allclose(routes.p[:, int(block)], probabilities, rtol=TOLERANCE, atol=TOLERANCE)
        assert uses[int(block)].tolist() == expected["tasks_using_each_expert"]


def test_prior_loss() -> None:
    case = CASES["prior-loss"]
    model, expected = published(), case["expect"]
    found, t = run(model, case)
    assert_golden(found.out.detach(), expected["output"], TOLERANCE)
    orders = [torch.tensor(expected[f"permutation_of_{name}_columns"]) for name in ("gate", "prior")]
    routes = found.taps["route"]
    q, table = choices(routes.tasks(), 2).flatten(1), prior(EVERY, 3, 3, 2, 4.0)
    order = matched(q, table, *orders)
    cost = costs(q, table)[torch.arange(9), order].sum()
    assert cost == expected["matching_cost"]
    theirs = orders[1][torch.tensor(expected["matched_prior_column"])]
    assert order[orders[0]].tolist() == theirs.tolist()  # of equal cost another would do as well

    term = DiffusionPrior()
    object.__setattr__(term, "orders", lambda *_: orders)
    x = formula.tensor(*case["inputs"]["x"])
    batch = NoisyBatch(
        path=DDPM.make_path(), convention=DDPM, data=x, noise=x, x=x, t=t, prediction=x, fraction=None,
        taps={"route": routes}, sites=model.sites(),
    )  # fmt: skip
    loss = term.loss(batch).mean()
    assert loss.item() == pytest.approx(expected["aux_loss"], rel=TOLERANCE)
    loss.backward()
    for name, gradient in expected["gradients_of_aux_loss"].items():
        block, kind = model.blocks[int(name.split(".")[1])], name.rpartition(".")[2]
        if "experts" in name:
            assert gradient is None and block.experts.weight.grad is block.experts.bias.grad is None
        else:
            assert_golden(getattr(block.gate, kind).grad, gradient, 10 * TOLERANCE)


def test_divergence() -> None:
    case = CASES["jsd"]
    a, b = (formula.tensor(*case["inputs"][name]).abs() for name in ("a", "b"))
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    assert divergence(a, b).mean().item() == pytest.approx(case["expect"]["loss"], rel=1e-9)
    one, other = torch.eye(12).double()[:3], torch.eye(12).double()[3:6]
    assert divergence(one, other).mean().item() == pytest.approx(case["expect"]["disjoint"], rel=1e-9)
    assert divergence(a, a).mean().item() == case["expect"]["equal"]


def test_parameters() -> None:
    for name, count in CASES["parameters"]["expect"].items():
        with torch.device("meta"):
            model = SwitchDiT.preset(name.removeprefix("DiT-"))
        assert parameter_count(model) == count["trainable"]
        assert count["trainable"] + 256 * model.config.width == count["all"]
