"""PredFormer: the specification's exact checks, and the layout text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

import ditkit
from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.bench.macs import count_macs
from ditkit.caching import RAS, TaylorSeer
from ditkit.core.errors import ConfigError, DitkitError, ShapeError
from ditkit.core.grid import patchify, unpatchify
from ditkit.core.model import Model, parameter_count
from ditkit.core.run import DIRECT, Run
from ditkit.core.trajectory import Trajectory
from ditkit.models.predformer import PUBLISHED, VARIANTS, PredFormer, PredFormerConfig, sequence_table
from ditkit.nn.axes import Clip
from ditkit.sample.forecast import forecast
from models_support import perturbed

TINY = PredFormerConfig(
    channels=2, frames=4, size=(8, 12), patch=4, width=32, heads=4, hidden=48, layout="TS*2"
)
LAYOUTS = {
    "Full": "F4",
    "Fac-S-T": "S2T2",
    "Fac-T-S": "T2S2",
    "Binary-ST": "ST*2",
    "Binary-TS": "TS*2",
    "Triplet-STS": "STS*2",
    "Triplet-TST": "TST*2",
    "Quadruplet-TSST": "TSST",
    "Quadruplet-STTS": "STTS",
}
FRAMES, PLACES = 3, 4
CLIP = Clip(FRAMES, PLACES)


def tiny(layout: str = TINY.layout, **changes: Any) -> PredFormer:
    torch.manual_seed(0)
    return perturbed(PredFormer(replace(TINY, layout=layout, **changes)), 0.1)


# Parameters, and multiply-accumulates of one sample: those of the specification, to the unit.
COUNTS = {
    ("mmnist", "Full"): (25_285_952, 21_160_263_680),
    ("mmnist", "Fac-S-T"): (25_286_464, 16_418_078_720),
    ("mmnist", "Fac-T-S"): (25_286_464, 16_418_078_720),
    ("mmnist", "Binary-ST"): (25_297_728, 16_418_078_720),
    ("mmnist", "Binary-TS"): (25_297_728, 16_418_078_720),
    ("mmnist", "Triplet-STS"): (25_297_728, 16_488_857_600),
    ("mmnist", "Triplet-TST"): (25_297_728, 16_347_299_840),
    ("mmnist", "Quadruplet-TSST"): (25_297_728, 16_418_078_720),
    ("mmnist", "Quadruplet-STTS"): (25_297_728, 16_418_078_720),
    ("taxibj", "Triplet-STS"): (6_333_216, 1_649_410_048),
    ("taxibj", "Binary-ST"): (8_438_560, 2_187_329_536),
    ("taxibj", "Full"): (8_434_976, 2_420_113_408),
    ("weatherbench", "Fac-T-S"): (5_273_360, 8_506_048_512),
    ("weatherbench", "Binary-TS"): (5_276_432, 8_506_048_512),
    ("weatherbench", "Full"): (5_272_848, 17_729_323_008),
    ("weatherbench", "Triplet-TST"): (3_959_568, 6_291_456_000),
    ("human", "Quadruplet-TSST"): (12_731_328, 64_877_494_272),
    ("human", "Triplet-STS"): (12_731_328, 69_155_684_352),
    ("human", "Full"): (12_725_696, 155_021_475_840),
}


@pytest.mark.parametrize(("data", "name"), COUNTS)
def test_parameters_and_macs_of_the_real_forward_are_the_published_ones(data, name):
    with torch.device("meta"), torch.no_grad():
        model = PredFormer.preset(name, data).eval()
        count = count_macs(model, torch.empty(1, *model.sample_shape))
    assert (parameter_count(model), count.total) == COUNTS[data, name]
    assert count.uncounted == ()


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_attention_of_the_cpu_counts_the_same_macs(name):
    model = tiny(LAYOUTS[name])
    x = torch.randn(2, *model.sample_shape)
    with torch.no_grad():
        real = count_macs(model, x)
        abstract = count_macs(model.to("meta"), x.to("meta"))
    assert real.by_kind["attention"] > 0
    assert real.total == abstract.total


@pytest.mark.parametrize("data", PUBLISHED)
def test_presets_have_the_blocks_and_the_skips_of_the_paper(data):
    blocks = {"mmnist": 24, "taxibj": 8, "weatherbench": 8, "human": 12}[data]
    for name in VARIANTS:
        with torch.device("meta"):
            model = PredFormer.preset(name, data)
        assert len(model.blocks) == (blocks // 3 * 3 if name.startswith("Triplet") else blocks)
        assert any(layer.skip for layer in model.layers) == (data == "human" and name.startswith("Triplet"))
        closings = sum(isinstance(block.close, nn.LayerNorm) for block in model.blocks)
        assert closings == {"Full": 1, "Fac-S-T": 2, "Fac-T-S": 2}.get(name, len(model.blocks))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": 9}, "size=9x9"),
        ({"size": (8, 10)}, "size=8x10"),
        ({"size": 0}, "size=(0, 0) should be at least 1"),
        ({"width": 30}, "width=30"),
        ({"heads": 0}, "heads=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"mlp_dropout": float("nan")}, "mlp_dropout=nan"),
        ({"open_gates": True, "gated": False}, "open_gates=True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(change, says):
    with pytest.raises((ConfigError, ShapeError)) as caught:
        replace(TINY, **change)
    assert "\n" not in str(caught.value) and says in str(caught.value)


def test_unknown_presets_and_wrong_inputs_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'Triplet-STS'"):
        PredFormer.preset("triplet_sts")
    with pytest.raises(ConfigError, match="did you mean 'mmnist'"):
        PredFormer.preset("Full", "mnist")
    with pytest.raises(ShapeError, match=r"\[1, 3, 4, 8, 12\] should be \[B, 2, T, H, W\]"):
        tiny()(torch.zeros(1, 3, 4, 8, 12))
    with pytest.raises(ShapeError, match="height=9"):
        tiny()(torch.zeros(1, 2, 4, 9, 12))
    assert replace(TINY, size=8).size == (8, 8)


@pytest.mark.parametrize("name", VARIANTS)
def test_frames_come_back_bit_for_bit_through_every_variant(name):
    """Identity embedding, values passed on by every attention, and the head's inverse permutation.

    Each of the reshapes to lines and back is made; a layout that leaves its tokens in the order of the last
    axis, as the release of Fac-S-T does, scrambles the frames. Sums of equal numbers are exact.
    """
    C, p = 2, 4
    model = PredFormer(replace(TINY, layout=LAYOUTS[name], width=C * p * p, heads=2)).eval()
    order = patchify(torch.arange(C * p * p).reshape(1, C, p, p), p).flatten()
    turned = unpatchify(torch.arange(C * p * p).reshape(1, 1, -1), model.layout((C, 1, p, p))[0].grid, p)
    with torch.no_grad():
        for layer in (model.embed, model.out):
            layer.weight.copy_(torch.eye(C * p * p))
            layer.bias.zero_()
        model.out.weight.zero_()[turned.flatten(), order] = 1.0
        for block in model.blocks:
            block.attn_norm, block.close = nn.Identity(), nn.Identity()
            block.attn.qkv.weight.copy_(torch.eye(C * p * p).repeat(3, 1))
            block.attn.out.weight.copy_(torch.eye(C * p * p))
        model.norm = nn.Identity()

    def unplaced(fn: Callable[..., Any], x: Tensor) -> Any:
        return fn(x)._replace(x=model.embed(patchify(x, p)))

    handlers: dict[str, Any] = {"tokens": unplaced}
    for i in range(len(model.blocks)):
        handlers[f"blocks.{i}.attn.core"] = lambda fn, q, k, v: v
        handlers[f"blocks.{i}.mlp"] = lambda fn, h: torch.zeros_like(h)
    x = torch.randn(2, C, 3, 8, 12)
    out = model(x, run=Run(handlers))
    assert torch.equal(out / 2.0 ** len(model.blocks), x)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), "+TST*2"])
def test_folded_attention_equals_attention_under_a_mask_of_its_lines(layout):
    """The layout of a model seen from outside: the same network with all tokens in one masked sequence."""
    model = tiny(layout).double()
    x = torch.randn(2, *model.sample_shape, dtype=torch.float64)
    every = torch.arange(model.layout(model.sample_shape)[0].length)

    def masked(fn: Callable[..., Any], x: Tensor) -> Any:
        return fn(x).rows("image", every)

    assert torch.allclose(model(x, run=Run({"tokens": masked})), model(x), atol=1e-11)


def test_positions_are_one_sequence_over_all_frames():
    table = sequence_table(2000, 6)
    k = torch.arange(2000, dtype=torch.float64)
    for i, wave in enumerate((torch.sin, torch.cos) * 3):
        assert torch.equal(table[:, i], wave(k / 10_000 ** (2 * (i // 2) / 6)).float())
    model = tiny()
    longer = model.tokenize(torch.zeros(1, 2, 7, 8, 12)).x - model.embed.bias
    assert torch.allclose(longer[0], sequence_table(7 * 6, TINY.width), atol=1e-5)


def test_any_length_and_size_that_divides_runs():
    model = tiny("TSST F2")
    for shape in [(1, 4, 4), (7, 8, 12), (4, 16, 4)]:
        x = torch.randn(1, 2, *shape)
        assert model(x).shape == x.shape
        assert model.layout((2, *shape))[0].grid.shape == (shape[0], shape[1] // 4, shape[2] // 4)


def test_a_layer_norm_follows_every_stage_and_a_skip_goes_around_a_layer():
    model = tiny("S2T +ST")
    h = torch.randn(1, 24, TINY.width)
    clip = Clip(4, 6)
    outs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., Any]:
        return lambda fn, *args: outs.setdefault(name, fn(*args))

    run = Run({name: note(name) for name in ("blocks.2", "blocks", *(f"blocks.{i}" for i in (3, 4)))})
    model(torch.randn(1, *model.sample_shape), run=run)
    assert torch.equal(outs["blocks"], outs["blocks.2"] + outs["blocks.4"])
    for block, closing in zip(model.blocks, (False, True, True, True, True), strict=True):
        block.close = nn.LayerNorm(TINY.width, elementwise_affine=False) if closing else block.close
        normed = block(h, clip).std(-1, correction=0)
        assert torch.allclose(normed, torch.ones_like(normed), atol=1e-3) == closing


def test_a_stack_can_be_cut_between_blocks_and_not_within_a_skip():
    model = tiny("ST +STS T2")
    x = torch.randn(2, *model.sample_shape)

    def cut(*places: int) -> Callable[..., Any]:
        def handler(fn: Any, h: Tensor, clip: Clip) -> Tensor:
            for start, stop in zip((0, *places), (*places, len(fn)), strict=True):
                h = fn(h, clip, start, stop)
            return h

        return handler

    exact = model(x)
    for places in [(1,), (2, 5), (1, 2, 5, 6)]:
        assert torch.equal(model(x, run=Run({"blocks": cut(*places)})), exact)
    with pytest.raises(ConfigError, match="blocks 2 to 4 have one skip"):
        model(x, run=Run({"blocks": cut(3)}))


@pytest.mark.parametrize("policy", [TaylorSeer(), RAS(), Neighbourhood()], ids=lambda p: type(p).__name__)
def test_policies_of_sampling_are_refused_by_name(policy):
    """A forecast is one evaluation, and its attention is of lines, without a core that a pattern could take over."""
    with pytest.raises(DitkitError, match=type(policy).__name__):
        trajectory = Trajectory(tiny("TSST").sites(), [policy], 1)
        trajectory.finish()


def test_a_transform_that_leaves_out_blocks_is_refused_by_name():
    """A layout says which block attends along which axis."""
    with pytest.raises(ConfigError, match="Kept: unknown stack 'blocks'"):
        ditkit.compress(tiny("TS*3"), "kept:blocks=0+1+4+5")


def test_horizons_longer_and_shorter_than_a_pass():
    model = tiny()
    x = torch.randn(2, *model.sample_shape)
    first = model(x)
    second = model(first)
    assert torch.equal(forecast(model, x, 7), torch.cat([first, second], 2)[:, :, :7])
    assert torch.equal(forecast(model, x, 8), torch.cat([first, second], 2))
    assert torch.equal(forecast(model, x, 3), first[:, :, :3])
    for horizon in (0, 2.0):
        with pytest.raises(ConfigError, match=f"horizon={horizon}"):
            forecast(model, x, horizon)
    with pytest.raises(ShapeError, match=r"\[2, 4, 8, 12\]"):
        forecast(model, x[:, 0], 4)


def test_a_forecast_is_made_where_the_model_is():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, x):
            devices.append(x.device.type)
            return torch.zeros(x.shape)

    devices: list[str] = []
    assert forecast(Elsewhere(), torch.ones(1, 1, 2, 4, 4), 2).device.type == "cpu"
    assert devices == ["meta"]


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    model = PredFormer(replace(PUBLISHED["mmnist"][1], layout="TSST"))
    block = model.blocks[1]
    for layer in (block.attn.qkv, block.attn.out, block.mlp.gate, block.mlp.value, block.mlp.out):
        assert abs(layer.weight.std().item() - 0.02) < 2e-4
        assert layer.bias is None or not layer.bias.any()
    assert block.attn.qkv.bias is None
    assert model.embed.weight.std() > 0.05  # torch's own: uniform up to 1 / sqrt(64)
    opened = PredFormer(replace(TINY, open_gates=True)).blocks[0].mlp
    assert opened.gate.bias.eq(1).all() and opened.gate.weight.abs().max() < 1e-5
    assert opened.value.weight.std() > 0.01


def test_without_gates_a_block_feeds_through_two_layers():
    """The paper's ablation (Table 7), and the hidden width at which it has as many weights."""
    plain = tiny("T", gated=False, hidden=48).blocks[0]
    x = torch.randn(2, 6, TINY.width)
    inner, out = plain.mlp.inner, plain.mlp.out
    by_hand = gelu(plain.mlp_norm(x) @ inner.weight.T + inner.bias) @ out.weight.T + out.bias
    torch.testing.assert_close(plain.feed(DIRECT, "", x), by_hand)
    gated = tiny("T", hidden=32).blocks[0]
    counts = [
        sum(weight.numel() for weight in mlp.parameters() if weight.ndim == 2)
        for mlp in (plain.mlp, gated.mlp)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["attn_dropout", "mlp_dropout", "drop_path"])
def test_dropout_is_in_training_only_and_differs_between_samples(name):
    model = tiny("ST", **{name: 0.3})
    plain = tiny("ST")
    x = torch.randn(1, *model.sample_shape)
    assert torch.equal(model(x), plain(x))
    drawn = model.train()(x.expand(64, *x.shape[1:]))
    assert not torch.allclose(drawn[0], drawn[1])


def test_attention_dropout_is_of_the_output_and_not_of_the_probabilities():
    """What attention gives is the same in training; of the branch a share is 0 and the rest scaled."""
    model, share = tiny("T", attn_dropout=0.25), 0.25
    x, seen = torch.randn(4, *model.sample_shape), {}

    def note(name: str) -> Callable[..., Any]:
        return lambda fn, *args: seen.setdefault(name, fn(*args))

    for name in ("eval", "train"):
        model.train(name == "train")
        model(x, run=Run({at: note(f"{name} {at}") for at in ("blocks.0.attn", "blocks.0.attn.core")}))
    assert torch.equal(seen["train blocks.0.attn.core"], seen["eval blocks.0.attn.core"])
    drawn, whole = seen["train blocks.0.attn"], seen["eval blocks.0.attn"]
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], whole[kept] / (1 - share))
    assert kept.float().mean().item() == pytest.approx(
        1 - share, abs=5 * (share * (1 - share) / kept.numel()) ** 0.5
    )


@pytest.mark.parametrize(("axis", "lines"), [("T", PLACES), ("S", FRAMES), ("F", 1)])
def test_drop_path_drops_whole_lines_of_each_sample(axis, lines):
    model = PredFormer(replace(TINY, layout=axis, drop_path=0.25)).train()
    torch.manual_seed(0)
    kept = model.blocks[0].thinned(torch.ones(4000, FRAMES * PLACES, 1), CLIP)[..., 0]
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    grid = kept.unflatten(1, (FRAMES, PLACES))
    if axis in "TF":
        assert torch.equal(grid, grid[:, :1].expand_as(grid))
    if axis in "SF":
        assert torch.equal(grid, grid[:, :, :1].expand_as(grid))
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    if lines > 1:
        first, second = kept[:, 0], kept[:, -1]
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.06


@pytest.mark.parametrize("layout", ["F2", "+TST"])
def test_checkpointing_under_dropout_gives_equal_gradients(layout):
    model = tiny(layout, mlp_dropout=0.2, drop_path=0.2).train()
    x = torch.randn(2, *model.sample_shape)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout", ["S2T2", "+STS", "F"])
def test_the_compiled_forward_has_no_break(layout):
    torch.compiler.reset()
    model = tiny(layout)
    x = torch.randn(2, *model.sample_shape)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_saved_folders_and_half_precision(tmp_path):
    model = tiny("+STS T2")
    x = torch.randn(2, *model.sample_shape)
    loaded = Model.load(model.save(tmp_path))
    assert loaded.config == model.config and torch.equal(loaded(x), model(x))
    held = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert sorted(held) == sorted(model.state_dict())
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
