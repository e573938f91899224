"""RAE's network, times, guidance, decoder and latents against bytetriper/RAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.codecs.representation import RepresentationCodec, RepresentationConfig, decoder_weights
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.path import Linear
from ditkit.core.time_grid import Shift
from ditkit.models.ddt import DDTBlock, DiTDH, DiTDHConfig, FourierTime
from ditkit.nn.encoders import standardised
from ditkit.nn.rotary import Rotary, axial_angles, rotate
from ditkit.nn.vit_decoder import ViTDecoder, ViTDecoderConfig
from ditkit.sample.guidance import Autoguidance, ClassifierFree
from ditkit.sample.solvers import Euler
from ditkit.train.denoising import NoisyBatch
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import LogitNormal, Shifted
from golden_support import assert_golden, float64, read

CASES = read("22-rae")
WIDTH, HEAD = 16, 24


def wide_table(angles: Tensor, text: int = 0, valid: Tensor | None = None) -> Rotary:
    return Rotary(angles.cos(), angles.sin(), text, valid)


def wide_axis(count: int, width: int, device: Any = None) -> Tensor:
    half = width // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(count)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables in float64, as the published ones were for these cases."""
    monkeypatch.setattr("ditkit.models.ddt.rotary_table", wide_table)
    monkeypatch.setattr("ditkit.nn.embeddings.sincos_axis", wide_axis)
    with float64():
        yield


def block_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.w12.weight": (2 * hidden, width),
        "mlp.w12.bias": (2 * hidden,),
        "mlp.w3.weight": (width, hidden),
        "mlp.w3.bias": (width,),
        "adaLN_modulation.1.weight": (6 * width, width),
        "adaLN_modulation.1.bias": (6 * width,),
    }


def published() -> dict[str, Tensor]:
    """Return the published state dict of the tiny network, by formula."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (HEAD, 6, 1, 1),
        "x_embedder.proj.bias": (HEAD,),
        "s_embedder.proj.weight": (WIDTH, 6, 1, 1),
        "s_embedder.proj.bias": (WIDTH,),
        "s_projector.weight": (HEAD, WIDTH),
        "s_projector.bias": (HEAD,),
        "t_embedder.W": (256,),
        "t_embedder.mlp.0.weight": (WIDTH, 512),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (11, WIDTH),
        "final_layer.norm_final.weight": (HEAD,),
        "final_layer.linear.weight": (6, HEAD),
        "final_layer.linear.bias": (6,),
        "final_layer.adaLN_modulation.1.weight": (2 * HEAD, HEAD),
        "final_layer.adaLN_modulation.1.bias": (2 * HEAD,),
    }
    for i, (width, hidden) in enumerate(((WIDTH, 42), (WIDTH, 42), (HEAD, 64))):
        shapes |= {f"blocks.{i}.{k}": v for k, v in block_shapes(width, hidden).items()}
    return formula.weights(shapes)


def network() -> DiTDH:
    config = DiTDHConfig(
        size=4,
        channels=6,
        width=WIDTH,
        depth=2,
        heads=2,
        head_width=HEAD,
        head_depth=1,
        head_heads=3,
        classes=10,
    )
    tables = {"pos_embed": torch.zeros(1), "dec_feat_rope.freqs_cos": torch.zeros(1)}
    return DiTDH.from_original({**published(), **tables}, config)


def told(labels: Any) -> Cond:
    label = torch.tensor(labels)
    return Cond(label=label.clamp(max=9), drop=label == 10)


@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_forward() -> None:
    case, model = CASES["forward"], network()
    given, expected = case["inputs"], case["expect"]
    x, t = formula.tensor(*given["x"]), torch.tensor(given["t"])
    assert_golden(model(x, t, told(given["y"])), expected["output"])
    found: dict[str, Tensor] = {}
    model.blocks[1].register_forward_hook(lambda *a: found.update(trunk=a[2]))
    s = model.condition_tokens(x, t, told(given["y"]))
    assert_golden(found["trunk"], expected["trunk_output"])
    assert_golden(model.project(s), expected["condition_entering_the_head_after_projection"])
    fixed = 16 * WIDTH + 256  # positions of the trunk, and the frequencies of time
    assert parameter_count(model) == expected["trainable"] == expected["parameters"] - fixed
    assert model.time.frequency.numel() == 256


@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_head_under_a_given_condition() -> None:
    given, expected = CASES["given-condition"]["inputs"], CASES["given-condition"]["expect"]
    out = network().refine(formula.tensor(*given["x"]), formula.tensor(*given["s"]))
    assert_golden(out, expected["output"])


@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_guidance() -> None:
    given, expected = CASES["guidance"]["inputs"], CASES["guidance"]["expect"]
    model, x = network(), formula.tensor(*given["x"])[:2]
    outs = []
    for i, t in enumerate(given["t"][:2]):
        one, time = x[i : i + 1], torch.tensor([t])

        def branches(*names: str, one: Tensor = one, time: Tensor = time, i: int = i) -> tuple[Tensor, ...]:
            labels = {"cond": [given["y"][i]], "uncond": [10]}
            return tuple(model(one, time, told(labels[name])) for name in names)

        outs.append(ClassifierFree(2.5, interval=(0.3, 0.8))(branches, t))
    # the published code guides a batch of conditional and null rows, and returns it twice
    halves = torch.cat([torch.cat(outs)] * 2)
    free = {k: v for k, v in expected["cfg"]["at"].items() if int(k) < halves.numel() // 2}
    picked = {k: halves.flatten()[int(k)].item() for k in free}
    assert picked == pytest.approx(free, rel=1e-9)
    guide = formula.tensor("guide", (2, 6, 4, 4))
    own = torch.cat(
        [model(x[i : i + 1], torch.tensor([given["t"][i]]), told([given["y"][i]])) for i in (0, 1)]
    )
    found = Autoguidance(1.42, model)(lambda *names: (own, guide), 0.5)
    assert_golden(found, expected["autoguidance"])


@pytest.mark.usefixtures("in_float64")
def test_block_whose_modulation_is_each_tokens_own() -> None:
    given, expected = CASES["block-per-token"]["inputs"], CASES["block-per-token"]["expect"]
    block = DDTBlock(24, 3)
    state = formula.weights(block_shapes(24, expected["swiglu_hidden"]))
    names = {
        "norm_attn": "norm1", "norm_mlp": "norm2", "attn.out": "attn.proj", "mlp.out": "mlp.w3",
        "modulation": "adaLN_modulation.1",
    }  # fmt: skip
    for name, value in block.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in ("mlp.gate", "mlp.value"):
            half = state[f"mlp.w12.{kind}"].chunk(2)[layer == "mlp.value"]
        else:
            half = state[f"{names.get(layer, layer)}.{kind}"]
        value.copy_(half)
    table = wide_table(axial_angles(Grid.of((3, 3), 1), (0, 4, 4)))
    q = formula.tensor(*given["q"])
    assert_golden(table.cos.repeat_interleave(2, -1), expected["rope_cos"])
    assert_golden(rotate(q, table), expected["rope_of_x_heads"])
    x = formula.tensor(*given["x"]).requires_grad_(True)
    out = block(x, formula.tensor(*given["c"]), table)
    assert_golden(out, expected["output"])
    out.square().sum().backward()
    gradients = expected["gradients_of_sum_of_squares"]
    ours = {
        "norm1.weight": block.norm_attn.weight.grad,
        "attn.qkv.bias": block.attn.qkv.bias.grad,
        "mlp.w12.bias": torch.cat([block.mlp.gate.bias.grad, block.mlp.value.bias.grad]),  # type: ignore[list-item]
    }
    for name, gradient in ours.items():
        assert gradient is not None
        assert_golden(gradient, gradients[name])


@torch.no_grad()
def test_time_embedding() -> None:
    case = CASES["time-embedding"]
    with float64():
        embedding = FourierTime(12, 8)
    names = {"frequency": "W", "inner": "mlp.0", "outer": "mlp.2"}
    for name, value in embedding.state_dict().items():
        layer, _, kind = name.partition(".")
        value.copy_(formula.weight(".".join(filter(None, (names[layer], kind))), value.shape))
    assert embedding.frequency.tolist() == pytest.approx(case["expect"]["W"], rel=1e-9)
    t = torch.tensor(case["inputs"]["t"], dtype=torch.float64)
    assert_golden(embedding(t), case["expect"]["output"])


def test_solver_grid() -> None:
    for dimension, expected in CASES["solver-grid"]["expect"].items():
        times = Euler(Shift.of_dimension(int(dimension), end=0.001)).times(Linear(), 49)
        assert len(times) == expected["points"]
        assert times[:4].tolist() == pytest.approx(expected["first"], rel=1e-9)
        assert times[-4:].tolist() == pytest.approx(expected["last"], rel=1e-9)
        assert times[25].item() == pytest.approx(expected["middle"], rel=1e-9)


def test_training_loss() -> None:
    given, expected = CASES["training-loss"]["inputs"], CASES["training-loss"]["expect"]
    density = Shifted(Shift.of_dimension(given["dim"]).a, LogitNormal(last=0.999))
    t = density.quantile(torch.tensor(expected["uniform_draw"], dtype=torch.float64))
    assert t.tolist() == pytest.approx(expected["t"], rel=1e-7)
    data, noise, out = (formula.tensor(*given[name]) for name in ("z", "eps", "out"))
    path, t = Linear(), torch.tensor(expected["t"], dtype=torch.float64)
    x = path.mix(data, noise, t)
    batch = NoisyBatch(
        path=path, convention=Convention(), data=data, noise=noise, x=x, t=t, prediction=out, fraction=None, taps={}
    )  # fmt: skip
    assert_golden(x, expected["xt"], 1e-7)
    assert_golden(batch.target(), expected["target"])
    assert Regression().loss(batch).tolist() == pytest.approx(expected["loss"], rel=1e-9)


def test_euler() -> None:
    case = CASES["euler"]
    x = formula.tensor(*case["inputs"]["x"])
    times = Euler(Shift.of_dimension(case["inputs"]["dim"], end=0.001)).times(Linear(), 9)
    assert len(times) == case["expect"]["states"]
    states = [x]
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        states.append(states[-1] + (s - t) * (states[-1] * t - 0.5))
    assert_golden(states[1], case["expect"]["second"])
    assert_golden(states[-1], case["expect"]["final"])


def decoder_state(width: int, hidden: int, layers: int, tokens: int, out: int) -> dict[str, Tensor]:
    """Return the published decoder's weights by formula, its position table left out."""
    shapes: dict[str, tuple[int, ...]] = {
        "trainable_cls_token": (1, 1, width),
        "decoder_embed.weight": (width, tokens),
        "decoder_embed.bias": (width,),
        "decoder_norm.weight": (width,),
        "decoder_norm.bias": (width,),
        "decoder_pred.weight": (out, width),
        "decoder_pred.bias": (out,),
    }
    linear = {f"attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
    linear |= {
        "attention.output.dense": (width, width),
        "intermediate.dense": (hidden, width),
        "output.dense": (width, hidden),
    }
    for i in range(layers):
        at = f"decoder_layers.{i}."
        for name, shape in linear.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{at}{name}.weight": (width,), f"{at}{name}.bias": (width,)}
    return formula.weights(shapes)


@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_decoder() -> None:
    case = CASES["decoder"]
    c = case["constructor"]["GeneralDecoder"]
    config = ViTDecoderConfig(
        latent_channels=c["hidden_size"],
        channels=3,
        grid=(3, 3),
        patch=c["patch"],
        width=c["decoder_hidden_size"],
        hidden=c["intermediate"],
        heads=c["heads"],
        depth=c["layers"],
    )
    model = ViTDecoder(config)
    assert parameter_count(model) == case["expect"]["parameters"] - 10 * 16
    state = decoder_state(config.width, config.hidden, config.depth, config.latent_channels, 48)
    model.load_state_dict(decoder_weights({**state, "decoder_pos_embed": torch.zeros(1)}))
    tokens = formula.tensor(*case["inputs"]["z"])
    z = tokens.mT.reshape(2, c["hidden_size"], 3, 3)
    assert_golden(model(z), case["expect"]["image"])


@torch.no_grad()
def test_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["encode"]
    given, expected = case["inputs"], case["expect"]
    names = ("tokens", "mean", "var", "noise")
    tokens, mean, variance, noise = (formula.tensor(*given[name]) for name in names)
    codec = RepresentationCodec(
        RepresentationConfig(size=8, patch=4, width=8, hidden=8, heads=2, depth=1, latent_channels=3)
    ).double()
    codec.mean.copy_(mean[0])
    codec.variance.copy_(variance[0].abs())
    raw, disturbance = (v.mT.reshape(2, 3, 2, 2) for v in (tokens, noise))
    u = (formula.tensor("rand0", (2, 1, 1)) + 1).view(2) / 2
    assert_golden(codec.normalised(raw), expected["eval"])
    assert_golden(codec.normalised(codec.noised(raw, disturbance, u)), expected["train"])
    image = formula.tensor(*given["image"])
    side = expected["encoder_input_size"]
    pixels = standardised(2 * image - 1, (side, side), *expected["mean_std"])
    assert_golden(pixels, expected["resized_and_standardised_image"])


def test_parameters() -> None:
    for name, expected in CASES["parameters"]["expect"].items():
        with torch.device("meta"):
            model = DiTDH.preset(name.removeprefix("DH-"))
        c = model.config
        assert parameter_count(model) == expected["trainable"]
        assert expected["all"] - expected["trainable"] == 256 * c.width + model.time.frequency.numel()
