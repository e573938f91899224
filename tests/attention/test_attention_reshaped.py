"""Re-ttention against its specification: what is kept, when, counts, and the equations over all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.attention import Band, Reshaped, ReshapedGrouped, ReshapedNeighbourhood
from ditkit.attention.reshaped import Kept, Reshape
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory
from ditkit.nn.blocks import attention
from ditkit.ops.block_sparse_attention import attend_reference
from patterns_support import band_meets, planned_mask, tiny_clip_model, token_mask

CORE = (Site("c", "core", "joint"),)
KEY = ("main", "cond", "c")
TOTAL = 20
PICTURE, CLIP = Grid(1, 8, 12), Grid(3, 5, 6)
BAND = Reshaped(keep=0.25, block=8, kernel="cpu")
CIRCLE = ReshapedNeighbourhood(radius=3, block=8, kernel="cpu")
GROUPS = ReshapedGrouped(group=(2, 2, 4), reach=0, block=8, kernel="reference")
TEXT = 5


def layout(grid: Grid, text: int = 0) -> tuple[Segment, ...]:
    after = (Segment("text", Grid(1, 1, text), text),) if text else ()
    return (Segment("image", grid, grid.length), *after)


def drawn(policy: Reshape, grid: Grid, seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    """q, k, v [B, 2, S, 8] of a sequence with text, in the order of the plan, float64."""
    rows = policy.plan(grid, TEXT).queries
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(batch, 2, rows, 8, generator=generator).double() for _ in range(3))


def run(
    trajectory: Trajectory, index: int, grid: Grid, qkv: Sequence[Tensor], lane: str = "cond", masks: Any = ()
) -> Tensor:
    """One evaluation of the only attention."""
    call = Call(index, TOTAL, 0.5, lane, layout=layout(grid, TEXT))
    out: Tensor = trajectory.run(call).site("c", attention, *qkv, *masks)
    trajectory.leave(call, None)
    return out


def kept(trajectory: Trajectory, key: tuple[str, ...] = KEY) -> Kept:
    state: Kept = trajectory.sessions[0].state[key]
    return state


def whole(policy: Reshape, grid: Grid, qkv: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Dense attention over the tokens, of the tokens."""
    plan = policy.plan(grid, TEXT)
    tokens = [x[:, :, plan.inverse] for x in qkv]
    return attend_reference(*tokens, mask=mask).out


def tokens(policy: Reshape, grid: Grid, x: Tensor) -> Tensor:
    return x[:, :, policy.plan(grid, TEXT).inverse]


CASES = pytest.mark.parametrize(
    ("policy", "grid"),
    [(BAND, PICTURE), (BAND, CLIP), (GROUPS, CLIP), (CIRCLE, PICTURE)],
    ids=["picture", "clip", "groups", "circle"],
)


@CASES
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_kept_is_the_explicit_sums(policy: Reshape, grid: Grid, padded: bool) -> None:
    """rho of the sums of weights, R = (A o not M) V, and rho O_M = (A o M) V: masking after the softmax."""
    qkv = drawn(policy, grid)
    plan = policy.plan(grid, TEXT)
    q, k, v = (tokens(policy, grid, x) for x in qkv)
    visible_keys = torch.ones(2, 1, 1, q.shape[2], dtype=torch.bool)
    masks: tuple[Tensor, ...] = ()
    if padded:
        visible_keys[1, ..., -3:] = False
        masks = (
            torch.cat(
                (torch.ones(2, 1, 1, plan.queries - TEXT, dtype=torch.bool), visible_keys[..., -TEXT:]), -1
            ),
        )
    weight = (q @ k.mT / 8**0.5).masked_fill(~visible_keys, -torch.inf).softmax(-1)
    mask = planned_mask(plan)
    assert not mask.all() and mask[grid.length :].all() and mask[:, grid.length :].all()

    trajectory = Trajectory(CORE, [policy], TOTAL)
    out = run(trajectory, policy.warmup, grid, qkv, masks=masks)
    state = kept(trajectory)
    assert state.residual is not None and state.ratio.dtype == torch.float64
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-13)
    close(tokens(policy, grid, out), weight @ v)
    ratio, residual = (tokens(policy, grid, x) for x in (state.ratio, state.residual))
    close(ratio, (weight * mask).sum(-1))
    close(residual, (weight * ~mask) @ v)
    sparse = attend_reference(q, k, v, mask & visible_keys).out
    close(ratio[..., None] * sparse, (weight * mask) @ v)
    close(ratio[..., grid.length :], torch.ones_like(ratio[..., grid.length :]))
    assert 0 < ratio[..., : grid.length].amin() < ratio[..., : grid.length].amax() < 1


@CASES
def test_unchanged_queries_give_dense_and_the_ramp(policy: Reshape, grid: Grid) -> None:
    """The k-th sparse evaluation after a cache one is dense + (k - 1) ramp O_M, exactly dense without the ramp."""
    for ramp in (0.0, 0.04):
        chosen = type(policy)(**{**vars(policy), "ramp": ramp})
        qkv = drawn(chosen, grid)
        q, k, v = (tokens(chosen, grid, x) for x in qkv)
        sparse = attend_reference(q, k, v, planned_mask(chosen.plan(grid, TEXT))).out
        trajectory = Trajectory(CORE, [chosen], TOTAL)
        for index in range(TOTAL):
            uses = 0 if index < 5 else max(0, index % 5 - 1)
            expected = whole(chosen, grid, qkv) + uses * ramp * sparse
            if index >= 5:  # before, the model's own attention hides no slots that are padding
                out = tokens(chosen, grid, run(trajectory, index, grid, qkv))
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_a_mask_of_all_pairs() -> None:
    """rho = 1 and R = 0: dense without a ramp, 1 + k ramp times it with one, unless it is clamped."""
    everything = ReshapedGrouped(group=(2, 4), reach=9, block=8, kernel="cpu")
    qkv = drawn(everything, PICTURE)
    dense = whole(everything, PICTURE, qkv)
    for setting, factor in ({"ramp": 0.0}, 1.0), ({}, 1 + 2 * 0.04), ({"clamp": True}, 1.0):
        policy = ReshapedGrouped(**{**vars(everything), **setting})  # type: ignore[arg-type]
        trajectory = Trajectory(CORE, [policy], TOTAL)
        for index in range(5, 9):
            out = run(trajectory, index, PICTURE, qkv)
        state = kept(trajectory)
        assert state.residual is not None and state.uses == (6, 7, 8)
        assert float((state.ratio - 1).abs().amax()) < 1e-14 and float(state.residual.abs().amax()) < 1e-13
        torch.testing.assert_close(tokens(policy, PICTURE, out), factor * dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("setting", "total", "cached", "sparse"),
    [
        ({}, 20, [5, 10, 15], 12),
        ({"warmup": 10}, 50, list(range(10, 50, 5)), 32),
        ({"warmup": 15}, 50, list(range(15, 50, 5)), 28),
        ({"warmup": 4, "every": 3, "stages": 2}, 17, [4, 5, 10, 11, 16], 8),
    ],
    ids=["PixArt", "Hunyuan-DiT", "CogVideoX", "Heun"],
)
def test_the_plan_of_evaluations(setting: dict[str, int], total: int, cached: list[int], sparse: int) -> None:
    policy = Reshaped(**setting)
    modes = policy.modes(total)
    assert [i for i, mode in enumerate(modes) if mode == "cache"] == cached
    assert [i for i, mode in enumerate(modes) if mode == "dense"] == list(range(policy.warmup))
    assert modes.count("sparse") == sparse
    trajectory = Trajectory(CORE, [Reshaped(**setting, keep=0.25, block=8, kernel="cpu")], total)
    qkv = drawn(BAND, PICTURE)
    for index in range(total):
        run(trajectory, index, PICTURE, qkv)
        if index >= policy.warmup:
            assert (kept(trajectory).place == index) == (modes[index] == "cache")


@pytest.mark.parametrize("others", [0, 5, 11])
@pytest.mark.parametrize("grid", [Grid(1, 8, 12), Grid(1, 9, 7), Grid(3, 5, 6), Grid(13, 2, 5)])
@pytest.mark.parametrize("keep", [0.01, 0.25, 1.0])
def test_a_plan_is_the_mask_of_every_pair(grid: Grid, keep: float, others: int) -> None:
    band = Band(keep=keep, block=8)
    expected, mask = token_mask(grid, band_meets(band, grid)), planned_mask(band.plan(grid, others))
    assert torch.equal(mask[: grid.length, : grid.length], expected)
    assert mask[grid.length :].all() and mask[:, grid.length :].all()


def test_counts_of_the_specification() -> None:
    for block, visited in ((64, 3 * 64 - 2), (128, 3 * 32 - 2)):
        picture = Band(block=block).plan(Grid(1, 64, 64), 0)
        assert (
            int(picture.visible_keys.amax()) == 129 and picture.visited == visited and picture.order is None
        )
    clip = Grid(13, 30, 45)
    with_text = Band().plan(clip, 226)
    assert with_text.visible_keys[0, 0, with_text.inverse[6 * 1350 + 675]] == 785
    assert set(with_text.visible_keys[0, 0, -226:].tolist()) == {17_776}
    for block, visited, percent in ((64, 2995, 3.9), (128, 954, 5.0)):
        plan = Band(block=block).plan(clip, 0)
        assert plan.visited == visited and 100 * plan.density == pytest.approx(percent, abs=0.1)
        assert f"{100 * plan.pairs / clip.length**2:.2f}" == "3.16"


def test_a_call_made_again_gives_the_same() -> None:
    once, twice = (Trajectory(CORE, [BAND], TOTAL) for _ in range(2))
    for index in range(5, 13):
        qkv = drawn(BAND, CLIP, seed=index)
        out = run(once, index, CLIP, qkv)
        assert torch.equal(run(twice, index, CLIP, qkv), out)
        assert torch.equal(run(twice, index, CLIP, qkv), out)


def test_another_batch_layout_or_lane_is_cached_first() -> None:
    trajectory = Trajectory(CORE, [BAND], TOTAL)
    run(trajectory, 5, CLIP, drawn(BAND, CLIP))
    for index, grid, batch, lane in (
        (6, CLIP, 4, "cond"),
        (7, CLIP, 2, "cond"),
        (8, Grid(3, 6, 5), 2, "cond"),
        (9, CLIP, 2, "uncond"),
    ):
        qkv = drawn(BAND, grid, seed=index, batch=batch)
        out = run(trajectory, index, grid, qkv, lane)
        torch.testing.assert_close(tokens(BAND, grid, out), whole(BAND, grid, qkv), rtol=0, atol=1e-12)
        assert kept(trajectory, ("main", lane, "c")).place == index
    assert kept(trajectory).place == 8


def test_types_of_what_is_kept() -> None:
    q, k, v = (x.bfloat16() for x in drawn(BAND, PICTURE))
    dense = whole(BAND, PICTURE, (q, k, v))
    held = {}
    for residual in ("model", "bfloat16", "none"):
        policy = Reshaped(keep=0.25, block=8, kernel="cpu", ramp=0.0, residual=residual)  # type: ignore[arg-type]
        trajectory = Trajectory(CORE, [policy], TOTAL)
        for index in (5, 6):
            out = run(trajectory, index, PICTURE, (q, k, v))
        state = kept(trajectory)
        assert out.dtype == torch.bfloat16 and state.ratio.dtype == torch.float32
        assert (state.residual is None) == (residual == "none")
        held[residual] = trajectory.sessions[0].bytes()
        near_dense = torch.allclose(tokens(policy, PICTURE, out).float(), dense.float(), atol=0.03)
        assert near_dense == (residual != "none")
    rows = 2 * 2 * q.shape[2]
    assert held == {"model": rows * (4 + 2 * 8), "bfloat16": rows * (4 + 2 * 8), "none": rows * 4}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"keep": 0}, "Reshaped: keep=0 should lie in (0, 1]"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"every": 1}, "every=1 should be at least 2"),
        ({"stages": 0}, "stages=0 should be at least 1"),
        ({"stages": 2}, "warmup=5, expected whole steps of stages=2 evaluations"),
        ({"ramp": float("nan")}, "ramp=nan should be a finite number"),
        ({"clamp": 1}, "clamp=1 should be true or false"),
        ({"residual": "float8"}, "unknown residual 'float8'; did you mean 'bfloat16'?"),
        ({"block": 48}, "block=48"),
    ],
)
def test_bad_settings(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Reshaped(**given)
    assert line in str(caught.value)


def test_keys_beyond_the_models_own_are_refused() -> None:
    for given in ({"pooled": 4}, {"scaled_from": 4608}):
        with pytest.raises(ConfigError, match="expected 0: what is kept is a part of dense attention"):
            ReshapedNeighbourhood(**given)  # type: ignore[arg-type]


def test_too_few_evaluations_are_refused() -> None:
    sites = tiny_clip_model().sites()
    with pytest.raises(
        ConfigError, match="warmup=5 and a cache step leave none of total=6 evaluations sparse"
    ):
        Trajectory(sites, [Reshaped()], 6)
    Trajectory(sites, [Reshaped()], 7)
    Trajectory(sites, [Reshaped().exact()], 6)
