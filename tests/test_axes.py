"""Attention along one axis of a clip: which tokens mix, and which rows run alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.core.run import DIRECT, Run
from ditkit.nn.axes import Axis, AxisAttention, Clip

FRAMES, PLACES, WIDTH = 3, 4, 16
CLIP = Clip(FRAMES, PLACES)


def attention_along(axis: Axis) -> AxisAttention:
    torch.manual_seed(0)
    return AxisAttention(axis, WIDTH, 2).double()


def along(layer: AxisAttention, x: Tensor, clip: Clip = CLIP, run: Run = DIRECT) -> Tensor:
    return layer(x, clip, run, "attn")


@pytest.mark.parametrize("axis", ["T", "S", "F"])
def test_jacobian_between_tokens_of_different_lines_is_exactly_zero(axis):
    layer, L = attention_along(axis), FRAMES * PLACES
    x = torch.randn(1, L, WIDTH, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: along(layer, x), x)
    touched = jacobian[0, :, :, 0].abs().amax((1, 3))  # [L out, L in]
    frame, place = torch.arange(L) // PLACES, torch.arange(L) % PLACES
    line = {"T": place, "S": frame, "F": torch.zeros(L)}[axis]
    assert torch.equal(touched != 0, line[:, None] == line)


def test_without_positions_frames_commute_with_space_and_tokens_with_time():
    torch.manual_seed(0)
    x = torch.randn(2, FRAMES, PLACES, WIDTH, dtype=torch.float64)
    frames, places = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])

    def apply(axis: Axis, x: Tensor) -> Tensor:
        return along(attention_along(axis), x.flatten(1, 2)).unflatten(1, (FRAMES, PLACES))

    space, time, full = (apply(axis, x) for axis in ("S", "T", "F"))
    assert torch.allclose(apply("S", x[:, frames]), space[:, frames], atol=1e-14)
    assert torch.allclose(apply("T", x[:, :, places]), time[:, :, places], atol=1e-14)
    both = torch.stack([x[:, :, places][:, t] for t in frames], 1)
    assert torch.allclose(apply("F", both), full[:, frames][:, :, places], atol=1e-14)
    scrambled = torch.stack([x[:, t, torch.randperm(PLACES)] for t in range(FRAMES)], 1)
    assert not torch.allclose(apply("T", scrambled).sum((1, 2)), time.sum((1, 2)), atol=1e-6)


def test_of_one_frame_time_attention_is_the_path_of_the_values():
    layer = attention_along("T")
    x = torch.randn(2, PLACES, WIDTH, dtype=torch.float64)
    cores = []

    def core(fn: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cores.append(torch.equal(fn(q, k, v), v))
        return fn(q, k, v)

    out = along(layer, x, Clip(1, PLACES), Run({"attn.core": core}))
    assert cores == [True]
    assert torch.allclose(out, layer.out(layer.qkv(x).chunk(3, -1)[2]), atol=1e-14)


@pytest.mark.parametrize("axis", ["T", "S", "F"])
def test_a_branch_runs_on_some_rows_as_if_the_others_were_not_there(axis):
    layer = attention_along(axis)
    x = torch.randn(2, FRAMES * PLACES, WIDTH, dtype=torch.float64)
    whole = torch.arange(2 * PLACES)  # the first two frames
    expected = along(layer, x[:, whole], Clip(2, PLACES))
    clip = CLIP.rows("image", torch.arange(FRAMES * PLACES)).rows("image", whole)
    assert torch.allclose(along(layer, x[:, whole], clip), expected, atol=1e-14)
    with pytest.raises(ShapeError, match="8 tokens, expected 12"):
        along(layer, x[:, whole])
