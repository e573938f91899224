"""Lumina 2's ragged captions, and layers of Wan that stay in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from ditkit.hosts.view import restore, view
from hosts_support import EVERY, FAMILIES, C, Draws, Inputs, call, captions, in_type, same_in_both


@pytest.mark.parametrize("lengths", [(1, 9, 5), (8, 8, 7), (3, 1, 2), (0, 4, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_captions_of_many_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    family = EVERY["lumina2 even"]
    host = family.transformer().to(dtype)
    for latents in ((3, C, 8, 12), (3, C, 2, 2), (3, C, 10, 14)):
        inputs = in_type(family.inputs(), dtype)
        if 0 in lengths:  # an empty caption's refiner sees nothing, which is not a number in diffusers either
            inputs["encoder_hidden_states"][lengths.index(0)] = 0
        given: Inputs = {
            "hidden_states": Draws(2)(*latents).to(dtype),
            "encoder_attention_mask": captions(*lengths),
        }
        expected = call(restore(host), inputs, **given)
        assert same_in_both(view(host), inputs, expected, **given)


def test_a_mask_with_holes() -> None:
    """diffusers counts its ones, and takes so many rows from the start."""
    host, inputs = EVERY["lumina2 even"].transformer(), EVERY["lumina2 even"].inputs()
    given: Inputs = {"encoder_attention_mask": captions(7, 9, 3).flip(1).roll(1, 1)}
    expected = call(host, inputs, **given)
    assert same_in_both(view(host), inputs, expected, **given)


def test_wan_with_some_layers_in_float32(tmp_path: Path) -> None:
    """diffusers keeps norms and times in float32 when it loads the model in bfloat16."""
    FAMILIES["wan"].transformer().save_pretrained(tmp_path)
    host = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert host.scale_shift_table.dtype == torch.float32
    inputs = in_type(FAMILIES["wan"].inputs(), torch.bfloat16)
    expected = call(host, inputs)
    assert same_in_both(view(host), inputs, expected)
