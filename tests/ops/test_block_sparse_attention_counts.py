"""Plans of three published patterns, in a few lines each, against the counts of their specifications."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditkit.core.grid import Grid
from ditkit.ops.block_sparse_attention import BlockPlan, build_plan, near_blocks


def circle(grid: Grid, radius: int, block: int = 128) -> BlockPlan:
    """CLEAR (arXiv 2412.16112): image tokens closer than `radius`, in the order of the grid's tiles."""
    at, order = grid.coordinates()[:, 1:], grid.tile_order()
    y, x = at.int().unbind(1)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (y[query] - y[key]) ** 2 + (x[query] - x[key]) ** 2 < radius**2

    kept = near_blocks(at[order], block, (radius - 1, radius - 1))
    return build_plan(grid.length, block=block, order=order, kept=kept, allowed=allowed)


def groups(counts: Grid, size: int, meets: Callable[[Tensor], Tensor], block: int = 128) -> BlockPlan:
    """GRAT (arXiv 2505.14687): groups of `size` tokens that meet by the distance of their places, [G, G, 3]."""
    at = counts.coordinates()
    kept = meets((at[:, None] - at).abs()).repeat_interleave(size // block, 0)
    return build_plan(counts.length * size, block=block, kept=kept.repeat_interleave(size // block, 1))


def band(
    frames: int, area: int, width: int, text: int = 0, tiled: bool = True, block: int = 128
) -> BlockPlan:
    """Re-ttention (arXiv 2505.22918): the same place in every frame, give or take half of `width`; text sees all."""
    place = torch.arange(area, dtype=torch.int32).repeat(frames)
    place = torch.cat((place.new_full((text,), -1), place))

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        p, q = place[query], place[key]
        return ((p - q).abs() <= width // 2) | (p < 0) | (q < 0)

    order = place.argsort(stable=True) if tiled else None
    kept = near_blocks(place[order][:, None], block, (width // 2,)) if tiled and not text else None
    return build_plan(len(place), block=block, order=order, kept=kept, allowed=allowed)


@pytest.mark.parametrize(
    ("radius", "keys", "pairs"), [(8, 193, 710_052), (16, 793, 2_594_880), (32, 3205, 8_085_036)]
)
def test_clear_pairs_at_1024(radius: int, keys: int, pairs: int) -> None:
    for tile in (None, (8, 16)):
        plan = circle(Grid(1, 64, 64, tile), radius)
        assert plan.pairs == pairs
        middle = plan.inverse[32 * 64 + 32]
        assert int(plan.visible_keys[0, 0, middle]) == keys


@pytest.mark.parametrize(
    ("side", "radius", "tile", "block", "percent"),
    [
        (64, 8, None, 128, "26"),
        (64, 8, (8, 16), 128, "21"),
        (64, 8, (8, 8), 64, "12"),
        (128, 8, None, 128, "11.4"),
        (128, 8, (8, 16), 128, "6.2"),
        (128, 8, (8, 8), 64, "3.2"),
        (128, 16, (8, 16), 128, "9.9"),
        (128, 16, (8, 8), 64, "8.4"),
        (256, 16, (8, 8), 64, "2.3"),
    ],
)
def test_clear_visits(side: int, radius: int, tile: tuple[int, int] | None, block: int, percent: str) -> None:
    plan = circle(Grid(1, side, side, tile), radius, block)
    digits = len(percent.partition(".")[2])
    assert f"{100 * plan.density:.{digits}f}" == percent
    assert len(plan.tiles) < 100 or tile is None  # tiles repeat: masks are kept once


def test_grat_counts() -> None:
    image, video = Grid(1, 32, 32), Grid(8, 6, 10)
    for counts, size, meets, most, total in (
        (image, 256, lambda d: (d <= 1).all(-1), 9, 8836),
        (image, 256, lambda d: (d[..., 1:] == 0).any(-1), 63, 1024 * 63),
        (video, 256, lambda d: (d <= 1).all(-1), 27, 22 * 16 * 28),
        (video, 256, lambda d: (d == 0).any(-1), 165, 480 * 165),
    ):
        plan = groups(counts, size, meets)
        blocks = size // 128
        assert plan.visited == total * blocks**2 and plan.partial == 0
        assert plan.pairs == total * size**2
        assert int(plan.counts[0].amax()) == most * blocks


def test_re_ttention_counts() -> None:
    for block, most in ((64, 3), (128, 3)):
        image = band(1, 4096, 4096 // 32, block=block)
        assert int(image.visible_keys.amax()) == 129 and int(image.counts[0].amax()) == most
    width = 1350 // 32
    with_text = band(13, 1350, width, text=226)
    assert with_text.visible_keys[0, 0, with_text.inverse[226 + 675]] == 785
    assert with_text.visible_keys[0, 0, 0] == 17_776
    for block, visited, percent in ((64, 2995, 3.9), (128, 954, 5.0)):
        video = band(13, 1350, width, block=block)
        assert video.visited == visited and 100 * video.density == pytest.approx(percent, abs=0.1)
        assert f"{100 * video.pairs / video.queries**2:.2f}" == "3.16"
    assert 100 * band(13, 1350, width, tiled=False).density == pytest.approx(21.5, abs=0.1)
