"""VDT against its specification: counts, DiT, references written out, and sizes and inputs that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.run import Run
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.vdt import VDT
from ditkit.nn.axes import Clip
from ditkit.nn.embeddings import sincos_axis, sincos_table
from ditkit.nn.modulation import Parts
from ditkit.nn.temporal import Scene, SpaceTimeBlock, TemporalAttention
from models_support import perturbed
from vdt_support import SMALL, awake, batch, frames_given


@pytest.mark.parametrize(("name", "count"), [("S/2", 41_361_056), ("L/2", 859_704_224)])
def test_parameter_counts_are_those_of_the_papers_code(name, count):
    with torch.device("meta"):
        model = VDT.preset(name)
    assert parameter_count(model) == count
    D = model.config.width
    assert parameter_count(model.blocks[0]) == 23 * D**2 + 22 * D


@pytest.mark.parametrize(("name", "dit", "thousands"), [("S/2", "S/2", 32_481), ("L/2", "XL/2", 673_684)])
def test_image_mode_has_the_parameters_of_dit(name, dit, thousands):
    with torch.device("meta"):
        alone = VDT.preset(name, mode="image")
        of_images = VDT.preset(name, mode="image", classes=1000)
        expected = DiT.preset(dit)
    assert round(parameter_count(alone) / 1000) == thousands
    assert parameter_count(of_images) == parameter_count(expected)
    D = alone.config.width
    assert parameter_count(alone.blocks[0]) == 18 * D**2 + 15 * D


def small_dit(convention: Convention) -> DiT:
    return perturbed(DiT(DiTConfig(8, 2, 3, 16, 2, 2, classes=5, convention=convention)), 0.2)


@pytest.mark.parametrize("convention", [DDPM, SIT, Convention()])
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_image_mode_with_copied_weights_is_dit_on_every_frame(convention, size):
    dit = small_dit(convention)
    model = VDT.from_image(dit, mode="image", frames=3).eval()
    x, t, cond = torch.randn(2, 3, 3, *size), torch.rand(2), Cond(label=torch.tensor([4, 1]))
    out = model(x, t, cond)
    assert out.std() > 0.1
    for i, frame in enumerate(x.unbind(2)):
        assert torch.allclose(out[:, :, i], dit(frame, t, cond), atol=1e-5)


def without_time_positions(model: VDT, x: Tensor) -> Run:
    """A run whose tokens have lost their place in time."""
    frames, n = x.shape[2], x.shape[3] * x.shape[4] // model.config.patch**2
    table = sincos_axis(frames, model.config.width).repeat_interleave(n, 0)

    def handler(fn, *args):
        tokens = fn(*args)
        return tokens._replace(x=tokens.x - table)

    return Run({"tokens": handler})


def test_a_dit_without_its_time_positions_still_is_one_when_temporal_branches_start_at_zero():
    dit = small_dit(Convention())
    model = VDT.from_image(dit).eval()
    x, t, cond = torch.randn(2, 3, 4, 8, 8), torch.rand(2), Cond(label=torch.tensor([4, 1]))
    out = model(x, t, cond, run=without_time_positions(model, x))
    for i, frame in enumerate(x.unbind(2)):
        assert torch.allclose(out[:, :, i], dit(frame, t, cond), atol=1e-5)
    one = x[:, :, :1]
    image = VDT.from_image(dit, mode="image").eval()
    assert torch.allclose(
        model(one, t, cond, run=without_time_positions(model, one)), image(one, t, cond), atol=1e-5
    )


def test_frames_are_independent_without_temporal_branches_and_not_with_them():
    model, (x, t), order = awake(), batch(), torch.tensor([2, 0, 3, 1])

    def permuted_then_run() -> tuple[Tensor, Tensor]:
        run = without_time_positions(model, x)
        return model(x[:, :, order], t, Cond(), run=run), model(x, t, Cond(), run=run)[:, :, order]

    moved, out = permuted_then_run()
    assert torch.allclose(moved, out, atol=1e-5), "attention has no order of its own"
    other = torch.cat([x[:, :, :1], torch.randn_like(x[:, :, 1:])], 2)
    assert not torch.allclose(model(other, t, Cond())[:, :, 0], model(x, t, Cond())[:, :, 0])
    for block in model.blocks:
        torch.nn.init.zeros_(block.temporal_attn.fc.weight)
        torch.nn.init.zeros_(block.temporal_attn.fc.bias)
    assert torch.allclose(*permuted_then_run(), atol=1e-5)
    assert torch.allclose(model(other, t, Cond())[:, :, 0], model(x, t, Cond())[:, :, 0], atol=1e-6)


def test_a_block_whose_gates_are_closed_mixes_frames_of_a_place_and_nothing_else():
    block, clip = SpaceTimeBlock(16, 2), Clip(3, 4)
    torch.nn.init.zeros_(block.modulation.weight)
    torch.nn.init.zeros_(block.modulation.bias)
    tokens = torch.randn(1, 12, 16, requires_grad=True)
    out = block(tokens, torch.randn(1, 16), Scene(clip))
    out[0, 1 * 4 + 2].sum().backward()
    touched = tokens.grad[0].abs().sum(-1).reshape(3, 4)
    assert (touched[:, 2] > 0).all()
    assert not touched[:, [0, 1, 3]].any()


def norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def reference(model: VDT, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The forward pass as the specification writes it, in einsums over frames and places, in float64."""
    w, c = {name: v.double() for name, v in model.state_dict().items()}, model.config
    grid, heads = Grid.of(tuple(x.shape[2:]), c.patch), c.heads
    T, n = grid.frames, grid.height * grid.width

    def linear(name: str, u: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", u, w[name + ".weight"]) + w[name + ".bias"]

    def attend(name: str, u: Tensor, scores: str, values: str) -> Tensor:
        """u [B, T, n, D]; the equations say over which axis."""
        q, k, v = linear(name + ".qkv", u).unflatten(-1, (3, heads, -1)).unbind(3)
        weight = (torch.einsum(scores, q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return linear(name + ".out", torch.einsum(values, weight, v).flatten(-2))

    kernel = w["embed.weight"].reshape(c.width, c.channels, c.patch, c.patch)
    h = torch.stack([F.conv2d(f, kernel, w["embed.bias"], stride=c.patch) for f in x.double().unbind(2)], 1)
    h = h.flatten(3).mT + sincos_table(Grid(1, grid.height, grid.width), c.width)
    place = torch.arange(T).double()[:, None] * 10_000 ** (-2 * torch.arange(c.width // 2).double() / c.width)
    h = h + torch.cat([place.sin(), place.cos()], -1)[None, :, None]
    angle = t.double()[:, None] * torch.exp(-math.log(1e4) * torch.arange(128).double() / 128)
    wave = torch.cat([angle.cos(), angle.sin()], -1)
    silu = F.silu
    c_BD = linear("time.outer", silu(linear("time.inner", wave))) + w["label.weight"][label]
    for i in range(c.depth):
        at = f"blocks.{i}."
        b1, g1, a1, b2, g2, a2 = linear(at + "modulation", silu(c_BD))[:, None, None].chunk(6, -1)
        ta = at + "temporal_attn."
        u = norm(h, 1e-5) * w[ta + "norm.weight"] + w[ta + "norm.bias"]
        h = h + linear(ta + "fc", attend(ta + "attn", u, "bfnhk,bgnhk->bnhfg", "bnhfg,bgnhk->bfnhk"))
        u = norm(h, 1e-6) * (1 + g1) + b1
        h = h + a1 * attend(at + "attn", u, "btihk,btjhk->bthij", "bthij,btjhk->btihk")
        u = norm(h, 1e-6) * (1 + g2) + b2
        h = h + a2 * linear(at + "mlp.outer", F.gelu(linear(at + "mlp.inner", u), approximate="tanh"))
    shift, scale = linear("head.modulation", silu(c_BD))[:, None, None].chunk(2, -1)
    out = linear("head.out", norm(h, 1e-6) * (1 + scale) + shift)
    out = out.reshape(len(x), T, grid.height, grid.width, c.patch, c.patch, -1)
    assert out.shape[2] * out.shape[3] == n
    return torch.einsum("bthwpqc->bcthpwq", out).flatten(5, 6).flatten(3, 4)


@pytest.mark.parametrize("shape", [(4, 4, 6), (1, 4, 4), (7, 2, 8)])
@pytest.mark.parametrize("convention", [DDPM, Convention()])
def test_the_forward_pass_is_the_specifications(convention, shape):
    model = awake(replace(SMALL, convention=convention))
    x, t, label = torch.randn(2, 3, *shape), torch.rand(2), torch.tensor([2, 0])
    expected = reference(model, x, t, label)
    out = model(x, t, Cond(label=label))
    assert out.std() > 0.1 and out.shape[2:] == shape
    assert torch.allclose(out.double(), expected, atol=2e-5, rtol=1e-4)


def test_factorised_attention_is_not_dense_attention_over_frame_or_place():
    """Two softmaxes, one after the other, are not one over the union."""
    clip, block = Clip(3, 4), SpaceTimeBlock(16, 2)
    x = torch.randn(1, 12, 16)
    row = torch.arange(12)
    union = (row[:, None] // 4 == row // 4) | (row[:, None] % 4 == row % 4)
    with torch.no_grad():
        factorised = block.attn(clip.fold(x, "S"), Run(), "a")
        dense = block.attn(x, Run(), "a", mask=(union,))
    assert not torch.allclose(clip.unfold(factorised, "S"), dense, atol=1e-3)


def test_site_names_are_public():
    def names(**changes: object) -> list[tuple[str, str]]:
        return [(site.name, site.kind) for site in VDT(replace(SMALL, depth=1, **changes)).sites()]

    def branch(name: str) -> list[tuple[str, str]]:
        return [(name, "branch"), (name + ".kv", "kv"), (name + ".core", "core")]

    first, last = (
        [
            ("time", "time"),
            ("tokens", "tokens"),
            ("blocks", "stack"),
            ("blocks.0", "block"),
            ("blocks.0.modulation", "modulation"),
        ],
        [
            ("blocks.0.mlp", "branch"),
            ("blocks.0.mlp.inner", "inner"),
            ("head", "head"),
            ("head.modulation", "modulation"),
        ],
    )
    time, space = branch("blocks.0.temporal_attn"), branch("blocks.0.attn")
    assert names() == names(conditioning="concat") == [*first, *time, *space, *last]
    assert names(mode="image") == [*first, *space, *last]
    assert names(conditioning="cross") == [*first, *time, *space, *branch("blocks.0.cross_attn"), *last]


def test_any_rows_may_be_computed_and_meet_only_those_of_their_place_or_frame():
    rows, clip = torch.tensor([0, 1, 5, 7, 9]), Clip(3, 4)
    x, vector = torch.randn(2, 12, 16).double(), torch.randn(2, 1, 16).double()
    block = SpaceTimeBlock(16, 2).double()
    over_time = TemporalAttention(16, 2).double()
    place, frame = rows % 4, rows // 4
    kept = clip.rows("image", rows)
    expected = over_time.fc(
        over_time.attn(over_time.norm(x[:, rows]), Run(), "a", mask=(place[:, None] == place,))
    )
    assert torch.allclose(over_time(Run(), "a", x[:, rows], kept), expected, atol=1e-12)
    shift, scale = block.modulation(vector).chunk(6, -1)[:2]
    h = block.norm(x[:, rows]) * (1 + scale) + shift
    expected = block.attn(h, Run(), "a", mask=(frame[:, None] == frame,))
    assert torch.allclose(
        block.attend(Run(), "a", x[:, rows], Parts(block.modulation, vector), kept), expected, atol=1e-12
    )

    columns = torch.tensor([0, 2, 4, 6, 8, 10])  # whole places: as in the full clip
    full = over_time(Run(), "a", x, clip)[:, columns]
    assert torch.allclose(over_time(Run(), "a", x[:, columns], clip.rows("image", columns)), full, atol=1e-12)


def test_a_frames_height_and_width_are_saved(tmp_path):
    model = awake()
    loaded = VDT.load(model.save(tmp_path))
    assert loaded.config == model.config and loaded.sample_shape == (3, 4, 4, 6)
    assert VDT(replace(SMALL, size=8)).sample_shape == (3, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"width": 30}, ShapeError, "width=30 does not divide into heads=4"),
        ({"width": 6}, ShapeError, "width=6 should divide by 4"),
        ({"size": 9}, ShapeError, "size=9 does not divide into patches of 2"),
        ({"size": (4, 5)}, ShapeError, "size=(4, 5) does not divide into patches of 2"),
        ({"frames": 0}, ConfigError, "frames=0 should be at least 1"),
        ({"size": (4, 0)}, ConfigError, "size=(4, 0) should be at least 1"),
        ({"depth": 10**9}, ConfigError, "depth=1000000000 should be at most 1000"),
        ({"mode": "vidoe"}, ConfigError, "unknown mode 'vidoe'; did you mean 'video'?"),
        (
            {"conditioning": "concatenate"},
            ConfigError,
            "unknown conditioning 'concatenate'; did you mean 'concat'?",
        ),
        ({"mode": "image", "conditioning": "concat"}, ConfigError, "joins frames along time"),
        ({"label_dropout": 1.0}, ConfigError, "label_dropout=1.0 should lie in [0, 1)"),
        ({"class_names": ("a",)}, ConfigError, "1 class names for 3 classes"),
    ],
)
def test_sizes_that_make_no_model_are_refused_in_one_line(change, kind, expected):
    with pytest.raises(kind) as caught:
        replace(SMALL, **({"heads": 4 if change.get("width") == 30 else 2} | change))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "change", "kind", "expected"),
    [
        (torch.zeros(1, 3, 4, 6), {}, ShapeError, r"\[1, 3, 4, 6\] should be \[B, 3, T, H, W\]"),
        (torch.zeros(1, 2, 4, 4, 6), {}, ShapeError, r"should be \[B, 3, T, H, W\]"),
        (torch.zeros(1, 3, 4, 4, 5), {"mask": None}, ShapeError, "width=5 does not divide"),
        (torch.zeros(1, 3, 4, 4, 6), {"context": None}, ConfigError, "Cond.context is None"),
        (
            torch.zeros(1, 3, 5, 4, 6),
            {},
            ShapeError,
            r"Cond.context \[1, 3, 4, 4, 6\] should be \[1, 3, 5, 4, 6\]",
        ),
        (
            torch.zeros(1, 3, 4, 4, 6),
            {"mask": torch.ones(1, 4, 4, 6)},
            ShapeError,
            r"Cond.mask \[1, 4, 4, 6\] should",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, change, kind, expected):
    with pytest.raises(kind, match=expected):
        VDT(SMALL)(x, torch.zeros(1), replace(frames_given([0]), **change))


def test_an_unknown_preset_quotes_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown VDT preset 'S/4'; did you mean 'S/2'\?"):
        VDT.preset("S/4")
