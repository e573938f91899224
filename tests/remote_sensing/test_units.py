"""UniTS: the specification's exact checks, on random weights; no code of the paper is published."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.bench.macs import count_macs
from ditkit.caching import RAS, TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, NoEffectError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.path import Linear
from ditkit.core.run import DIRECT, Run
from ditkit.models.units import CLOUD, PRESETS, Half, UniTS, last_clear, patch_means
from ditkit.nn import modulator
from ditkit.nn.injector import ConditionInjector, group_norm
from ditkit.nn.modulation import Parts, activated
from ditkit.nn.modulator import LineBias, Modulator, biased_attention, flex_biased_attention
from ditkit.sample import sample
from ditkit.sample.noise import SampleNoise
from satellite_support import TINY, cond_of, told, units

T, ROWS, COLUMNS = 4, 2, 3
GRID = Grid(T, ROWS, COLUMNS)


def run_of(model: UniTS, streams: dict[str, Tensor], count: int = 2, **changes: Tensor | None) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(count, *model.sample_shape, generator=draw)
    return model(x, torch.linspace(0.2, 0.8, count), cond_of(streams, **changes))


# -- size and flow


@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("S2", 54_530_872, 54.72),
        ("S1+S2", 54_543_544, 54.75),
        ("forecast", 54_530_872, 54.73),
        ("change", 53_951_736, 54.21),
    ],
)
def test_presets_have_our_count_and_the_papers_parameters_within_half_a_percent(name, count, millions):
    with torch.device("meta"):
        model = UniTS.preset(name)
    assert parameter_count(model) == count and count / 1e6 == pytest.approx(millions, rel=0.005)
    if name != "change":
        dates_and_places = parameter_count(model.date) + parameter_count(model.place)
        with torch.device("meta"):
            without = UniTS.preset(name, dates=False, places=False)
        assert count - parameter_count(without) == dates_and_places == 493_056
    injectors = sum(
        parameter_count(half.injector) for block in model.blocks for half in (block.space, block.time)
    )
    assert injectors / parameter_count(model) == pytest.approx(0.40, abs=0.02)


def test_unknown_presets_and_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"unknown UniTS preset 's1'.*S1"):
        UniTS.preset("s1")
    for change, message in (
        ({"kernel": 2}, "kernel=2 should be odd"),
        ({"groups": 5}, "width=32 does not divide into groups=5"),
        ({"size": 9}, "size=9 does not divide into patches of 4"),
        ({"radar_mean": (1.0,)}, "radar_mean has 1 numbers for radar_channels=2"),
    ):
        with pytest.raises((ConfigError, ShapeError), match=message):
            replace(TINY, **change)


def test_noise_is_at_0_and_data_at_1_bit_for_bit():
    data, noise = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    clock = TINY.convention.model_time
    assert torch.equal(clock(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 0.0]))
    assert torch.equal(Linear().mix(data, noise, torch.zeros(2)), data)
    assert torch.equal(Linear().mix(data, noise, torch.ones(2)), noise)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_euler_with_the_oracle_ends_at_the_data_for_any_number_of_steps(steps):
    x1, seeds = torch.randn(2, *units().sample_shape), (3, 4)
    x0 = SampleNoise(seeds, tuple(x1.shape[1:])).draw(torch.device("cpu"))

    class Oracle(UniTS):
        def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
            return x1 - x0

    drawn = sample(Oracle(TINY).eval(), Cond(streams=told(TINY)), seeds, steps=steps).samples
    torch.testing.assert_close(drawn, x1, atol=1e-6, rtol=0)


# -- the first weights


def test_at_first_the_body_is_the_identity_but_for_positions_and_ignores_every_condition():
    model, streams = UniTS(TINY).eval(), told(TINY)
    torch.nn.init.normal_(model.head.out.weight)  # else the output is 0 whatever the body does
    ends: dict[str, Tensor] = {}

    def note(fn: Any, x: Tensor, c: Tensor, setting: Any) -> Tensor:
        ends["in"], ends["positions"] = (
            x,
            TINY.depth * (setting.places[:, None] + setting.moments[:, :, None]),
        )
        ends["out"] = fn(x, c, setting)
        return ends["out"]

    x, t = torch.randn(2, *model.sample_shape), torch.rand(2)
    out = model(x, t, Cond(streams=streams), Run({"blocks": note}))
    torch.testing.assert_close(ends["out"], ends["in"] + ends["positions"].flatten(1, 2))
    other = {name: value.flip(0) for name, value in streams.items() if name not in ("days", "present")}
    assert torch.equal(model(x, t, cond_of(streams, **other)), out)
    plain = UniTS(replace(TINY, positions="none")).eval()
    plain(x, t, Cond(streams=streams), Run({"blocks": note_ends(ends)}))
    torch.testing.assert_close(ends["out"] - ends["in"], TINY.depth * ends["places"])


def note_ends(ends: dict[str, Tensor]) -> Any:
    def handler(fn: Any, x: Tensor, c: Tensor, setting: Any) -> Tensor:
        ends["in"], ends["out"] = x, fn(x, c, setting)
        ends["places"] = setting.places.repeat(len(x), T, 1)
        assert setting.moments is None
        return ends["out"]

    return handler


def test_gradients_reach_conditions_dates_places_and_the_modulator_layer_by_layer():
    """Head, gates and convolutions are zero at first, so the gradient passes one of them with each step."""
    torch.manual_seed(0)
    model, streams = UniTS(TINY).train(), told(TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reached: dict[str, int] = {}
    watched = ("head.out", "blocks.0.space.modulation", "blocks.0.space.modulator", "blocks.0.time.modulator")
    watched = (
        *watched,
        "blocks.0.space.injector.conv",
        "blocks.0.time.injector.conv",
        "condition_embed",
        "date",
        "place",
    )
    for step in range(1, 6):
        optimizer.zero_grad()
        x = torch.randn(2, *model.sample_shape)
        (model(x, torch.rand(2), Cond(streams=streams)) - x).square().mean().backward()
        for name in watched:
            if any(p.grad is not None and p.grad.any() for p in model.get_submodule(name).parameters()):
                reached.setdefault(name, step)
        optimizer.step()
    assert reached == dict(zip(watched, (1, 2, 3, 3, 3, 3, 4, 4, 4), strict=True))


# -- ACor


@pytest.mark.parametrize("axis", ["S", "T"])
def test_an_injector_is_the_identity_at_first_and_then_an_affine_map_of_every_token(axis):
    injector = ConditionInjector(axis, 16, 3, 4).double()
    h, q = torch.randn(2, GRID.length, 16).double(), torch.randn(2, GRID.length, 16).double()
    assert torch.equal(injector(h, q, GRID), h)
    for p in injector.conv.parameters():
        torch.nn.init.normal_(p)
    assert torch.allclose(injector(h, q, GRID), injected(injector, h, q), atol=1e-10)
    gamma = injector.terms(q, GRID)[..., :16]
    assert gamma.std(1).min() > 0.1  # of every position its own, not a sample's


def injected(injector: ConditionInjector, h: Tensor, q: Tensor) -> Tensor:
    """The equation in loops: lines, groups, and the convolution as sums over neighbours."""
    weight, bias = injector.conv.weight, injector.conv.bias
    lines = h.view(2, T, ROWS, COLUMNS, 16)
    told_ = q.view(2, T, ROWS, COLUMNS, 16)
    out = torch.empty_like(lines)
    for b in range(2):
        for t in range(T):
            for r in range(ROWS):
                for c in range(COLUMNS):
                    total = bias.clone()
                    if injector.axis == "S":
                        for dr in (-1, 0, 1):
                            for dc in (-1, 0, 1):
                                if 0 <= r + dr < ROWS and 0 <= c + dc < COLUMNS:
                                    total += weight[:, :, dr + 1, dc + 1] @ told_[b, t, r + dr, c + dc]
                        line = lines[b, t].reshape(-1, 16)
                    else:
                        for dt in (-1, 0, 1):
                            if 0 <= t + dt < T:
                                total += weight[:, :, dt + 1] @ told_[b, t + dt, r, c]
                        line = lines[b, :, r, c]
                    groups = line.reshape(-1, 4, 4)
                    mean = groups.mean((0, 2))
                    std = (groups - mean[:, None]).square().mean((0, 2)).add(1e-5).sqrt()
                    normed = ((lines[b, t, r, c].view(4, 4) - mean[:, None]) / std[:, None]).flatten()
                    out[b, t, r, c] = lines[b, t, r, c] + total[:16] * normed + total[16:]
    return out.view_as(h)


def test_groups_are_normed_over_what_is_no_padding():
    h, valid = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    found = group_norm(h, 2, valid)
    torch.testing.assert_close(found[0], F.group_norm(h.mT, 2).mT[0])
    torch.testing.assert_close(found[1, valid[1]], F.group_norm(h[1:2, valid[1]].mT, 2).mT[0])


# -- the modulator


def bias_of(w1: float = 1.0, w2: float = 1.0, auxiliary: Tensor | None = None, heads: int = 4) -> LineBias:
    places = Grid(1, ROWS, COLUMNS).coordinates()[None, :, 1:].double()
    own = Modulator(heads).double()
    with torch.no_grad():
        own.weight.copy_(torch.tensor([w1, w2]))
    auxiliary = torch.rand(5, ROWS * COLUMNS, 2).double() if auxiliary is None else auxiliary
    return own(places, auxiliary)


def test_decays_are_the_fixed_ones_of_each_head():
    lambdas = bias_of(heads=6).decay
    assert lambdas.tolist() == pytest.approx(
        [math.log(1 - 2 ** -(2 + 4 * k / 6)) for k in range(6)], abs=1e-12
    )
    assert (
        lambdas[0].item() == pytest.approx(math.log(0.75))
        and (lambdas < 0).all()
        and (lambdas.diff() > 0).all()
    )


def test_the_bias_is_manhattan_distance_and_mean_difference_by_definition():
    bias = bias_of(0.7, 1.3)
    dense = bias.dense()
    for g, n, i, j in ((0, 0, 0, 5), (3, 2, 4, 1), (4, 3, 2, 3)):
        near = abs(i // COLUMNS - j // COLUMNS) + abs(i % COLUMNS - j % COLUMNS)
        differ = (bias.auxiliary[g, i] - bias.auxiliary[g, j]).abs().sum()
        expected = bias.decay[n] * (0.7 * near + 1.3 * differ)
        assert dense[g, n, i, j].item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(dense, dense.mT) and not dense.diagonal(dim1=2, dim2=3).any()


def test_without_weights_attention_is_plain_and_each_part_is_as_stated():
    q, k, v = torch.randn(3, 5, 4, ROWS * COLUMNS, 8).double()
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(biased_attention(q, k, v, bias_of(0, 0)), plain, atol=1e-6, rtol=0)
    by_place = bias_of(1, 0).dense()
    assert len(by_place.flatten(1).unique(dim=0)) == 1  # of no image
    grid = by_place[0, 0].view(ROWS, COLUMNS, ROWS, COLUMNS)
    offsets: dict[tuple[int, int], set[float]] = {}
    for r in range(ROWS):
        for c in range(COLUMNS):
            for s in range(ROWS):
                for d in range(COLUMNS):
                    offsets.setdefault((abs(r - s), abs(c - d)), set()).add(
                        round(grid[r, c, s, d].item(), 12)
                    )
    assert all(len(values) == 1 for values in offsets.values()) and len(offsets) == ROWS * COLUMNS
    constant = torch.full((5, ROWS * COLUMNS, 2), 0.3).double()
    assert torch.equal(bias_of(1, 1, constant).dense(), bias_of(1, 0, constant).dense())


@pytest.mark.parametrize("valid", [False, True])
def test_dense_rows_and_scores_on_the_fly_agree_forward_and_backward(valid, monkeypatch):
    q, k, v = torch.randn(3, 5, 4, ROWS * COLUMNS, 8)
    found = []
    for how in ("dense", "rows", "flex"):
        monkeypatch.setattr(modulator, "DENSE_BYTES", 4 * 5 * 4 * 6 * (4 if how == "rows" else 6))
        given = q.clone().requires_grad_()
        own = Modulator(4)
        auxiliary = torch.linspace(-1, 1, 5 * 12).view(5, 6, 2).sin()
        places = Grid(1, ROWS, COLUMNS).coordinates()[None, :, 1:].float()
        keep = torch.tensor([1, 1, 0, 1, 1, 0]).bool().expand(5, -1) if valid else None
        bias = own(places, auxiliary, keep)
        if how == "flex":
            with torch.no_grad():
                out = flex_biased_attention(q, k, v, bias)
            torch.testing.assert_close(out, found[0][0], atol=1e-5, rtol=0)
            continue
        out = biased_attention(given, k, v, bias)
        out.square().sum().backward()
        found.append((out.detach(), given.grad, own.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_that_half_precision_cannot_hold_are_not_rounded_before_the_bias(autocast):
    k = torch.stack([torch.full((8,), 16.0), torch.arange(8.0)], -1)[
        None, None
    ]  # 256 + j: bfloat16 has even ones
    q = torch.tensor([16.0, 1.0]).expand(1, 1, 8, 2)
    v = torch.eye(8)[None, None]
    bias = bias_of_zeros(8)
    expected = ((q.double() @ k.double().mT) * 2**-0.5).softmax(-1)
    kind = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = biased_attention(q.to(kind), k.to(kind), v.to(kind), bias)
    torch.testing.assert_close(found.double(), expected, atol=4e-3, rtol=0)


def bias_of_zeros(length: int) -> LineBias:
    nothing = torch.zeros(1, length, 1)
    return LineBias(nothing, nothing, torch.zeros(2), -torch.ones(1))


def test_a_network_runs_under_autocast():
    model, streams = units(), told(TINY)
    exact = run_of(model, streams)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_of(model, streams)
    assert found.isfinite().all() and not torch.equal(found.float(), exact)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


def test_half_precision_adds_the_bias_in_float32():
    """A bias that bf16 would swallow beside large scores, which the softmax still tells."""
    q = torch.full((1, 1, 2, 4), 16.0, dtype=torch.bfloat16)  # all scores are 512: bf16 has steps of 4 there
    v = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.bfloat16).expand(1, 1, 2, 1)
    bias = LineBias(torch.tensor([[[0.0], [1.0]]]), torch.zeros(1, 2, 1), torch.ones(2), torch.tensor([-1.0]))
    out = biased_attention(q, q, v, bias)[0, 0, :, 0].float()
    e = math.exp(-1)
    assert out.tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)], abs=4e-3)


def test_frames_have_their_own_bias_where_the_image_changes():
    """A single global bias would be wrong: the auxiliary image differs between dates."""
    model, streams = units(), told(TINY)
    tokens = model.tokenize(torch.randn(2, *model.sample_shape), Cond(streams=streams))
    dense = tokens.setting.bias("S", model.blocks[0].space.modulator).dense()
    assert dense.shape == (2 * T, 4, ROWS * COLUMNS, ROWS * COLUMNS)
    assert not torch.allclose(dense[0], dense[1])
    over_time = tokens.setting.bias("T", model.blocks[0].time.modulator)
    assert torch.equal(over_time.place[:, :, 0], streams["days"].repeat_interleave(ROWS * COLUMNS, 0))
    assert over_time.dense().shape == (2 * ROWS * COLUMNS, 4, T, T)


# -- halves


def half_and_setting(axis: str, **changes: Any) -> tuple[Half, Any, UniTS]:
    model = units(**changes).double()
    streams = {k: v.double() for k, v in told(TINY).items()}
    setting = model.tokenize(torch.randn(2, *model.sample_shape).double(), Cond(streams=streams)).setting
    return getattr(model.blocks[0], {"S": "space", "T": "time"}[axis]), setting, model


@pytest.mark.parametrize("axis", ["S", "T"])
def test_a_half_moves_nothing_between_lines(axis):
    half, setting, _ = half_and_setting(axis)
    x, c = torch.randn(2, GRID.length, TINY.width).double(), torch.randn(2, TINY.width).double()
    other = x.clone()
    token = GRID.length // 2
    other[:, token] += 1
    changed = (half(x, c, setting, DIRECT, "") != half(other, c, setting, DIRECT, "")).any(-1)[0]
    frame, place = token // (ROWS * COLUMNS), token % (ROWS * COLUMNS)
    lines = changed.view(T, ROWS * COLUMNS)
    expected = torch.zeros_like(lines)
    expected[frame if axis == "S" else slice(None), slice(None) if axis == "S" else place] = True
    assert torch.equal(lines, expected)


@pytest.mark.parametrize("axis", ["S", "T"])
def test_a_half_equals_its_equations_line_by_line(axis):
    half, setting, _ = half_and_setting(axis)
    x, c = torch.randn(2, GRID.length, TINY.width).double(), torch.randn(2, TINY.width).double()
    shift, scale, alpha, shift2, scale2, alpha2 = half.modulation(F.silu(c))[:, None].chunk(6, -1)
    z = (x.unflatten(1, (T, -1)) + setting.positions(axis)).flatten(1, 2)
    q = setting.space if axis == "S" else setting.time
    h = half.injector(z, q, GRID)
    h = F.layer_norm(h, (TINY.width,), eps=1e-6) * (1 + scale) + shift
    attended = torch.zeros_like(z)
    every = torch.arange(GRID.length).view(T, -1)
    dense = setting.bias(axis, half.modulator).dense().unflatten(0, (2, -1))
    for line, tokens in enumerate(every if axis == "S" else every.T):
        for b in range(2):
            qkv = half.qkv(h[b, tokens]).view(len(tokens), 3, TINY.heads, -1)
            heads = []
            for n in range(TINY.heads):
                scores = qkv[:, 0, n] @ qkv[:, 1, n].T / (TINY.width / TINY.heads) ** 0.5
                heads.append((scores + dense[b, line, n]).softmax(-1) @ qkv[:, 2, n])
            attended[b, tokens] = half.out(torch.cat(heads, -1))
    z = z + alpha * attended
    expected = z + alpha2 * half.mlp(
        F.layer_norm(z, (TINY.width,), eps=1e-6) * (1 + scale2) + shift2, DIRECT, ""
    )
    assert torch.allclose(half(x, c, setting, DIRECT, ""), expected, atol=1e-9)


# -- days, and what is told


def test_dates_in_another_order_give_the_output_in_that_order():
    """With kernels of one date: wider ones read the neighbours of a date in the order that they are given in."""
    order = torch.tensor([2, 0, 3, 1])
    for positions in ("none", "days"):
        model = units(kernel=1, positions=positions).double()
        streams = {k: v.double() for k, v in told(TINY).items()}
        x = torch.randn(2, *model.sample_shape).double()
        moved = {
            k: v if k == "place" else v[:, order] if v.ndim == 2 else v[:, :, order]
            for k, v in streams.items()
        }
        if positions == "none":  # the history of the optical image is in the order of time, radar is not
            streams, moved = ({k: v for k, v in s.items() if k != "clouds"} for s in (streams, moved))
        t = torch.rand(2).double()
        out = model(x, t, Cond(streams=streams))
        assert torch.allclose(model(x[:, :, order], t, Cond(streams=moved)), out[:, :, order], atol=1e-10)
    wide = units().double()
    assert not torch.allclose(
        wide(x[:, :, order], t, Cond(streams=moved)), wide(x, t, Cond(streams=streams))[:, :, order]
    )


def test_days_count_from_the_first_and_the_number_of_a_frame_does_not():
    model, streams = units(), told(TINY)
    out = run_of(model, streams)
    torch.testing.assert_close(run_of(model, streams, days=streams["days"] + 1000), out)
    assert not torch.allclose(run_of(model, streams, days=streams["days"] * 2), out)
    by_frame = units(positions="frames", modulator=False)
    frames = run_of(by_frame, streams)
    assert torch.equal(run_of(by_frame, streams, days=streams["days"] * 2), frames)


def test_padding_at_the_end_changes_nothing_of_the_dates_that_are_there():
    model, streams = units(), told(TINY)
    short = {k: v if k == "place" else v[:, :2] if v.ndim == 2 else v[:, :, :2] for k, v in streams.items()}
    x, t = torch.randn(2, *model.sample_shape), torch.rand(2)
    padded = cond_of(streams, present=torch.tensor([[1.0, 1, 0, 0]] * 2))
    assert torch.allclose(
        model(x, t, padded)[:, :, :2], model(x[:, :, :2], t, Cond(streams=short)), atol=2e-5
    )
    assert not torch.allclose(
        model(x, t, Cond(streams=streams))[:, :, :2], model(x, t, padded)[:, :, :2], atol=1e-3
    )


@pytest.mark.parametrize("below", [-1.0, 5.0, float("nan")])
@pytest.mark.parametrize("radar", [0, 2])
def test_what_is_under_a_cloud_is_never_read(below, radar):
    model = units(radar_channels=radar)
    streams = told(model.config)
    out = run_of(model, streams)
    hidden = streams["clouds"].bool()
    assert torch.equal(run_of(model, streams, optical=streams["optical"].masked_fill(hidden, below)), out)
    clear = torch.where(hidden, streams["optical"], streams["optical"] + 0.1)
    assert not torch.allclose(run_of(model, streams, optical=clear), out)


def test_the_second_sensor_can_be_left_out_or_be_absent_of_a_sample():
    model, streams = units(), told(TINY)
    whole, without = run_of(model, streams), run_of(model, streams, radar=None)
    assert whole.shape == without.shape and not torch.allclose(whole, without)
    x, t = torch.randn(2, *model.sample_shape), torch.rand(2)
    absent = {"radar": torch.tensor([False, True])}
    mixed = model(x, t, Cond(streams=streams, absent=absent))
    torch.testing.assert_close(mixed[0], model(x, t, Cond(streams=streams))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], model(x, t, cond_of(streams, radar=None))[1], atol=1e-5, rtol=1e-5)
    broken = streams["radar"].clone()
    broken[1] = float("nan")
    assert torch.equal(model(x, t, Cond(streams={**streams, "radar": broken}, absent=absent)), mixed)


def test_radar_is_standardised_by_what_the_model_remembers():
    plain, scaled = units(), units(radar_mean=(-14.0, -22.0), radar_std=(4.0, 5.0))
    streams = told(TINY)
    mean, std = (torch.tensor(v).view(2, 1, 1, 1) for v in ((-14.0, -22.0), (4.0, 5.0)))
    decibels = streams["radar"] * std + mean
    torch.testing.assert_close(
        run_of(scaled, streams, radar=decibels), run_of(plain, streams), atol=1e-4, rtol=1e-4
    )


def test_the_history_of_a_pixel_is_its_last_clear_value():
    optical = torch.arange(1.0, 5.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 1, 3).clone()
    hidden = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool().T.view(1, 1, 4, 1, 3)
    found = last_clear(optical.masked_fill(hidden, float("nan")), hidden)[0, 0, :, 0]
    assert found.T.tolist() == [[2, 2, 2, 2], [1, 1, 1, 4], [0, 0, 0, 0]]
    images = torch.randn(1, 2, 4, 8, 12)
    means = patch_means(images, 4)
    assert means.shape == (1, T * ROWS * COLUMNS, 2)
    torch.testing.assert_close(means[0, 1], images[0, :, 0, :4, 4:8].mean((1, 2)) / 2)


def test_concatenation_alone_injects_nothing_later():
    model, streams = units(injector="concat"), told(TINY)
    assert not any(isinstance(part, ConditionInjector) for part in model.modules())
    x = torch.randn(2, *model.sample_shape)
    tokens = model.tokenize(x, Cond(streams=streams))
    assert tokens.setting.space is None and tokens.setting.time is None
    assert not torch.allclose(
        run_of(model, streams), run_of(model, streams, optical=streams["optical"].flip(0))
    )


def test_streams_that_do_not_fit_are_refused_in_one_line():
    model, streams = units(), told(TINY)
    with pytest.raises(ShapeError, match=r"UniTS: days \[2, 3\] should be \[2, 4\]"):
        run_of(model, streams, days=streams["days"][:, :3])
    with pytest.raises(ShapeError, match=r"UniTS: radar \[2, 1, 4, 8, 12\] should be \[2, 2, 4, 8, 12\]"):
        run_of(model, streams, radar=streams["radar"][:, :1])
    with pytest.raises(ConfigError, match="UniTS: optical is needed"):
        from ditkit.api.generate import generate

        generate(model, guidance=1.0)


def test_without_any_image_all_is_white():
    model = units(radar_channels=0)
    filled, hidden = model.filled(torch.zeros(1, *model.sample_shape), Cond())
    assert (filled == CLOUD).all() and hidden.all()


# -- with other methods


def test_a_cache_saves_work_on_it_and_its_neutral_setting_changes_nothing():
    model, streams = units(), told(TINY)
    exact = sample(model, Cond(streams=streams), [0, 1], steps=6)
    neutral = sample(model, Cond(streams=streams), [0, 1], steps=6, policies=[TaylorSeer().exact()])
    assert torch.equal(neutral.samples, exact.samples)
    cached = sample(model, Cond(streams=streams), [0, 1], steps=6, policies=[TaylorSeer(interval=2, order=1)])
    assert cached.full < exact.full == 6 and cached.samples.isfinite().all()
    assert 0 < (cached.samples - exact.samples).abs().max() < (exact.samples.abs().max())


@pytest.mark.parametrize("policy", [RAS(), Neighbourhood(radius=2, block=8)])
def test_methods_that_move_rows_or_replace_the_mask_are_refused_by_name(policy):
    with pytest.raises((ConfigError, NoEffectError), match=type(policy).__name__):
        sample(units(), Cond(streams=told(TINY)), [0, 1], steps=6, policies=[policy])


def test_guidance_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"UniTS: guidance by its branch 'uncond'.*guidance=1"):
        sample(units(), Cond(streams=told(TINY)), [0, 1], steps=2, guidance=2.0)


def test_macs_are_all_counted_and_the_modulation_of_a_half_is_one_layer():
    model, streams = units(), told(TINY)
    count = count_macs(model, torch.randn(2, *model.sample_shape), torch.rand(2), Cond(streams=streams))
    assert count.uncounted == () and count.by_kind["matmul"] > 0 and count.by_kind["convolution"] > 0
    half = model.blocks[0].space
    assert Parts(half.modulation, activated(torch.randn(2, TINY.width))).whole().shape == (
        2,
        1,
        6 * TINY.width,
    )
    assert set(PRESETS) == {"S2", "S1+S2", "forecast", "change"}
