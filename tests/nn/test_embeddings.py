"""Embeddings of places and times against their formulas, value by value."""

from __future__ import annotations

import math

import pytest
import torch

from ditkit.core.grid import Grid
from ditkit.nn.embeddings import sincos_axis, sincos_table, sinusoid


def test_positions_encode_the_column_first_then_the_row_each_sin_then_cos():
    grid, width = Grid(1, 3, 5), 16
    table = sincos_table(grid, width)
    for row in range(3):
        for column in range(5):
            for channel in range(width):
                half, place = divmod(channel, width // 2)
                wave, i = divmod(place, width // 4)
                angle = (column, row)[half] * 10000 ** (-2 * i / (width // 2))
                expected = (math.sin, math.cos)[wave](angle)
                assert table[row * 5 + column, channel].item() == pytest.approx(expected, abs=1e-6)


def test_every_frame_has_the_same_positions():
    assert torch.equal(sincos_table(Grid(3, 2, 4), 8), sincos_table(Grid(1, 2, 4), 8).repeat(3, 1))


def test_times_are_embedded_cosine_first():
    t = torch.tensor([0.0, 0.37, 17.0, 999.0])
    wave = sinusoid(t, 256)
    for row, time in enumerate(t.tolist()):
        for i in range(128):
            angle = time * math.exp(-math.log(1e4) * i / 128)
            assert wave[row, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert wave[row, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_places_in_time_follow_the_formula_at_any_length():
    table = sincos_axis(40, 12)
    for place in (0, 1, 15, 39):
        for channel in range(12):
            wave, i = divmod(channel, 6)
            angle = place * 10_000 ** (-2 * i / 12)
            assert table[place, channel].item() == pytest.approx((math.sin, math.cos)[wave](angle), abs=1e-6)
    assert torch.equal(sincos_axis(16, 12), table[:16])
