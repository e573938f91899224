"""RevIN, decomposition, prompts and the whole forecast of TEMPO against DC-research/TEMPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.models.tempo import Tempo, TempoConfig
from ditkit.nn.decomposition import moving_average
from ditkit.nn.prompt_pool import PromptPool
from ditkit.nn.revin import RevIN
from ditkit.recipes.tempo import PUBLISHED_LORA
from ditkit.train.objective import Batch
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.decomposition import TARGETS, DecompositionLoss
from golden_support import Case, assert_golden, cases, float64, read

pytest.importorskip("peft")  # slow to import: here, not in the first test that needs it
SYSTEM = "25-tempo"
IDS = ((7, 3, 21), (7, 3, 40), (7, 5, 33))
WORDS, POSITIONS, HEADS, RANK = 60, 96, 4, 16
KINDS = ("trend", "season", "noise")


def series(name: str, shape: list[int], scale: float = 1.0, slope: float = 0.0, level: float = 0.0) -> Tensor:
    """[N, L, 1] by formula, on a line, as [N, L]."""
    time = torch.arange(shape[1], dtype=torch.float64)[None, :, None]
    return (formula.tensor(name, shape) * scale + slope * time + level)[..., 0]


def config(c: dict[str, Any]) -> TempoConfig:
    width = c["d_model"]
    return TempoConfig(
        frames=c["seq_len"], horizon=c["pred_len"], patch=c["patch_size"], stride=c["stride"], width=width,
        heads=HEADS, kv_heads=HEADS, depth=c["gpt_layers"], hidden=4 * width, words=WORDS, positions=POSITIONS,
        prompt="semi-soft" if c["prompt"] else "none", prompt_read=bool(c["use_token"]), prompts=IDS,
    )  # fmt: skip


def published(c: dict[str, Any]) -> dict[str, Tensor]:
    """Return the formula's weights of the published names; GPT-2's matrices are [in, out]."""
    width, length, horizon = c["d_model"], c["seq_len"], c["pred_len"]
    patches = (length - c["patch_size"]) // c["stride"] + 2
    rows = patches + (3 if c["use_token"] else 0)
    linear = {
        "map_trend": (length, length), "map_season.0": (4 * length, length), "map_season.2": (length, 4 * length),
        "map_resid": (length, length),
    }  # fmt: skip
    for kind in KINDS:
        linear[f"in_layer_{kind}"] = (width, c["patch_size"])
        linear[f"out_layer_{kind}"] = (horizon, width * rows)
        if c["prompt"]:
            linear[f"prompt_layer_{kind}"] = (width, width)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for kind in KINDS:
        shapes |= {f"rev_in_{kind}.affine_weight": (1,), f"rev_in_{kind}.affine_bias": (1,)}
    at = "gpt2_trend.base_model.model."
    shapes |= {f"{at}wte.weight": (WORDS, width), f"{at}wpe.weight": (POSITIONS, width)}
    for i in range(c["gpt_layers"]):
        block = f"{at}h.{i}."
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
        layers = {
            "attn.c_attn.base_layer": (width, 3 * width), "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width),
        }  # fmt: skip
        for name, shape in layers.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[1:]}
        shapes |= {
            f"{block}attn.c_attn.lora_A.default.weight": (RANK, width),
            f"{block}attn.c_attn.lora_B.default.weight": (3 * width, RANK),
        }
    shapes |= {f"{at}ln_f.weight": (width,), f"{at}ln_f.bias": (width,)}
    return formula.weights(shapes)


def loaded(case: Case) -> Tempo:
    c = case["constructor"]
    with float64():
        return Tempo.from_original(published(c), config(c), [PUBLISHED_LORA])


def clip(x: Tensor) -> Tensor:
    return x[:, None, :, None, None]


def test_revin_and_moving_average() -> None:
    results = read(SYSTEM)["RevIN and moving average"]["results"]
    x, y = series("ts1", [3, 48, 1], 3, 0.1, 5), series("ts1.y", [3, 12, 1])
    with float64():
        revin = RevIN()
    with torch.no_grad():
        revin.weight.fill_(1.3)
        revin.bias.fill_(-0.2)
        z, scale = revin.normalise(x)
        assert_golden(z[..., None], results["normed"])
        assert_golden(revin.restore(y, scale)[..., None], results["denormed"])
        assert_golden(scale.mean[:, 0], results["mean"])
        assert_golden(scale.std[:, 0], results["stdev"])
        assert_golden(moving_average(x, 25)[..., None], results["moving_average"])


@cases(SYSTEM, lambda case: case["name"].startswith("forward"))
@torch.no_grad()
def test_forecast_and_decomposition(case: Case) -> None:
    results, model = case["results"], loaded(case)
    shape = [2, 48, 1]
    x = series("ts3", shape, 2, 0.05, 1)
    known = torch.stack(
        [
            series("ts3.trend", shape),
            series("ts3.season", shape, 2, 0, 1),
            series("ts3.noise", shape, 3, 0, 2),
        ],
        1,
    )
    term = DecompositionLoss()
    taps = term.taps(model.sites())
    out, found = run_with_taps(model, model, taps, model.sample_shape, clip(x))
    assert_golden(out[:, 0, :, 0], results["output"])
    parts = found["tokens:in"]
    for own, name in zip(parts, ("trend", "season", "residual"), strict=True):
        assert_golden(own[..., None], results[name])
    assert_golden(model.patches(parts.trend), results["patches_of_trend"])
    batch = Batch(data=x, prediction=x, taps=found, cond=Cond(streams={TARGETS: known}))
    assert term.loss(batch).mean().item() == pytest.approx(results["local_loss"], rel=1e-9)
    assert model.config.patches == results["patch_num"]
    assert {len(words) for words in model.config.prompts} == {results["token_len"]}


@torch.no_grad()
def test_level_scale_and_the_prediction_that_is_left_in_normalised_units() -> None:
    """Its `predict` normalises before its `forward` does, and brings back twice by the statistics of the second."""
    case = read(SYSTEM)["level and scale; predict()"]
    results, model = case["results"], loaded(case)
    x = series("ts5", [1, 48, 1], 2)
    first, scaled = model(clip(x)), model(clip(3 * x + 10))
    assert_golden(first[:, 0, :, 0], results["forward"])
    assert_golden(scaled[:, 0, :, 0], results["forward_scaled"])
    eps = 1e-5 / x.var(correction=0).item()
    assert torch.allclose(scaled, 3 * first + 10, rtol=2 * eps, atol=60 * eps)

    def predicted(x: Tensor, steps: int) -> Tensor:
        given, made = model.revin.normalise(x)[0], list[Tensor]()
        while sum(part.shape[1] for part in made) < steps:
            _, scale = model.revin.normalise(given)
            made.append(model.revin.restore(model(clip(given))[:, 0, :, 0, 0], scale))
            given = torch.cat([given[:, made[-1].shape[1] :], made[-1]], 1)
        return torch.cat(made, 1)[0, :steps]

    assert_golden(predicted(x, 12), results["predict"], 1e-4)
    assert_golden(predicted(3 * x + 10, 12), results["predict_scaled"], 1e-4)
    assert_golden(predicted(x, 30), results["predict_30"], 1e-4)
    assert not math.isclose(first.sum().item(), results["predict"]["sum"], rel_tol=0.1)


@torch.no_grad()
def test_prompt_pool_with_the_query_that_mixes_places_and_channels() -> None:
    results = read(SYSTEM)["prompt pool"]["results"]
    with float64():
        pool = PromptPool(6, 768, mixed=True)
    pool.keys.copy_(torch.stack([formula.tensor(f"key.{i}", [768]) for i in range(30)]))
    pool.values.copy_(torch.stack([formula.tensor(f"value.{i}", [3, 768]) for i in range(30)]))
    pool.query.weight.copy_(formula.weight("weight", (1, 6)))
    pool.query.bias.copy_(formula.weight("bias", (1,)))
    summary = formula.tensor("summary", [2, 6, 768])
    chosen = pool(summary)
    assert_golden(chosen.prompts, results["prompts"])
    assert chosen.similarity.mean().item() == pytest.approx(results["mean_similarity"], rel=1e-9)
    assert [sorted(row) for row in chosen.places.tolist()] == results["selected"]
    pool.mixed = False
    assert not torch.equal(pool(summary).similarity, chosen.similarity)
    twin = pool.query(summary.transpose(1, 2))[..., 0]
    expected = (
        torch.nn.functional.cosine_similarity(twin[:, None], pool.keys[None], dim=-1).topk(3).values.sum(1)
    )
    torch.testing.assert_close(pool(summary).similarity, expected)
