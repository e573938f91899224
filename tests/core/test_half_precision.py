"""Models of clips in half precision: positions and layer norms stay in float32 (VDT's traps)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.grid import Grid, patchify
from ditkit.core.run import Run
from ditkit.models.vdt import VDT
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.nn.embeddings import sincos_axis, sincos_table
from ditkit.nn.rotary import axial_angles, rotary_table
from models_support import perturbed
from vdt_support import SMALL, frames_given, ways

Half = Callable[[nn.Module], AbstractContextManager[Any]]


def cast(model: nn.Module) -> AbstractContextManager[Any]:
    model.bfloat16()
    return nullcontext()


def autocast(model: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


halves = pytest.mark.parametrize("half", [cast, autocast])


def noisy(model: VDT | VideoDiT) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, *model.sample_shape)
    return x.to(next(model.parameters()).dtype), torch.rand(3)


def vdt(way: str = "mask") -> VDT:
    return perturbed(VDT(replace(SMALL, conditioning=way)), 0.2).requires_grad_(False)  # type: ignore[arg-type]


def video_dit() -> VideoDiT:
    config = VideoDiTConfig(channels=3, frames=4, size=(4, 6), patch=(1, 2, 2), width=16, depth=2, heads=2)
    return perturbed(VideoDiT(config), 0.2).requires_grad_(False)


def tokens(model: VDT | VideoDiT, x: Tensor, t: Tensor) -> Any:
    """What the model's `tokens` site returns."""
    seen: list[Any] = []

    def note(fn: Callable[..., Any], *args: Any) -> Any:
        seen.append(fn(*args))
        return seen[0]

    model(x, t, Cond(), Run({"tokens": note}))
    return seen[0]


@halves
def test_a_vdts_positions_are_added_in_float32(half: Half) -> None:
    """The sum is rounded once; a table that is rounded before it would move most tokens."""
    model = vdt()
    with half(model):
        x, t = noisy(model)
        found = tokens(model, x, t).x
        patches = model.embed(patchify(x, 2))
    grid = Grid(4, 2, 3)
    table = sincos_table(grid, 16) + sincos_axis(4, 16).repeat_interleave(6, 0)
    assert patches.dtype == torch.bfloat16
    assert torch.equal(found, (patches.float() + table).bfloat16())
    assert not torch.equal(found, patches + table.bfloat16())


@halves
def test_a_video_dits_angles_are_float32(half: Half) -> None:
    model = video_dit()
    with half(model):
        found = tokens(model, *noisy(model))
    expected = rotary_table(axial_angles(Grid(4, 2, 3), model.split))
    assert found.x.dtype == torch.bfloat16 and found.rotary.cos.dtype == torch.float32
    assert torch.equal(found.rotary.cos, expected.cos) and torch.equal(found.rotary.sin, expected.sin)


def norms_are_exact(model: VDT | VideoDiT, half: Half, cond: Cond) -> int:
    """How many layer norms a call runs, each of which must be that of its input in float64, rounded once."""
    seen: list[tuple[nn.LayerNorm, Tensor, Tensor]] = []
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.register_forward_hook(lambda norm, args, out: seen.append((norm, args[0], out)))
    with half(model):
        model(*noisy(model), cond)
    for norm, x, out in seen:
        assert x.dtype == torch.bfloat16
        weight, bias = (None if p is None else p.double() for p in (norm.weight, norm.bias))
        exact = torch.nn.functional.layer_norm(x.double(), norm.normalized_shape, weight, bias, norm.eps)
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
    return len(seen)


@halves
@ways
def test_a_vdts_layer_norms_are_taken_in_float32(half: Half, way: str) -> None:
    norms = {"cross": 4}.get(way, 3)
    assert norms_are_exact(vdt(way), half, frames_given([0], [1, 2], [])) == norms * 2 + 1


@halves
def test_a_video_dits_layer_norms_are_taken_in_float32(half: Half) -> None:
    assert norms_are_exact(video_dit(), half, Cond()) == 2 * 2 + 1
