"""Rotary positions: the table's numbers, and what turning by them must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid
from ditkit.nn.rotary import Rotary, RotaryTokens, axial_angles, rotary_table, rotate, wan_split

SPLIT = (4, 2, 6)
K = sum(SPLIT)


def exact(angles: Tensor) -> Rotary:
    """A table in float64, for properties that hold to its rounding."""
    return Rotary(angles.cos(), angles.sin())


def at(places: Tensor, split: tuple[int, int, int] = SPLIT) -> Rotary:
    """The float64 table of `places` [L, 3] of a grid that holds them all."""
    grid = Grid(*(int(n) + 1 for n in places.amax(0)))
    rows = (places[:, 0] * grid.height + places[:, 1]) * grid.width + places[:, 2]
    return exact(axial_angles(grid, split)[rows])


def pair(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, rows, K, dtype=dtype), torch.randn(2, 3, rows, K, dtype=dtype)


def test_angles_are_place_times_frequency_axis_after_axis() -> None:
    grid, base = Grid(2, 3, 4), 256.0
    angles = axial_angles(grid, SPLIT, base)
    assert angles.dtype == torch.float64 and angles.shape == (24, K // 2)
    for row, place in enumerate(grid.coordinates().tolist()):
        expected = [
            p * base ** (-2 * i / n) for p, n in zip(place, SPLIT, strict=True) for i in range(n // 2)
        ]
        assert angles[row].tolist() == pytest.approx(expected, rel=1e-15)


def test_a_pair_of_neighbouring_channels_turns_as_one_complex_number() -> None:
    angles = axial_angles(Grid(2, 3, 2), SPLIT)
    x, _ = pair(12)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(rotate(x, exact(angles)), torch.view_as_real(turned).flatten(-2), atol=1e-14)


place = st.integers(0, 6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(place, place, place), min_size=2, max_size=6), st.tuples(place, place, place))
def test_scores_depend_on_differences_of_places_only(
    places: list[tuple[int, int, int]], shift: tuple[int, int, int]
) -> None:
    here = torch.tensor(places)
    q, k = pair(len(places))
    near, far = at(here), at(here + torch.tensor(shift))
    scores = rotate(q, near) @ rotate(k, near).mT
    assert torch.allclose(rotate(q, far) @ rotate(k, far).mT, scores, atol=1e-12)
    assert torch.allclose(rotate(q, far).norm(dim=-1), q.norm(dim=-1), atol=1e-12)


def test_the_float32_table_keeps_this_to_its_rounding() -> None:
    grid, shift = Grid(4, 4, 4), 5 * 64 + 8 * 16
    angles = axial_angles(Grid(16, 16, 16), SPLIT)
    rows = grid.coordinates() @ torch.tensor([256, 16, 1])
    q, k = pair(64, torch.float32)
    near, far = (rotary_table(angles[rows + d]) for d in (0, shift))
    scores = rotate(q, near) @ rotate(k, near).mT
    moved = rotate(q, far) @ rotate(k, far).mT
    assert near.cos.dtype == torch.float32
    assert (moved - scores).abs().max() < 1e-5 * scores.abs().max()


@pytest.mark.parametrize("axis", range(3))
def test_an_axis_turns_its_own_channels_only(axis: int) -> None:
    moved = torch.zeros(1, 3, dtype=torch.long)
    moved[0, axis] = 3
    x, _ = pair(1)
    changed = (rotate(x, at(moved)) - x).abs().amax((0, 1, 2)) > 1e-9
    owner = torch.tensor([i for i, n in enumerate(SPLIT) for _ in range(n)])
    assert torch.equal(changed, owner == axis)


def test_a_longer_clip_is_a_longer_table() -> None:
    short, long = (rotary_table(axial_angles(Grid(frames, 3, 5), SPLIT)) for frames in (4, 9))
    assert torch.equal(long.cos[:60], short.cos) and torch.equal(long.sin[:60], short.sin)


def test_half_precision_is_turned_in_float32() -> None:
    table = rotary_table(axial_angles(Grid(4, 4, 4), SPLIT))
    x, _ = pair(64, torch.bfloat16)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
    assert rotate(x.double(), table).dtype == torch.float64


def test_text_rows_are_not_turned() -> None:
    angles = axial_angles(Grid(2, 2, 2), SPLIT)
    x, _ = pair(11, torch.float32)
    out = rotate(x, rotary_table(angles, text=3))
    assert torch.equal(out[:, :, :3], x[:, :, :3])
    assert torch.equal(out[:, :, 3:], rotate(x[:, :, 3:], rotary_table(angles)))


def test_rows_of_one_stream_come_with_all_of_the_other() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])
    table = rotary_table(axial_angles(Grid(1, 2, 3), SPLIT), 3, valid)
    tokens = RotaryTokens(torch.arange(2 * 9.0).reshape(2, 9, 1), table)

    image = tokens.rows("image", torch.tensor([1, 4]))
    at = torch.tensor([0, 1, 2, 4, 7])
    assert torch.equal(image.x, tokens.x[:, at]) and torch.equal(image.rotary.sin, table.sin[at])
    assert image.rotary.text == 3 and image.rotary.valid is valid

    text = tokens.rows("text", torch.tensor([2]))
    at = torch.tensor([2, 3, 4, 5, 6, 7, 8])
    assert torch.equal(text.x, tokens.x[:, at]) and torch.equal(text.rotary.cos, table.cos[at])
    assert text.rotary.text == 1 and text.rotary.valid is not None
    assert torch.equal(text.rotary.valid, valid[:, [2]])


def test_the_mask_is_of_the_text_rows_or_nothing() -> None:
    angles = axial_angles(Grid(1, 1, 2), SPLIT)
    valid = torch.tensor([[True, False]])
    (mask,) = rotary_table(angles, 2, valid).mask()
    assert mask.shape == (1, 1, 1, 2) and torch.equal(mask.flatten(1), valid)
    assert rotary_table(angles, 2).mask() == ()


def test_wan_cuts_a_head_of_128_as_44_42_42() -> None:
    assert [wan_split(k) for k in (128, 64, 8)] == [(44, 42, 42), (24, 20, 20), (4, 2, 2)]
    for narrow in (4, 9):
        with pytest.raises(ShapeError, match=f"head width {narrow} should be even, at least 6"):
            wan_split(narrow)


def test_the_table_is_the_one_of_diffusers_wan() -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    grid = Grid(3, 4, 5)
    clip = torch.zeros(1, 1, 3, 8, 10)
    cos, sin = WanRotaryPosEmbed(128, (1, 2, 2), 64)(clip)
    table = rotary_table(axial_angles(grid, wan_split(128)))
    assert math.prod(grid.shape) == len(table.cos)
    for theirs, ours in ((cos, table.cos), (sin, table.sin)):
        assert torch.allclose(theirs.flatten(0, 2), ours.repeat_interleave(2, -1), atol=1e-6)
