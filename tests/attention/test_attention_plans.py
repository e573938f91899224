"""Static plans are made once for a layout, and kept by the value of the pattern and of the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditkit.attention import Band, Grouped, Neighbourhood, Reshaped
from ditkit.attention.pattern import Pattern, Sparse, cached_plan, place_plan
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.ops.block_sparse_attention import BlockPlan
from patterns_support import tiny_clip_model

PATTERNS: dict[str, tuple[Pattern, Pattern]] = {
    "groups": (Grouped(group=(2, 2, 2), block=8), Grouped(group=(2, 2, 2), block=8, reach=2)),
    "band": (Band(keep=0.2, block=8), Band(keep=0.4, block=8)),
    "circle": (Neighbourhood(radius=2, span=2, block=8), Neighbourhood(radius=3, span=2, block=8)),
    "reshaped": (Reshaped(keep=0.2, block=8), Reshaped(keep=0.4, block=8)),
}
"""A pattern, and one that differs in what is seen."""
patterns = pytest.mark.parametrize(("pattern", "other"), PATTERNS.values(), ids=PATTERNS)
GRID, TOKENS = Grid(4, 6, 10), (("text", 7), ("image", 240))


@patterns
def test_equal_patterns_and_layouts_share_one_plan(pattern: Pattern, other: Pattern) -> None:
    plan, again = cached_plan(pattern, GRID, 7), replace(pattern)
    assert again is not pattern and cached_plan(again, Grid(4, 6, 10), 7) is plan
    differing = (
        cached_plan(other, GRID, 7),
        cached_plan(pattern, Grid(4, 10, 6), 7),
        cached_plan(pattern, GRID, 6),
    )
    assert len({id(one) for one in (plan, *differing)}) == 4
    assert len({one.handle for one in (plan, *differing)}) == 4, "a graph knows plans by their handles"


@patterns
def test_a_seat_is_shared_where_segments_are_as_long(pattern: Pattern, other: Pattern) -> None:
    """Text before the image, or behind it, is another seat of one plan."""
    seat = place_plan(pattern, GRID, TOKENS)
    assert place_plan(replace(pattern), Grid(4, 6, 10), (("text", 7), ("image", 240))) is seat
    assert place_plan(other, GRID, TOKENS).plan is not seat.plan
    behind = place_plan(pattern, GRID, TOKENS[::-1])
    assert behind is not seat and behind.plan is seat.plan and (seat.before, behind.before) == (7, 0)
    assert place_plan(pattern, GRID, (("text", 6), ("image", 240))).plan is not seat.plan


def test_trajectories_evaluations_and_lanes_share_one_plan() -> None:
    """Of prompts, too, that differ in what of them is padding: the plan is that of the layout."""
    model = tiny_clip_model(7)

    def plan(index: int, lane: str) -> BlockPlan:
        (session,) = Trajectory(model.sites(), [Grouped(group=(2, 2, 2), block=8)], 4).sessions
        assert isinstance(session, Sparse)
        text, image = model.layout(model.sample_shape)
        layout = (Segment(text.stream, Grid(text.grid.length), text.length), image)
        (seat,) = session.layout(Call(index, 4, 0.5, lane, layout=layout)).seats.values()
        return seat.plan

    assert len({id(plan(index, lane)) for index in (0, 3) for lane in ("cond", "uncond")}) == 1
