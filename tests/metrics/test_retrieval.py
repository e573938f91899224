"""Retrieval: places by hand, chance, and ties."""

from __future__ import annotations

import pytest
import torch

from ditkit.core.errors import ShapeError
from ditkit.metrics.retrieval import ranks, retrieval


def test_places_by_hand():
    real = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    drawn = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
    assert ranks(drawn, real, torch.tensor([0, 2])).tolist() == [1, 1]
    assert ranks(drawn, real, torch.tensor([1, 0])).tolist() == [4, 2]


def test_a_picture_that_is_like_all_is_at_chance():
    found = retrieval(torch.zeros(3, 2), torch.randn(9, 2), torch.tensor([0, 4, 8]))
    centred = found.median_rank
    assert 1 <= centred <= 9
    same = ranks(torch.ones(1, 2), torch.ones(5, 2), torch.tensor([3]))
    assert same.tolist() == [3.0], "ties count half"


def test_shares_and_chance():
    real = torch.eye(10)
    found = retrieval(real, real, torch.arange(10))
    assert (found.top1, found.top5, found.chance1, found.chance5) == (1, 1, 0.1, 0.5)
    other = retrieval(real, real, torch.arange(10).roll(1))
    assert other.top1 == 0


def test_odd_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"\[n, d\], \[m, d\] and \[n\]"):
        ranks(torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(2).long())
