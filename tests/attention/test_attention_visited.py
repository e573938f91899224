"""CLEAR's blocks: what share of them a kernel visits on large pictures, in tiles and in raster order."""

from __future__ import annotations

import pytest

from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.core.grid import Grid


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
