"""DyDiT's gates, masks, budget and losses against alibaba-damo-academy/DyDiT, and its older release."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.compress import DyDiT, dydit
from ditkit.compress.dydit import Routers, load_routers, split_original
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.run import Site, named
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.routes import Route, Routed
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Batch
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import Output, run_with_taps
from ditkit.train.teacher import Answer
from ditkit.train.terms import variational_bound
from ditkit.train.terms.budget import Budget, work_share
from ditkit.train.terms.complete_model import CompleteModel
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from ditkit.train.timesteps import Stratified
from golden_support import adaln_shapes, approximate_likelihood, assert_golden, float64, read, with_time

SYSTEM, FIRST_RELEASE = "08-dydit", "08-dydit-v1"
TOLERANCE = with_time(1e-6)
DEPTH, WIDTH, HEADS = 3, 32, 4


def network(policy: DyDiT) -> DiT:
    constructor = read(SYSTEM)["forward"]["constructor"]["DiT"]
    assert constructor == read(FIRST_RELEASE)["forward"]["constructor"]["DiT"]
    gates = HEADS - policy.keeps_first
    shapes = adaln_shapes(constructor, outs=8)
    for i in range(DEPTH):
        for name, outs in (("attn_rate.router", gates), ("mlp_rate.router", gates)):
            shapes |= {f"blocks.{i}.{name}.weight": (outs, WIDTH), f"blocks.{i}.{name}.bias": (outs,)}
        for name, (outs, ins) in {"0": (WIDTH // 16, WIDTH), "2": (1, WIDTH // 16)}.items():
            head = f"blocks.{i}.token_selection.mlp_head.{name}"
            shapes |= {f"{head}.weight": (outs, ins), f"{head}.bias": (outs,)}
    state = {name: formula.weight(name, shape) for name, shape in shapes.items()}
    for name, value in state.items():
        if wave := waves(name):
            scale, factor, k = wave
            rows = [
                [cos(factor * (i + 1) * (j + 1) + k) * scale for j in range(value.shape[1])]
                for i in range(value.shape[0])
            ]
            state[name] = torch.tensor(rows, dtype=torch.float64)
    base, routers = split_original(state)
    config = DiTConfig(size=8, patch=2, channels=4, width=WIDTH, depth=DEPTH, heads=HEADS, classes=10)
    with float64():
        model = DiT.from_original({"pos_embed": torch.zeros(1), **base}, config).adopt([policy]).eval()
    load_routers(model, routers)
    return model


def waves(name: str) -> tuple[float, float, int] | None:
    """Scale, factor and phase of the cosine that stands for the formula, so that gates vary with t."""
    if name.startswith("t_embedder.mlp.") and name.endswith("weight"):
        return 0.25, 0.05 if ".0." in name else 0.7, 0
    if name.endswith("_rate.router.weight"):
        return 1.0, 1.0 if "attn_rate" in name else 1.3, int(name.split(".")[1])
    return None


def told(labels: list[int], drop: bool = True) -> Cond:
    label = torch.tensor(labels)
    return Cond(label=label.clamp(max=9), drop=(label == 10) & drop)


def called(model: DiT, case: Mapping[str, Any], policies: Any = None) -> Output:
    given = case["inputs"]
    routes = named(model.sites(), "choice") if policies is None else []
    t = torch.tensor(given["t"])
    x, cond = formula.tensor(*given["x"]), told(given["y"])
    return run_with_taps(
        model, model, routes, (4, 8, 8), x, t.double(), cond, times=(t + 1) / 1000, policies=policies
    )


def strings(mask: Tensor) -> list[str]:
    return ["".join(str(int(on)) for on in row) for row in mask.flatten(1)]


def check_masks(found: Output, expect: Mapping[str, Any]) -> None:
    routes = [found.taps[f"blocks.{i}.{branch}.route"] for branch in ("attn", "mlp") for i in range(DEPTH)]
    columns = {
        "attention_head_masks": [r.group_mask for r in routes[:DEPTH]],
        "mlp_group_masks": [r.group_mask for r in routes[DEPTH:]],
        "token_masks": [r.row_mask for r in routes[DEPTH:]],
    }
    for name, masks in columns.items():
        assert [list(row) for row in zip(*map(strings, masks), strict=True)] == expect[name]


@pytest.mark.parametrize("system", [SYSTEM, FIRST_RELEASE])
def test_forward(system: str) -> None:
    """The first release routes all heads, and a block may lose all of them."""
    case = read(system)["forward"]
    found = called(network(DyDiT(keeps_first=system == SYSTEM)), case)
    check_masks(found, case["expect"])
    assert_golden(found.out, case["expect"]["output_float32_tables"], TOLERANCE)


def test_complete_model() -> None:
    case, model = read(SYSTEM)["forward-complete"], network(DyDiT())
    for policies in ((), (DyDiT().exact(),)):
        assert_golden(called(model, case, policies).out, case["expect"]["output_float32_tables"], TOLERANCE)


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let the k-th draw of Gumbel noise be the formula's tensor gumbel<k>."""
    shapes: list[list[int]] = []

    def noise(like: Tensor) -> Tensor:
        shapes.append(list(like.shape))
        return formula.tensor(f"gumbel{len(shapes) - 1}", like.shape)

    monkeypatch.setattr(dydit, "gumbel", noise)
    return shapes


def test_forward_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = read(SYSTEM)["forward-train"], network(DyDiT()).train()
    shapes = drawn(monkeypatch)
    found = called(model, case)
    assert shapes[:6] == case["expect"]["gumbel_shapes"] and len(shapes) == case["expect"]["gumbel_calls"]
    check_masks(found, case["expect"])
    assert_golden(found.out, case["expect"]["output_float32_tables"], TOLERANCE)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gates(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = read(SYSTEM)["gates"]
    block = Routed(Site("a", "choice", width=16, heads=4), Site("b", "choice", width=16), 64)
    with float64():
        routers = Routers(DyDiT(), block, (16, 48), (16, 16), tokens=True).train(mode == "train")
    names = {"width": "router", "tokens.0": "mlp_head.0", "tokens.2": "mlp_head.2"}
    state = {
        f"{ours}.{kind}": formula.weight(
            f"{name}.{kind}", routers.get_submodule(ours).get_parameter(kind).shape
        )
        for ours, name in names.items()
        for kind in ("weight", "bias")
    }
    routers.load_state_dict(state)
    drawn(monkeypatch)
    te, x, up = (formula.tensor(*case["inputs"][name]) for name in ("te", "x", "up"))
    te.requires_grad_(True)
    mask, expect = routers.groups(te), case["expect"][mode]
    assert mask is not None and (mask[:, 0] == 1).all()
    assert mask[:, 1:].tolist() == expect["router_mask"]
    (mask[:, 1:] * up).sum().backward()
    assert te.grad is not None
    assert_golden(te.grad, expect["gradient_wrt_input"])
    assert_golden(routers.tokens(x), expect["token_logits"])
    rows = routers.rows(x)
    assert rows is not None and rows.squeeze(-1).tolist() == expect["token_mask"]


def routed(layers: int, width: int, heads: int) -> list[Site]:
    """Sites of a network of which only the routes matter."""
    return [
        site
        for i in range(layers)
        for site in (
            Site(f"{i}.attn", "choice", width=width, heads=heads),
            Site(f"{i}.mlp", "choice", width=width),
            Site(f"{i}.inner", "inner", width=4 * width),
        )
    ]


@pytest.mark.parametrize("name", [n for n in read(SYSTEM)["budget"]["expect"] if "minimal (0,0)" in n])
def test_budget(name: str) -> None:
    expect = read(SYSTEM)["budget"]["expect"][name]
    target, batch, layers, heads, tokens = (
        (0.5, 3, 28, 16, 8) if name.startswith("XL") else (0.7, 2, 12, 6, 5)
    )
    width = 1152 if name.startswith("XL") else 384
    shapes = {
        "attn_mask": (batch, layers, heads),
        "mlp_mask": (batch, layers, heads),
        "token_mask": (batch, layers, tokens, 1),
    }
    masks = {key: (formula.tensor(key, shape) > 0).double().requires_grad_() for key, shape in shapes.items()}
    assert [mask.sum().item() for mask in masks.values()] == expect["ones"]
    sites, taps = routed(layers, width, heads), {}
    for i in range(layers):
        taps[f"{i}.attn"] = Route(heads, group_mask=masks["attn_mask"][:, i])
        taps[f"{i}.mlp"] = Route(
            heads, group_mask=masks["mlp_mask"][:, i], row_mask=masks["token_mask"][:, i]
        )
        taps[f"{i}.attn:in"] = torch.empty(1, 1, 1).expand(batch, 256, width)
    data = torch.zeros(batch, 1, dtype=torch.float64)
    term = Budget(target=target, warmup=1, hold=0)
    given = Batch(data=data, prediction=data, taps=taps, sites=sites, step=10)
    loss = 2.0 * term.loss(given).mean()
    assert loss.item() == pytest.approx(expect["loss"], rel=1e-9)
    assert work_share(given).mean().item() == pytest.approx(expect["mean_ratio"], rel=1e-9)
    for found, golden in zip(
        torch.autograd.grad(loss, list(masks.values())), expect["gradients"], strict=True
    ):
        assert_golden(found, golden)


@pytest.mark.parametrize(("size", "width"), [("DiT-S/2", 384), ("DiT-B/2", 768), ("DiT-XL/2", 1152)])
def test_work_of_a_block(size: str, width: int) -> None:
    golden = read(SYSTEM)["budget"]["expect"]["constants_GMAC"][size]
    (block,) = [Routed(a, b, c.width) for a, b, c in [routed(1, width, 2)]]
    assert block.work(256) == (round(golden["attn"] * 1e9), round(golden["mlp"] * 1e9))


def test_target_falls_and_jumps_onto_its_line() -> None:
    for name, values in read(SYSTEM)["target-schedule"]["expect"].items():
        target, warmup = name.split("_")
        term = Budget(target=float(target), warmup=int(warmup))
        assert {s: term.target_at(int(s)) for s in values} == pytest.approx(values, rel=1e-12)


def test_times_are_stratified() -> None:
    lower = read(SYSTEM)["time-strata"]["expect"]["lower_bound"]
    zeros = torch.zeros(len(lower), dtype=torch.float64)
    times, _ = Stratified(4).uniforms(zeros, SampleRNG(0, 0, range(len(lower))), torch.Size([len(lower)]))
    assert (times * 1000).tolist() == lower


def test_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variational_bound, "discretised_log_likelihood", approximate_likelihood)
    case, model = read(SYSTEM)["losses"], network(DyDiT())
    data, noise = (formula.tensor(*case["inputs"][name]) for name in ("x0", "eps"))
    t, path = torch.tensor(case["inputs"]["t"]), DDPM.make_path()
    x, cond = path.mix(data, noise, t.double()), Cond(label=torch.arange(3))
    (prediction, fraction), whole = (
        DDPM.split(
            run_with_taps(model, model, (), (4, 8, 8), x, t.double(), cond, policies=policies).out.detach()
        )
        for policies in (None, ())
    )
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=noise, x=x, t=t, prediction=prediction, fraction=fraction,
        taught=Answer(whole[0], {}, whole[1]), taps={},
    )  # fmt: skip
    expect = case["expect"]
    mse, vb = (term.loss(batch) for term in (Regression(), VariationalBound()))
    assert mse.tolist() == pytest.approx(expect["mse"], rel=TOLERANCE)
    assert vb.tolist() == pytest.approx(expect["vb"], rel=TOLERANCE)
    assert (mse + vb).tolist() == pytest.approx(expect["loss"], rel=TOLERANCE)
    complete = [a + b for a, b in zip(expect["complete_mse"], expect["complete_vb"], strict=True)]
    assert CompleteModel().loss(batch).tolist() == pytest.approx(complete, rel=TOLERANCE)


def test_fresh_routers() -> None:
    expect = read(SYSTEM)["fresh"]["expect"]
    model = DiT(DiTConfig(size=8, patch=2, channels=4, width=WIDTH, depth=2, heads=HEADS, classes=10))
    learned: Any = model.adopt([DyDiT()]).eval().learned["DyDiT"]
    attn, mlp = learned["blocks/0/attn/route"], learned["blocks/0/mlp/route"]
    assert set(attn.width.bias.tolist()) == {expect["attn_rate_bias"]}
    assert set(mlp.width.bias.tolist()) == {expect["mlp_rate_bias"]} and mlp.tokens[2].bias.item() == 35
    assert attn.width.out_features == expect["router_outputs"] and attn.width.weight.std() > 0
    assert attn.groups(torch.randn(8, WIDTH)).all() and mlp.rows(torch.randn(2, 5, WIDTH)).all()


@pytest.mark.parametrize("system", [SYSTEM, FIRST_RELEASE])
def test_parameters(system: str) -> None:
    """The published models hold their position table, too."""
    for name, count in read(system)["parameters"]["expect"].items():
        with torch.device("meta"):
            model = DiT.preset(name.removeprefix("DiT-"))
            model.adopt([DyDiT(keeps_first=system == SYSTEM)])
            assert sum(p.numel() for p in model.parameters()) == count["trainable"]
            assert count["all"] - count["trainable"] == 256 * model.config.width
