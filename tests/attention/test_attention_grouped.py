"""GRAT against its specification: groups, counts, the text rule, and dense attention under a mask of every pair."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch

from ditkit.attention import Grouped
from ditkit.attention.grouped import group_order
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from patterns_support import (
    Masked,
    grouped_meets,
    planned_mask,
    predicted,
    prompt,
    tiny_clip_model,
    token_mask,
)


@pytest.mark.parametrize("grid", [Grid(1, 8, 12), Grid(1, 9, 7), Grid(4, 4, 8), Grid(5, 6, 7)])
@pytest.mark.parametrize("sides", [(1, 4, 4), (2, 2, 4), (4, 4, 4)])
def test_order_is_a_loop_over_groups(grid: Grid, sides: tuple[int, int, int]) -> None:
    expected = []
    groups = [range(-(-n // side)) for n, side in zip(grid.shape, sides, strict=True)]
    for a in groups[0]:
        for b in groups[1]:
            for c in groups[2]:
                for t in range(a * sides[0], (a + 1) * sides[0]):
                    for h in range(b * sides[1], (b + 1) * sides[1]):
                        for w in range(c * sides[2], (c + 1) * sides[2]):
                            inside = t < grid.frames and h < grid.height and w < grid.width
                            place = (t * grid.height + h) * grid.width + w
                            expected.append(place if inside else -1)
    assert group_order(grid, sides).tolist() == expected


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize(
    ("grid", "group"),
    [
        (Grid(1, 12, 8), (4, 4)),
        (Grid(1, 9, 14), (4, 4)),
        (Grid(4, 8, 4), (2, 2, 2)),
        (Grid(3, 5, 6), (2, 2, 4)),
    ],
)
@pytest.mark.parametrize(
    "setting", [{"reach": 0}, {"reach": 1}, {"reach": 2}, {"meeting": "crisscross"}], ids=str
)
def test_a_plan_is_the_mask_of_every_pair(
    grid: Grid, group: tuple[int, ...], setting: dict[str, object], others: int
) -> None:
    pattern = Grouped(group=group, block=8, **setting)  # type: ignore[arg-type]
    expected = token_mask(grid, grouped_meets(pattern, grid.frames > 1))
    mask = planned_mask(pattern.plan(grid, others))
    assert torch.equal(mask[: grid.length, : grid.length], expected)
    assert mask[grid.length :].all() and mask[:, grid.length :].all()


@pytest.mark.parametrize(
    ("grid", "setting", "most", "total"),
    [
        (Grid(1, 512, 512), {}, 9, 8836),
        (Grid(1, 512, 512), {"meeting": "crisscross"}, 63, 1024 * 63),
        (Grid(32, 48, 80), {}, 27, 22 * 16 * 28),
        (Grid(32, 48, 80), {"meeting": "crisscross"}, 165, 480 * 165),
    ],
    ids=["FLUX B", "FLUX X", "HunyuanVideo B", "HunyuanVideo X"],
)
def test_group_counts_of_the_specification(
    grid: Grid, setting: dict[str, str], most: int, total: int
) -> None:
    plan = Grouped(**setting).plan(grid, 0)  # type: ignore[arg-type]
    blocks = 256 // 128
    assert plan.visited == total * blocks**2 and plan.partial == 0
    assert int(plan.counts[0].amax()) == most * blocks


def test_only_the_tail_of_the_text_is_partial() -> None:
    plan = Grouped().plan(Grid(1, 64, 64), 200)
    rows, columns = plan.blocks
    partial = plan.index[plan.tile != 0]
    assert set(partial.tolist()) == {columns - 1} and plan.partial == rows
    assert plan.visible_keys[0, 0, -1] == 4096 + 200


SETTINGS = [
    Grouped(group=(2, 2, 2), block=8, kernel="cpu"),
    Grouped(group=(2, 4, 4), block=16, kernel="cpu", reach=0),
    Grouped(group=(2, 2, 4), block=8, kernel="reference", meeting="crisscross"),
]


@pytest.mark.parametrize("pattern", SETTINGS, ids=str)
@pytest.mark.parametrize("text", [0, 7])
def test_a_model_under_the_pattern_is_one_under_the_mask(pattern: Grouped, text: int) -> None:
    """The grid is 4 x 6 x 10: groups reach beyond it, and prompts differ in length."""
    model = tiny_clip_model(text)
    x = torch.randn(3, 2, 4, 12, 20, generator=torch.Generator().manual_seed(1)).double()
    cond = prompt(3, (7, 3, 1)) if text else Cond()
    expected = predicted(model, Masked(grouped_meets(pattern, True)), x, cond)
    assert torch.allclose(predicted(model, pattern, x, cond), expected, atol=1e-10)
    assert not torch.allclose(predicted(model, None, x, cond), expected, atol=1e-3)


def test_what_covers_the_grid_is_dense() -> None:
    model = tiny_clip_model(7)
    x, cond = torch.randn(2, 2, 4, 12, 20).double(), prompt(2, (7, 2))
    dense = predicted(model, None, x, cond)
    for setting in ({"reach": 9, "group": (2, 2, 2)}, {"reach": 0, "group": (4, 8, 16)}):
        pattern = Grouped(block=8, kernel="cpu", **setting)  # type: ignore[arg-type]
        assert torch.allclose(predicted(model, pattern, x, cond), dense, atol=1e-10)


def test_dense_evaluations_and_layers_are_dense() -> None:
    """Also where slots are padded: their keys must not enter a dense softmax."""
    model = tiny_clip_model(7)
    x, cond = torch.randn(2, 2, 4, 12, 20).double(), prompt(2, (7, 3))
    dense = predicted(model, None, x, cond)
    settings = {"group": (4, 4, 4), "block": 8, "kernel": "cpu", "reach": 0}
    for pattern in (Grouped(**settings, warmup=2), Grouped(**settings, warmup=3, dense=(0,))):  # type: ignore[arg-type]
        assert torch.allclose(predicted(model, pattern, x, cond, index=1), dense, atol=1e-10)
    some = predicted(model, Grouped(**settings, dense=(1,)), x, cond)  # type: ignore[arg-type]
    assert not torch.allclose(some, dense, atol=1e-3)


def test_switched_off_where_it_does_not_pay() -> None:
    """240 tokens: dense attention takes so little that the pattern leaves the call alone, and says so."""
    model = tiny_clip_model()
    x = torch.randn(1, 2, 4, 12, 20).double()
    trajectory = Trajectory(model.sites(), [Grouped(group=(2, 2, 2), block=8)], 1)
    call = Call(0, 1, 0.5, layout=model.layout((2, 4, 12, 20)))
    out = trajectory.leave(call, model(x, torch.full((1,), 0.5).double(), Cond(), trajectory.run(call)))
    assert torch.equal(out, model(x, torch.full((1,), 0.5).double(), Cond()))
    with pytest.raises(NoEffectError, match="off 240 keys, dense attention is faster below 256"):
        trajectory.finish()


def test_switched_off_where_padding_costs_more() -> None:
    """405 tokens, which groups of 256 make 2,048 rows: they would cost twice dense attention, and every layer more."""
    model = tiny_clip_model(frames=5, size=(18, 18))
    pattern = Grouped(group=(4, 8, 8), reach=0)
    call = Call(0, 1, 0.5, layout=model.layout((2, 5, 18, 18)))
    (session,) = Trajectory(model.sites(), [pattern], 1).sessions
    assert session.enter(call) == {}
    assert session.remarks["visited"] == 1.9977
    assert str(session.remarks["off"]).startswith("padding makes 5.06 times the rows")


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1, 64, 64), (1, 16, 16)),
        ((1, 8, 64), (1, 8, 16)),
        ((2, 30, 52), (2, 8, 8)),
        ((13, 30, 45), (4, 8, 8)),
    ],
)
def test_groups_end_where_a_shorter_axis_does(
    shape: tuple[int, int, int], sides: tuple[int, int, int]
) -> None:
    grid = Grid(*shape)
    order = Grouped().plan(grid, 0).order
    assert order is not None and torch.equal(order, group_order(grid, sides))


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((1024, 1, 1), "groups of 4 x 1 x 1 tokens on a grid of 1024 x 1 x 1, .* group=128[+]1[+]1 is one"),
        ((3, 30, 52), "groups of 3 x 8 x 8 tokens on a grid of 3 x 30 x 52, .* group=4[+]8[+]4 is one"),
        ((1, 12, 64), "groups of 1 x 12 x 16 tokens on a grid of 1 x 12 x 64, .* group=1[+]8[+]16 is one"),
    ],
)
def test_a_group_that_would_fit_is_named(shape: tuple[int, int, int], line: str) -> None:
    with pytest.raises(ShapeError, match=line) as caught:
        Grouped().plan(Grid(*shape), 0)
    group = re.findall(r"group=([\d+]+)", str(caught.value))[0]
    plan = Grouped(group=tuple(map(int, group.split("+")))).plan(Grid(*shape), 0)
    assert plan.rows_ratio < 1.5


def test_the_receipt_says_what_was_visited() -> None:
    model = tiny_clip_model()
    pattern = Grouped(group=(2, 2, 2), block=8, kernel="cpu", reach=0)
    trajectory = Trajectory(model.sites(), [pattern], 1)
    call = Call(0, 1, 0.5, layout=model.layout((2, 4, 12, 20)))
    x = torch.randn(1, 2, 4, 12, 20).double()
    trajectory.leave(call, model(x, torch.full((1,), 0.5).double(), Cond(), trajectory.run(call)))
    (receipt,) = trajectory.finish()
    groups = prod((2, 3, 5))
    told = receipt.as_dict()
    assert told["visited"] == round(1 / groups, 4) and told["kernel"] == "cpu"
    assert told["lanes"] == {"cond": {"computed": "", "sparse": "0"}}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"group": (3, 5)}, "a group of 3 x 5 tokens, expected a multiple of block=128"),
        ({"group": (16,)}, "group=(16,), expected two or three positive integers"),
        ({"reach": -1}, "reach=-1 should be at least 0"),
        ({"meeting": "cross"}, "unknown meeting 'cross'"),
        ({"block": 100}, "block=100 should be one of 8, 16, 32, 64, 128, 256"),
        ({"warmup": -1}, "warmup=-1"),
        ({"kernel": "cuda"}, "unknown kernel 'cuda'"),
        ({"dense": (-2,)}, "dense=(-2,)"),
    ],
)
def test_bad_settings(given: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Grouped(**given)  # type: ignore[arg-type]
    assert line in str(caught.value)


@pytest.mark.parametrize("grid", [Grid(1, 32, 32), Grid(8, 8, 12), Grid(3, 9, 7)])
def test_a_wider_reach_sees_all_that_a_narrower_one_does_and_loses_less(grid: Grid) -> None:
    """So the share of the softmax that is lost falls with the reach, whatever q and k are; the last loses nothing."""
    group = (4, 4) if grid.frames == 1 else (2, 4, 4)
    draw = torch.Generator().manual_seed(5)
    q, k = (2 * torch.randn(grid.length, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = (q @ k.T).softmax(-1)
    before, lost = torch.zeros(grid.length, grid.length, dtype=torch.bool), weights.sum(-1)
    for reach in range(8):
        plan = Grouped(group=group, reach=reach, block=16).plan(grid, 0)
        pairs = planned_mask(plan)
        now = (weights * ~pairs).sum(-1)
        assert (pairs | ~before).all() and (now <= lost + 1e-12).all()
        before, lost = pairs, now
    assert pairs.all() and lost.abs().max() == 0


def test_two_patterns_or_rows_are_refused_by_name() -> None:
    from ditkit.caching import RAS

    sites = tiny_clip_model().sites()
    for other in (Grouped(meeting="crisscross"), RAS()):
        with pytest.raises(ConflictError, match="both own 'rows'"):
            Trajectory(sites, [Grouped(), other], 4)
    with pytest.raises(ConfigError, match="dense=2, expected a place among 2 attentions"):
        Trajectory(sites, [Grouped(dense=(0, 2))], 4)
    with pytest.raises(ConfigError, match=r"dense=\(0, 1\) names all 2 attentions"):
        Trajectory(sites, [Grouped(dense=(0, 1))], 4)
    with pytest.raises(ConfigError, match="warmup=4, expected fewer than total=4"):
        Trajectory(sites, [Grouped(warmup=4)], 4)


def test_a_kernel_that_is_not_here_is_refused_before_the_first_block():
    """Also where the first evaluations are dense."""
    model = tiny_clip_model()
    blocks: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: blocks.append(1))
    x = torch.zeros(1, *model.sample_shape).double()
    with pytest.raises(ConfigError, match=r"kernel flex: queries are on cpu, expected cuda"):
        predicted(model, Grouped(group=(2, 2, 4), block=16, warmup=2, kernel="flex"), x, Cond())
    assert not blocks


def test_a_mask_that_differs_from_query_to_query_or_weighs_keys_is_refused():
    model = tiny_clip_model()
    pattern = Grouped(group=(2, 2, 4), block=16, kernel="cpu")
    call = Call(0, 2, 0.5, layout=model.layout(model.sample_shape))
    (core, *_), rows = pattern.start(model.sites(), 2).streams, Grid(4, 6, 10).length
    run = Trajectory(model.sites(), [pattern], 2).run(call)
    slots = pattern.plan(Grid(4, 6, 10), 0).queries
    q = k = v = torch.zeros(1, 2, slots, 12).double()
    with pytest.raises(ShapeError, match=rf"a mask of \[1, 1, {rows}, {rows}\], expected \[B, 1, 1, keys\]"):
        run.site(core, lambda *x: x[0], q, k, v, torch.ones(1, 1, rows, rows, dtype=torch.bool))
    for added in (-0.5, 1.0, float("nan")):
        weights = torch.zeros(1, 1, 1, rows).index_fill(3, torch.tensor([3]), added)
        with pytest.raises(
            ShapeError, match=f"a mask that adds {added:g} to scores, expected 0 or at most -10000"
        ):
            run.site(core, lambda *x: x[0], q, k, v, weights)
