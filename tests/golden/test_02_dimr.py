"""DiMR against qihao067/DiMR, on weights by formula under the published names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.ddpm import DISCRETE, DiscretePath
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.run import Run
from ditkit.models.dimr import DiMR, DiMRConfig, renamed
from ditkit.nn.stages import spread_channels
from ditkit.nn.time_norms import TimeDependentLayerNorm, TimeDependentParameter, TimeDependentRMSNorm
from ditkit.sample.guidance import PowerCosine
from ditkit.train.denoising import Denoising
from ditkit.train.terms.multi_scale import MultiScale, at_resolution
from golden_support import assert_golden, float64, read

CASES = read("02-dimr")
OURS = {"param0": "high", "param1": "low", "nodecay_weight": "weight", "nodecay_bias": "bias"}


def tau_of(n: Any) -> Tensor:
    """Return the norms' place in time of published steps 1 to 1000."""
    return (torch.as_tensor(n, dtype=torch.float64).reshape(-1, 1, 1) / 1000 * 8 - 4) / 4


def fill(parameter: TimeDependentParameter, name: str) -> None:
    with torch.no_grad():
        for theirs, ours in OURS.items():
            held = getattr(parameter, ours)
            held.copy_(formula.weight(f"{name}{theirs}", tuple(held.shape)))


def of_time(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{theirs}": (width,) for theirs in OURS}


def of_layer(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def published_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published DiMR by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    lower = 0
    for i, s in enumerate(c["stage_configs"]):
        at, d, hidden = f"stages.{i}", s["dim"], s["hidden_dim"]
        count, patch = s["num_blocks"] // 2 * 2 + 1, s["input_feature_ratio"]
        shapes |= of_layer(f"{at}.input_layer.1", d, c["channels"], patch, patch)
        shapes[f"{at}.input_layer.3.position_embeddings.weight"] = (s["max_height"] * s["max_width"], d)
        if i == 0:
            shapes[f"{at}.class_embeds.weight"] = (c["num_classes"], d)
        else:
            for name, width in (("0.weight", lower), ("0.bias", lower), ("2.weight", d), ("2.bias", d)):
                shapes |= of_time(f"{at}.upsample.{name}", width)
            shapes |= of_layer(f"{at}.upsample.1.kernel", 4 * d, lower)
        for j in range(count):
            block = f"{at}.blocks.{j}"
            if i == 0:
                shapes |= of_time(f"{block}.block1.norm.scale", d)
                shapes |= of_layer(f"{block}.block1.query_key_value", 3 * d, d, bias=False)
                shapes |= of_layer(f"{block}.block1.dense", d, d)
            else:
                shapes |= of_layer(f"{block}.block1.1", d, 1, s["kernel_size"], s["kernel_size"])
            shapes |= of_time(f"{block}.block2.norm.scale", d)
            for name, sides in (("w0", (hidden, d)), ("w1", (hidden, d)), ("w2", (d, hidden))):
                shapes |= of_layer(f"{block}.block2.{name}", *sides)
        for j in range(count // 2):
            shapes |= of_layer(f"{at}.skip_denses.{j}", d, 2 * d)
        shapes |= of_time(f"{at}.output_layer.0.weight", d) | of_time(f"{at}.output_layer.0.bias", d)
        shapes |= of_layer(f"{at}.output_layer.2", c["channels"], d, 3, 3)
        lower = d * (count + 1)
    return shapes


def published(case: dict[str, Any]) -> DiMR:
    c = case["constructor"]
    state = formula.weights(published_shapes(c))
    for name in state:
        if name.endswith(("scale.param0", "scale.param1", "weight.param0", "weight.param1")):
            state[name] = state[name] + 1
    stages = c["stage_configs"]
    config = DiMRConfig(
        size=8,
        channels=c["channels"],
        width=tuple(s["dim"] for s in stages),
        depth=tuple(s["num_blocks"] for s in stages),
        patch=tuple(s["input_feature_ratio"] for s in stages),
        heads=stages[0]["num_attention_heads"],
        kernel=stages[0]["kernel_size"],
        classes=c["num_classes"] - 1,
        label_dropout=0.0,
    )
    with float64():
        return DiMR.from_original(state, config).eval()


@pytest.mark.parametrize("name", ["two-stage", "two-stage-shared-n"])
def test_the_predictions_of_both_stages_and_what_the_second_is_told(name: str) -> None:
    case = CASES[name]
    model, expected, given = published(case), case["expect"], case["inputs"]
    assert parameter_count(model) == expected["parameters"]
    told: list[Tensor] = []
    refine = model.stages[1].norm_lower
    refine.register_forward_pre_hook(lambda module, arguments: told.append(arguments[0]))
    lower: list[Tensor] = []
    run = Run({"stages.0.head": lambda fn, *args: lower.append(fn(*args)) or lower[0]})
    x, index = formula.tensor("x", given["x"][1]), torch.tensor(given["n"]).double() - 1
    with torch.no_grad():
        out = model(x, index, Cond(label=torch.tensor(given["y"])), run)
    for prediction, summary in zip((lower[0], out), expected["outputs_by_stage"], strict=True):
        assert_golden(prediction, summary)
    taps = expected["stage1_taps"]
    (features,) = told
    assert features.shape[-1] == taps["count"] * model.config.width[0]
    assert_golden(features.unflatten(1, (4, 4)).reshape(taps["concat"]["shape"]), taps["concat"])


def test_the_parameter_at_five_times() -> None:
    case = CASES["tdp"]
    parameter = TimeDependentParameter(6, 0.0).double()
    fill(parameter, "")
    found = parameter(tau_of(case["inputs"]["n"])).squeeze(1)
    expected = torch.tensor(case["expect"]["value"], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_norms_at_each_sample_s_time_and_at_one_time() -> None:
    case = CASES["td-norms"]
    rms, layer = TimeDependentRMSNorm(10).double(), TimeDependentLayerNorm(10).double()
    fill(rms.scale, "scale.")
    fill(layer.scale, "weight.")
    fill(layer.shift, "bias.")
    for name in ("x3", "x4"):
        x = formula.tensor(name, case["inputs"][name][1])
        for way, n in (("per_sample", case["inputs"]["n"]), ("shared", [case["inputs"]["n_shared"]] * 3)):
            for kind, norm in (("rms", rms), ("layer", layer)):
                rows = norm(x.reshape(3, -1, 10), tau_of(n))
                assert_golden(rows.reshape(x.shape), case["expect"][f"{kind}_{way}_{name}"])


def test_channels_into_pixels() -> None:
    case = CASES["pixel-shuffle"]
    expand = torch.nn.Linear(5, 12).double()
    with torch.no_grad():
        for name, value in (("weight", expand.weight), ("bias", expand.bias)):
            value.copy_(formula.weight(f"kernel.{name}", tuple(value.shape)))
        x = formula.tensor("x", case["inputs"]["x"][1])
        rows = spread_channels(expand(x.flatten(1, 2)), Grid(1, 2, 3), 2)
    assert_golden(rows.reshape(1, 4, 6, 3), case["expect"]["output"])
    for channel, (row, column, d) in enumerate(
        case["expect"]["channel_c_of_linear_lands_at_row_col_channel"]
    ):
        lit = spread_channels(torch.eye(12)[channel][None, None], Grid(), 2)
        assert lit.reshape(2, 2, 3).nonzero().tolist() == [[row, column, d]]


def test_targets_of_even_and_odd_sides() -> None:
    case = CASES["targets"]
    expected = case["expect"]
    for key, name in (("even_by_width", "eps_even"), ("odd_by_width", "eps_odd")):
        noise = formula.tensor(*case["inputs"][name])
        for width, summary in expected[key].items():
            assert_golden(at_resolution(noise, (int(width),) * 2), summary)
    constant = torch.full((1, 1, 8, 8), 0.5)
    for width, value in expected["constant_half_by_width"].items():
        assert torch.equal(
            at_resolution(constant, (int(width),) * 2).unique(), torch.tensor([_number(value)])
        )


def _number(value: Any) -> float:
    return float(value if not isinstance(value, list) else torch.tensor(value).unique().item())


def test_the_loss_and_its_gradients() -> None:
    case = CASES["loss"]
    model, given, expected = published(case).train(), case["inputs"], case["expect"]
    data, noise = (formula.tensor(name, given[name][1]) for name in ("x0", "eps"))
    path = model.config.convention.make_path()
    index = torch.tensor(given["n"]) - 1
    abar = path.abar[index]
    assert abar.tolist() == pytest.approx(expected["abar_n"], rel=1e-12)
    losses = Denoising((MultiScale(),)).at(
        model, model, path=path, data=data, noise=noise, t=index, cond=Cond(label=torch.tensor(given["y"]))
    )
    assert losses["loss"].item() == pytest.approx(sum(expected["loss_per_sample"]) / 2, rel=1e-9)
    (2 * losses["loss"]).backward()
    ours = dict(model.named_parameters())
    for name, summary in expected["gradients_of_sum"].items():
        assert_golden(ours[renamed(name)].grad, summary, 1e-8)


def test_the_schedule() -> None:
    expected = CASES["schedule"]["expect"]
    path: Any = DISCRETE["ddpm-sd"]()
    assert isinstance(path, DiscretePath)
    n = torch.tensor(CASES["schedule"]["inputs"]["n"])
    assert path.at((n - 1).double()).alpha.square().tolist() == pytest.approx(expected["abar"], rel=1e-12)
    assert path.beta[n[1:] - 1].tolist() == pytest.approx(expected["beta"][1:], rel=1e-9)


def test_guidance_that_falls_with_the_noise() -> None:
    case = CASES["guidance-decay"]
    for (top, power), scales in zip(case["inputs"]["pairs"], case["expect"]["scale"], strict=True):
        guidance = PowerCosine(top, power)
        found = [guidance.at(n / 1000) for n in case["inputs"]["n"]]
        assert found == pytest.approx(scales, rel=1e-9)


def test_parameters_of_the_published_sizes() -> None:
    for name, file in (("XL/2R", "DiMR-XL-2R_imagenet256.py"), ("G/2R", "DiMR-G-2R_imagenet256.py")):
        expected = CASES["parameters"]["expect"][file]
        with torch.device("meta"):
            model = DiMR.preset(name)
        assert parameter_count(model) == expected["all"]
        assert [len(stage.blocks) for stage in model.stages] == expected["blocks_per_stage"]
        assert [len(stage.skips) for stage in model.stages] == expected["skips_per_stage"]
        expand = model.stages[1].expand
        norms = model.stages[1].norm_lower, model.stages[1].norm_expanded
        assert expand.in_features == expected["upsample_input"]
        assert sum(map(parameter_count, (expand, *norms))) == expected["upsample"]
