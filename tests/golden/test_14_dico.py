"""DiCo against shallowdream204/DiCo, on weights by formula under the published names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.run import DIRECT, Run
from ditkit.models.dico import SIZES, DiCo, DiCoBlock, DiCoConfig, renamed
from ditkit.nn.convolution import to_map, to_rows
from ditkit.nn.stages import Downsample, Upsample
from ditkit.sample.guidance import ClassifierFree
from golden_support import assert_golden, float64, read

CASES = read("14-dico")
IN_FLOAT32 = 1e-6
"""The published sinusoid is float32, as ours is; each case has it so, and in float64."""


def exact_sinusoid(t: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    angle = t[:, None] * period ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angle.cos(), angle.sin()], -1)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.nn.embeddings.sinusoid", exact_sinusoid)


LEVELS = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")


def block_shapes(width: int, ratio: int) -> dict[str, tuple[int, ...]]:
    layers: dict[str, tuple[int, ...]] = {
        "conv1": (width, width, 1, 1),
        "conv2": (width, 1, 3, 3),
        "conv3": (width, width, 1, 1),
        "ca.1": (width, width, 1, 1),
        "conv4": (ratio * width, width, 1, 1),
        "conv5": (width, ratio * width, 1, 1),
        "adaLN_modulation.1": (6 * width, width),
    }
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def published_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published DiCo by name."""
    D, channels = c["hidden_size"], c["in_channels"]
    layers: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (D, channels, 3, 3),
        "reduce_chan_level2": (2 * D, 4 * D, 1, 1),
        "reduce_chan_level1": (2 * D, 2 * D, 1, 1),
        "final_layer.out_proj": (2 * channels, 2 * D, 3, 3),
        "final_layer.adaLN_modulation.1": (4 * D, 2 * D),
    }
    for i in range(3):
        layers[f"t_embedder_{i + 1}.mlp.0"] = (D << i, 256)
        layers[f"t_embedder_{i + 1}.mlp.2"] = (D << i, D << i)
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    for i in range(3):
        shapes[f"y_embedder.embedding_table_{i}.weight"] = (c["num_classes"] + 1, D << i)
    for name, width in (("down1_2", D), ("down2_3", 2 * D)):
        shapes[f"{name}.body.0.weight"] = (width // 2, width, 3, 3)
    for name, width in (("up3_2", 4 * D), ("up2_1", 2 * D)):
        shapes[f"{name}.body.0.weight"] = (2 * width, width, 3, 3)
    for level, width, depth in zip(LEVELS, (D, 2 * D, 4 * D, 2 * D, 2 * D), c["depth"], strict=True):
        for i in range(depth):
            shapes |= {f"{level}.{i}.{k}": v for k, v in block_shapes(width, c["mlp_ratio"]).items()}
    return shapes


def published(case: dict[str, Any]) -> DiCo:
    c = case["constructor"]["DiCo"]
    config = DiCoConfig(
        size=8,
        channels=c["in_channels"],
        width=c["hidden_size"],
        depth=tuple(c["depth"]),
        ratio=c["mlp_ratio"],
        classes=c["num_classes"],
    )
    with float64():
        return DiCo.from_original(formula.weights(published_shapes(c)), config).eval()


def test_the_forward_pass_with_times_in_float32() -> None:
    case = CASES["forward"]
    x, label = formula.tensor("x", case["inputs"]["x"][1]), torch.tensor(case["inputs"]["y"])
    with torch.no_grad():
        out = published(case)(x, torch.tensor(case["inputs"]["t"]), Cond(label=label))
    assert_golden(out, case["expect"]["output_float32_sinusoid"], IN_FLOAT32)


@pytest.mark.usefixtures("in_float64")
def test_the_forward_pass_and_what_flows_between_levels() -> None:
    case = CASES["forward"]
    model, expected = published(case), case["expect"]
    assert parameter_count(model) == expected["parameters"]
    outs: dict[str, Tensor] = {}

    def noted(name: str) -> Any:
        def handler(fn: Any, *args: Any) -> Any:
            outs[name] = fn(*args)
            return outs[name]

        return handler

    run = Run({name: noted(name) for name in ("down.0", "down.1", "up.0", "up.1")})
    gates: list[Tensor] = []
    gate = model.levels[2][0].conv.attention
    gate.register_forward_hook(lambda module, given, _: gates.append(module.gate(*given)))
    x, label = formula.tensor("x", case["inputs"]["x"][1]), torch.tensor(case["inputs"]["y"])
    with torch.no_grad():
        out = model(x, torch.tensor(case["inputs"]["t"]).double(), Cond(label=label), run)
    assert_golden(out, expected["output"])
    grids = {"down1_2": ("down.0", (4, 6)), "down2_3": ("down.1", (2, 3))}
    grids |= {"reduce_chan_level2": ("up.0", (4, 6)), "reduce_chan_level1": ("up.1", (8, 12))}
    for theirs, (ours, sides) in grids.items():
        assert_golden(to_map(outs[ours].x, Grid(1, *sides)), expected["taps"][theirs])
    gated = expected["taps"]["channel_gate_of_first_bottleneck_block"]
    assert_golden(gates[0].mT[..., None], gated)


@pytest.mark.usefixtures("in_float64")
def test_guidance_on_the_first_three_channels() -> None:
    case = CASES["guided"]
    model = published(case)
    half = formula.tensor("x", case["inputs"]["x"][1])[:2]
    t = torch.tensor(case["inputs"]["t"][:2]).double()

    def branches(*names: str) -> tuple[Tensor, ...]:
        told = {"cond": torch.tensor([4, 7]), "uncond": torch.tensor([10, 10])}
        return tuple(model(half, t, Cond(label=told[name]))[:, :4] for name in names)

    with torch.no_grad():
        guided = ClassifierFree(1.4, channels=3)(branches, 0.5)
        rest = [model(half, t, Cond(label=label)) for label in (torch.tensor([4, 7]), torch.tensor([10, 10]))]
    # the published code guides both halves of its batch, and returns the unguided channels of each
    whole = torch.cat([torch.cat([guided[:, :3], out[:, 3:]], 1) for out in rest])
    assert_golden(whole, case["expect"]["output"])


def test_a_block_its_gate_and_its_gradients() -> None:
    case = CASES["block"]
    expected, shapes = case["expect"], block_shapes(8, 2)
    level = "encoder_level_1.0."
    state = renamed({level + name: formula.weight(name, shape) for name, shape in shapes.items()})
    block = DiCoBlock(8, 2).double()
    block.load_state_dict({name.removeprefix("levels.0.0."): value for name, value in state.items()})
    x, c = (formula.tensor(name, case["inputs"][name][1]) for name in ("x", "c"))
    gates: list[Tensor] = []
    block.conv.attention.register_forward_hook(lambda module, given, _: gates.append(module.gate(*given)))
    grid = Grid(1, 6, 4)
    out = block(to_rows(x), c, grid, DIRECT, "block")
    assert_golden(to_map(out, grid), expected["output"])
    assert_golden(gates[0].mT[..., None], expected["channel_gate"])
    out.square().sum().backward()
    ours = {
        "conv1.bias": block.conv.inner.bias,
        "conv2.weight": block.conv.depthwise.weight,
        "ca.1.weight": block.conv.attention.project.weight,
        "adaLN_modulation.1.weight": block.modulation.weight,
    }
    for name, gradient in expected["gradients_of_sum_of_squares"].items():
        assert ours[name].grad is not None
        assert_golden(ours[name].grad.reshape(gradient["shape"]), gradient)


def test_one_decision_drops_a_label_in_all_tables() -> None:
    case = CASES["labels-dropped"]
    config = replace(DiCoConfig.tiny(), width=4, classes=6)
    with float64():
        model = DiCo(config)
    with torch.no_grad():
        for i, table in enumerate(model.label):
            table.weight.copy_(formula.weight(f"embedding_table_{i}.weight", tuple(table.weight.shape)))
        for time in model.time:
            time.outer.weight.zero_()
    cond = Cond(label=torch.tensor(case["inputs"]["labels"]), drop=torch.tensor([False, True, False, True]))
    told = model.condition(torch.zeros(4), cond)
    assert case["expect"]["tables_rows"] == len(model.label[0].weight)
    for table, vector, expected in zip(model.label, told, case["expect"]["embeddings"], strict=True):
        assert_golden(vector, expected)
        assert torch.equal(vector[1], table.weight[-1])


@pytest.mark.parametrize(("name", "layer", "key"), [("x", Downsample(4), "down"), ("y", Upsample(8), "up")])
def test_resampling(name: str, layer: Downsample | Upsample, key: str) -> None:
    case = CASES["resample"]
    shape = case["inputs"][name][1]
    layer = layer.double()
    with torch.no_grad():
        layer.conv.weight.copy_(formula.weight("body.0.weight", tuple(layer.conv.weight.shape)))
        out = layer(to_rows(formula.tensor(name, shape)), Grid(1, *shape[2:]))
    sides = case["expect"][key]["shape"][2:]
    assert_golden(to_map(out, Grid(1, *sides)), case["expect"][key])


def test_a_fresh_network_says_nothing() -> None:
    expected = CASES["fresh"]["expect"]
    zero = {name.removesuffix(".weight") for name in expected["zero_weights"]}
    model = DiCo(replace(DiCoConfig.tiny(), depth=(1, 2, 1, 1, 1)))
    ours = renamed({f"{name}.weight": torch.ones(1) for name in zero})
    found = {name for name, p in model.named_parameters() if name.endswith("weight") and not p.any()}
    assert found == set(ours)


def test_parameters_of_the_published_sizes() -> None:
    with torch.device("meta"):
        counts = {f"DiCo-{name}": parameter_count(DiCo.preset(name)) for name in SIZES}
    assert counts == CASES["parameters"]["expect"]
