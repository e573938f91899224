"""The baseline of prediction and interpolation: held frames and linear blends."""

from __future__ import annotations

import pytest
import torch

from ditkit.core.errors import ShapeError
from ditkit.metrics.baselines import blended


def clip(*values: float) -> torch.Tensor:
    """One clip of one pixel."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1, 1)


@pytest.mark.parametrize(
    ("given", "mask", "expected"),
    [
        ((1, 2, 9, 9), (0, 0, 1, 1), (1, 2, 2, 2)),
        ((9, 9, 3, 4), (1, 1, 0, 0), (3, 3, 3, 4)),
        ((1, 9, 9, 4), (0, 1, 1, 0), (1, 2, 3, 4)),
        ((9, 5, 9, 9), (1, 0, 1, 1), (5, 5, 5, 5)),
        ((9, 1, 9, 3), (1, 0, 1, 0), (1, 1, 2, 3)),
        ((9, 9, 9, 9), (1, 1, 1, 1), (0, 0, 0, 0)),
        ((1, 2, 3, 4), (0, 0, 0, 0), (1, 2, 3, 4)),
    ],
)
def test_gaps_are_linear_and_ends_are_held(given, mask, expected):
    assert torch.equal(blended(clip(*given), clip(*mask)), clip(*expected))


def test_each_pixel_of_each_clip_has_its_own_gap():
    context, mask = torch.randn(2, 3, 5, 4, 4), torch.zeros(2, 1, 5, 4, 4)
    mask[0, :, 2:4] = 1
    mask[1, :, 3:, 1] = 1
    out = blended(context, mask)
    assert torch.equal(out.where(mask == 0, 0 * out), context.where(mask == 0, 0 * out))
    torch.testing.assert_close(out[0, :, 3], context[0, :, 1] / 3 + context[0, :, 4] * 2 / 3)
    assert torch.equal(out[1, :, 3:, 1], context[1, :, 2:3, 1].expand(-1, 2, -1))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"mask \[1, 1, 3, 1, 1\] do not fit"):
        blended(clip(1.0, 2.0), clip(0.0, 1.0, 1.0))
