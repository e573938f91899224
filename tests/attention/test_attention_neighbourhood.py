"""CLEAR against its specification: counts, masks, pooled keys, the text rule, tiles against raster, the scale."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from test_attention_hosts import outcome
from torch import Tensor, nn

import flux_support as fluxes
from ditkit.attention.neighbourhood import Neighbourhood, Pooling, cells
from ditkit.attention.pattern import cached_plan
from ditkit.core.checkpoint import read_metadata, read_state, write_state
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, Segment
from ditkit.core.model import Model
from ditkit.core.run import Call, Site
from ditkit.hosts import flux
from ditkit.hosts.view import view
from patterns_support import (
    Masked,
    circle_meets,
    planned_mask,
    predicted,
    prompt,
    tiny_clip_model,
    token_mask,
)

PICTURES = [Grid(1, 12, 8), Grid(1, 9, 14), Grid(1, 16, 16)]
CORE = (Site("core", "core", "joint"),)


@pytest.mark.parametrize(
    ("radius", "keys", "pairs", "operations"),
    [(8, 193, 710_052, "63.49"), (16, 793, 2_594_880, "86.65"), (32, 3205, 8_085_036, "154.11")],
)
def test_pairs_of_a_picture_of_1024_pixels(radius: int, keys: int, pairs: int, operations: str) -> None:
    """And operations of a FLUX layer in units of 10^9, text and all."""
    grid, text = Grid(1, 64, 64), 512
    for order in ("tiles", "raster"):
        plan = Neighbourhood(radius=radius, order=order).plan(grid, text)  # type: ignore[arg-type]
        assert plan.pairs == pairs + text * (2 * grid.length + text)
        assert int(plan.visible_keys[0, 0, plan.inverse[32 * 64 + 32]]) == keys + text
        assert f"{4 * plan.pairs * 3072 / 1e9:.2f}" == operations


def test_pairs_with_pooled_keys() -> None:
    plan = Neighbourhood(radius=8, pooled=4).plan(Grid(1, 64, 64), 512)
    assert f"{4 * plan.pairs * 3072 / 1e9:.2f}" == "76.37"


@pytest.mark.parametrize(
    ("side", "radius", "order", "block", "percent"),
    [
        (64, 8, "raster", 128, "26"),
        (64, 8, "tiles", 128, "21"),
        (64, 8, "tiles", 64, "12"),
        (128, 8, "raster", 128, "11.4"),
        (128, 8, "tiles", 128, "6.2"),
        (128, 8, "tiles", 64, "3.2"),
        (128, 16, "raster", 128, "22.8"),
        (128, 16, "tiles", 128, "9.9"),
        (128, 16, "tiles", 64, "8.4"),
        (256, 16, "tiles", 128, "2.7"),
        (256, 16, "tiles", 64, "2.3"),
        (256, 32, "tiles", 128, "7.6"),
    ],
)
def test_blocks_visited(side: int, radius: int, order: str, block: int, percent: str) -> None:
    pattern = Neighbourhood(radius=radius, order=order, block=block)  # type: ignore[arg-type]
    plan, digits = pattern.plan(Grid(1, side, side), 0), len(percent.partition(".")[2])
    assert f"{100 * plan.density:.{digits}f}" == percent
    if (side, radius, block) == (256, 32, 128):
        assert f"{100 * plan.density * (1 - plan.partial / plan.visited):.1f}" == "1.3"


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("grid", [*PICTURES, Grid(3, 5, 6), Grid(4, 8, 4)], ids=lambda grid: str(grid.shape))
@pytest.mark.parametrize("order", ["tiles", "raster"])
@pytest.mark.parametrize("radius", [1, 3])
def test_a_plan_is_the_mask_of_every_pair(grid: Grid, others: int, order: str, radius: int) -> None:
    span = 2 if grid.frames > 1 else 0
    pattern = Neighbourhood(radius=radius, block=8, order=order, span=span)  # type: ignore[arg-type]
    mask = planned_mask(pattern.plan(grid, others))
    assert torch.equal(mask[: grid.length, : grid.length], token_mask(grid, circle_meets(pattern)))
    assert mask[grid.length :].all() and mask[:, grid.length :].all()
    if radius == 1 and not span:
        assert mask[: grid.length].sum() == grid.length * (1 + others)


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("order", ["tiles", "raster"])
def test_all_tokens_of_the_image_see_the_pooled_keys_and_no_text_does(order: str, others: int) -> None:
    grid, block = Grid(1, 9, 15), 8
    pattern = Neighbourhood(radius=3, pooled=3, block=block, order=order)  # type: ignore[arg-type]
    plan = pattern.plan(grid, others)
    assert plan.keys - plan.queries == 15
    pooled = plan.mask()[0, 0, plan.inverse, plan.queries :]
    assert pooled[: grid.length].all() and not pooled[grid.length :].any()
    without = replace(pattern, pooled=0).plan(grid, others)
    assert torch.equal(planned_mask(plan), planned_mask(without))


def test_cells_are_a_loop_over_them() -> None:
    grid, c = Grid(2, 4, 6), 2
    expected = [
        [(t * 4 + a * c + y) * 6 + b * c + x for y in range(c) for x in range(c)]
        for t in range(2)
        for a in range(2)
        for b in range(3)
    ]
    assert cells(grid, c).tolist() == expected
    with pytest.raises(ShapeError, match="pooled=4 does not divide a grid of 4 x 6 tokens"):
        cells(grid, 4)


def attended(
    pattern: Neighbourhood, grid: Grid, q: Tensor, k: Tensor, v: Tensor, pooling: nn.Module | None = None
) -> Tensor:
    """Attention [B, N, text + L, K] of one layer over text, then the image, in the model's order."""
    text = q.shape[2] - grid.length
    layout = (Segment("text", Grid(text), text), Segment("image", grid, grid.length))
    session = pattern.start(CORE, 1, nn.ModuleDict({"core": pooling}) if pooling else None)
    handler = session.enter(Call(0, 1, 0.5, layout=layout))["core"]
    plan = cached_plan(pattern, grid, text)
    if plan.order is None:
        return handler(None, q, k, v)
    slots, back = plan.order[: plan.queries - text].clamp(min=0), plan.inverse[: grid.length]
    rows = torch.cat((torch.arange(text), text + slots))
    out = handler(None, q[:, :, rows], k[:, :, rows], v[:, :, rows])
    return torch.cat((out[:, :, :text], out[:, :, text:][:, :, back]), 2)


def by_definition(
    pattern: Neighbourhood, grid: Grid, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float = 1.0
) -> Tensor:
    """The same with a mask of every pair and pooling by convolution."""
    text, c, joint = q.shape[2] - grid.length, pattern.pooled, []
    for x in (k, v):
        image = x[:, :, text:].mT.flatten(0, 1).unflatten(-1, (grid.height, grid.width))
        summed = F.conv2d(image.flatten(0, 1)[:, None], weight[None, None], stride=c)
        joint.append(torch.cat((x, summed.view(*x.shape[:2], x.shape[-1], -1).mT), 2))
    pooled = joint[0].shape[2] - q.shape[2]
    mask = F.pad(token_mask(grid, circle_meets(pattern)), (text, pooled, text, 0), value=True)
    mask[:text, q.shape[2] :] = False
    return F.scaled_dot_product_attention(q, *joint, attn_mask=mask, scale=scale * q.shape[-1] ** -0.5)


def drawn(grid: Grid, text: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(
        3, 2, 3, text + grid.length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return q, k, v


@pytest.mark.parametrize("order", ["tiles", "raster"])
def test_pooled_attention_is_its_definition(order: str) -> None:
    grid, pooling = Grid(1, 10, 6), Pooling(2).double()
    pattern = Neighbourhood(radius=3, pooled=2, block=8, order=order, kernel="cpu")  # type: ignore[arg-type]
    nn.init.normal_(pooling.weight, generator=torch.Generator().manual_seed(1))
    q, k, v = drawn(grid)
    expected = by_definition(pattern, grid, q, k, v, pooling.weight)
    assert torch.allclose(attended(pattern, grid, q, k, v, pooling), expected, atol=1e-12)


def test_pooling_begins_as_the_average_and_one_hot_weights_sample() -> None:
    grid, pooling = Grid(1, 12, 8), Pooling(4)
    x = torch.randn(2, 3, grid.length, 8)
    image = x.unflatten(2, (grid.height, grid.width))
    average = image.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(2, 3)
    assert torch.allclose(pooling(x, cells(grid, 4)), average, atol=1e-6)
    with torch.no_grad():
        pooling.weight.zero_()
        pooling.weight[1, 3] = 1
    assert torch.equal(pooling(x, cells(grid, 4)), image[:, :, 1::4, 3::4].flatten(2, 3))


def test_pooled_keys_change_no_bit_of_the_text() -> None:
    grid = Grid(1, 10, 6)
    pattern = Neighbourhood(radius=3, pooled=2, block=8, kernel="cpu")
    pooling, q, k, v = Pooling(2).double(), *drawn(grid)
    before = attended(pattern, grid, q, k, v, pooling)
    nn.init.normal_(pooling.weight)
    after = attended(pattern, grid, q, k, v, pooling)
    assert torch.equal(after[:, :, :5], before[:, :, :5])
    assert (after[:, :, 5:] != before[:, :, 5:]).any(-1).all()


def test_gradients_of_the_pooling_weights() -> None:
    grid, pooling = Grid(1, 4, 6), Pooling(2).double()
    pattern = Neighbourhood(radius=2, pooled=2, block=8, kernel="cpu")
    q, k, v = drawn(grid, 3)

    assert torch.autograd.gradcheck(
        lambda _: (attended(pattern, grid, q, k, v, pooling) * q).sum(), pooling.weight
    )


@pytest.mark.parametrize("pooled", [0, 2])
def test_tiles_and_raster_give_the_same(pooled: int) -> None:
    grid, patterns = Grid(1, 12, 20), []
    q, k, v = (x.float() for x in drawn(grid))
    for order in ("tiles", "raster"):
        patterns.append(Neighbourhood(radius=3, pooled=pooled, block=16, order=order, kernel="cpu"))  # type: ignore[arg-type]
    tiles, raster = (attended(pattern, grid, q, k, v) for pattern in patterns)
    assert torch.allclose(tiles, raster, atol=1e-5)
    assert patterns[0].plan(grid, 5).visited < patterns[1].plan(grid, 5).visited


@pytest.mark.parametrize(("pooled", "counted"), [(0, 1), (2, 10)])
def test_the_proportional_scale(pooled: int, counted: int) -> None:
    """sqrt(log_n0(n) / K): 1 / sqrt(K) at n = n0; pooled, of ten times the tokens."""
    grid = Grid(1, 10, 6)
    pattern = Neighbourhood(radius=3, pooled=pooled, block=8, kernel="cpu")
    q, k, v = drawn(grid)
    plain = attended(pattern, grid, q, k, v)
    assert torch.allclose(
        attended(replace(pattern, scaled_from=65 * counted), grid, q, k, v), plain, atol=1e-12
    )
    scaled = attended(replace(pattern, scaled_from=20), grid, q, k, v)
    larger = sqrt(log(65 * counted) / log(20))
    assert torch.allclose(scaled, attended(pattern, grid, q * larger, k, v), atol=1e-12)
    assert not torch.allclose(scaled, plain, atol=1e-3)


SETTINGS = [
    Neighbourhood(radius=3, span=2, block=8, kernel="cpu"),
    Neighbourhood(radius=2, span=4, block=16, kernel="reference", order="raster"),
    Neighbourhood(radius=1, span=1, block=8, kernel="cpu"),
]


@pytest.mark.parametrize("pattern", SETTINGS, ids=str)
@pytest.mark.parametrize("text", [0, 7])
def test_a_model_under_the_pattern_is_one_under_the_mask(pattern: Neighbourhood, text: int) -> None:
    """The grid is 4 x 6 x 10: tiles reach beyond it, and prompts differ in length."""
    model = tiny_clip_model(text)
    x = torch.randn(3, 2, 4, 12, 20, generator=torch.Generator().manual_seed(1)).double()
    cond = prompt(3, (7, 3, 1)) if text else Cond()
    expected = predicted(model, Masked(circle_meets(pattern)), x, cond)
    assert torch.allclose(predicted(model, pattern, x, cond), expected, atol=1e-10)
    assert not torch.allclose(predicted(model, None, x, cond), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "sd3", "sd3.5"])
def test_a_host_under_the_pattern_is_one_under_the_mask(name: str) -> None:
    pattern = Neighbourhood(radius=2, block=8, kernel="cpu")
    expected, _ = outcome(name, [Masked(circle_meets(pattern))])
    found, dense = outcome(name, [pattern])[0], outcome(name, [])[0]
    error, effect = ((found - x).norm() / dense.norm() for x in (expected, dense))
    assert error < 1e-5 and effect > 1e-3
    pooled, trajectory = outcome(name, [replace(pattern, pooled=2)])
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "", "sparse": "0-7"}
    assert (pooled - found).norm() > 1e-3 * dense.norm()


def test_a_radius_beyond_the_grid_is_dense() -> None:
    model = tiny_clip_model(7)
    x, cond = torch.randn(2, 2, 4, 12, 20).double(), prompt(2, (7, 2))
    dense = predicted(model, None, x, cond)
    for order in ("tiles", "raster"):
        pattern = Neighbourhood(radius=12, span=4, block=8, kernel="cpu", order=order)  # type: ignore[arg-type]
        assert torch.allclose(predicted(model, pattern, x, cond), dense, atol=1e-10)


def test_a_block_holds_as_many_frames_as_a_token_sees() -> None:
    for block, span, shape, tile in (
        (128, 0, (1, 64, 64), [1, 8, 16]),
        (64, 0, (1, 64, 64), [1, 8, 8]),
        (256, 0, (1, 64, 64), [1, 16, 16]),
        (128, 16, (16, 8, 8), [16, 2, 4]),
        (128, 3, (16, 8, 8), [2, 8, 8]),
        (128, 9, (13, 30, 45), [1, 8, 16]),
        (8, 16, (16, 8, 8), [8, 1, 1]),
    ):
        grid = Grid(*shape)
        order = Neighbourhood(radius=2, block=block, span=span).plan(grid, 0).order
        first = grid.coordinates()[torch.arange(block) if order is None else order[:block]]
        assert (first.amax(0) - first.amin(0) + 1).tolist() == tile


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"radius": 0}, "radius=0 should be at least 1"),
        ({"radius": 2.5}, "radius=2.5 should be an integer"),
        ({"pooled": -1}, "pooled=-1"),
        ({"span": -1}, "span=-1"),
        ({"scaled_from": 1}, "scaled_from=1, the base of a logarithm, expected 0 or at least 2"),
        ({"order": "hilbert"}, "unknown order 'hilbert'"),
    ],
)
def test_bad_settings(given: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Neighbourhood(**given)  # type: ignore[arg-type]
    assert line in str(caught.value)


def test_what_does_not_fit_a_model_is_refused_before_its_first_block() -> None:
    model, x = tiny_clip_model(), torch.randn(1, 2, 4, 12, 20).double()
    with pytest.raises(ConfigError, match="a clip of 4 frames, expected a picture; span=N"):
        predicted(model, Neighbourhood(), x, Cond())
    with pytest.raises(ShapeError, match="pooled=4 does not divide a grid of 6 x 10 tokens"):
        predicted(model, Neighbourhood(span=1, pooled=4), x, Cond())
    with pytest.raises(
        ConfigError, match=r"pooled=2 takes weights '.*' of \[2, 2\], the model was trained with \[4, 4\]"
    ):
        Neighbourhood(pooled=2).start(model.sites(), 1, Neighbourhood(pooled=4).modules(model.sites()))


def test_weights_of_the_model_are_used() -> None:
    model, x = tiny_clip_model(), torch.randn(1, 2, 4, 12, 20).double()
    pattern = Neighbourhood(radius=2, span=1, pooled=2, block=8, kernel="cpu")
    learned = nn.ModuleDict({"Neighbourhood": (pooling := pattern.modules(model.sites()))})
    initial = predicted(model, pattern, x, Cond())
    assert torch.equal(predicted(model, pattern, x, Cond(), learned=learned), initial)
    for part in pooling.values():
        nn.init.normal_(part.weight)
    assert not torch.allclose(predicted(model, pattern, x, Cond(), learned=learned), initial)


def test_weights_of_an_older_folder_are_read(tmp_path: Path) -> None:
    """They were one tensor [attentions, c, c], and are one an attention now."""
    pattern = Neighbourhood(radius=2, span=1, pooled=2, block=8, kernel="cpu")
    model = tiny_clip_model().float().adopt([pattern])
    state = read_state(model.save(tmp_path) / "model.safetensors")
    names = [name for name in state if name.startswith("learned.")]
    whole = torch.randn(len(names), 2, 2)
    old = {name: value for name, value in state.items() if name not in names}
    write_state(
        tmp_path / "model.safetensors",
        {**old, "learned.Neighbourhood.weight": whole},
        read_metadata(tmp_path / "model.safetensors"),
    )
    loaded = Model.load(tmp_path)
    assert torch.equal(torch.stack([part.weight for part in loaded.learned["Neighbourhood"].values()]), whole)


def test_flux_trains_1794_million_parameters_and_16_weights_an_attention() -> None:
    """(19 * 4 + 38 * 3) (3072^2 + 3072): the image's projections in blocks of two streams, all in the others."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    own = ("to_q", "to_k", "to_v", "to_out")
    trained = sum(
        p.numel() for name, p in model.named_parameters() if any(f".attn.{part}." in name for part in own)
    )
    assert trained == (19 * 4 + 38 * 3) * (3072**2 + 3072) == 1_793_648_640
    weights = Neighbourhood(pooled=4).modules(flux.sites(view(model)))
    assert weights is not None
    assert [list(p.shape) for p in weights.parameters()] == [[4, 4]] * (19 + 38)


def test_the_rotary_base_of_large_pictures_is_the_models() -> None:
    """`pos_embed.theta` of FLUX, ten times as high: diffusers' own NTK factor of 10, under the pattern too."""
    pattern, grid = Neighbourhood(radius=2, block=8, kernel="cpu"), Grid(1, fluxes.ROWS, fluxes.COLUMNS)
    twin, inputs = Masked(circle_meets(pattern)), fluxes.call_inputs()
    outs = []
    for theta in (10_000, 100_000):
        model = view(fluxes.transformer())
        model.pos_embed.theta = theta
        found, expected = (fluxes.run_steps(model, inputs, [policy])[0] for policy in (pattern, twin))
        assert fluxes.relative(found, expected) < 1e-5
        outs.append(found)
    assert fluxes.relative(*outs) > 1e-4
    cos, _ = model.pos_embed(grid.coordinates())
    rows = [
        get_1d_rotary_pos_embed(width, places, 10_000, use_real=True, ntk_factor=10.0)[0]
        for width, places in zip((4, 6, 6), grid.coordinates().T, strict=True)
    ]
    assert torch.allclose(cos, torch.cat(rows, -1), atol=1e-6)
