"""Attention along one axis of a clip: which tokens mix, which rows run alone, and the text that orders blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import parameter_count
from ditkit.core.run import DIRECT, Run
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.nn.axes import Axis, AxisAttention, Clip, Layer, Stage, layers_of

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


def test_the_layout_text_says_axes_norms_counts_and_skips():
    T, S = Stage("T", 1), Stage("S", 1)
    assert layers_of("TSST*2") == (Layer((T, S, S, T), False),) * 2
    assert layers_of("F24") == (Layer((Stage("F", 24),), False),)
    assert layers_of("S12T12") == (Layer((Stage("S", 12), Stage("T", 12)), False),)
    assert layers_of(" +STS*2  F3 ") == (Layer((S, T, S), True),) * 2 + (Layer((Stage("F", 3),), False),)
    deep, flat = (
        PredFormer(PredFormerConfig(width=WIDTH, heads=2, layout=layout)) for layout in ("F2", "FF")
    )
    assert parameter_count(flat) - parameter_count(deep) == 2 * WIDTH


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tsst*6", "did you mean 'TSST*6'?"),
        ("TSSTx6", "did you mean 'TSST*6'?"),
        ("ST*12 TXT*8", "at 'TXT*8'"),
        ("S0T12", "axes T, S or F"),
        ("TSST*0", "'*' with a count"),
        ("STS+*4", "did you mean '+STS*4'?"),
        ("", "names no block"),
        ("F1001", "at most 1000 blocks"),
        ("TSST*251", "at most 1000 blocks"),
        ("F" * 99999, "at most 1000 blocks"),
        ("T" + "9" * 5000, "axes T, S or F"),
    ],
)
def test_a_malformed_layout_is_refused_in_one_line(text, says):
    with pytest.raises(ConfigError) as caught:
        PredFormerConfig(layout=text)
    assert "\n" not in str(caught.value) and says in str(caught.value)
