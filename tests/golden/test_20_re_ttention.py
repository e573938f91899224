"""Re-ttention over whole runs of one attention against cccrrrccc/Re-ttention's processors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import formula
from ditkit.attention import Reshaped
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory
from ditkit.nn.blocks import attention
from golden_support import EXACT, Case, cases

CORE = (Site("core", "core", "joint"),)
HEADS, WIDTH = 4, 32


def linear(name: str, x: Tensor, times: float = 1.0) -> Tensor:
    """Apply the layer `name` of diffusers' Attention, its weight times `times`."""
    weight = times * formula.weight(f"{name}.weight", (WIDTH, WIDTH))
    return F.linear(x, weight, formula.weight(f"{name}.bias", (WIDTH,)))


def normed(name: str, x: Tensor) -> Tensor:
    """Apply the layer norm `name` of queries or keys, each head's alone."""
    sizes = x.shape[-1:]
    weight, bias = (formula.weight(f"{name}.{kind}", sizes) for kind in ("weight", "bias"))
    return F.layer_norm(x, sizes, weight, bias)


class Attention:
    """One attention of a run under Re-ttention; text stands behind the picture, which no result depends on."""

    def __init__(self, policy: Reshaped, grid: Grid, text: int, total: int, times: float, norm: bool) -> None:
        self.total, self.times, self.norm = total, times, norm
        self.trajectory = Trajectory(CORE, [policy], total)
        self.plan = policy.plan(grid, text)
        behind = (Segment("text", Grid(text), text),) if text else ()
        self.layout = (Segment("image", grid, grid.length), *behind)

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Return the output [B, L, D] of evaluation `index`, of x [B, L, D], through the output projection."""
        heads = (
            linear(name, x, times)
            for name, times in (("to_q", self.times), ("to_k", self.times), ("to_v", 1))
        )
        q, k, v = (h.unflatten(-1, (HEADS, -1)).transpose(1, 2) for h in heads)
        if self.norm:
            q, k = normed("norm_q", q), normed("norm_k", k)
        call = Call(index, self.total, 1 - index / self.total, layout=self.layout)
        slots = torch.arange(x.shape[1]) if self.plan.order is None else self.plan.order
        out = self.trajectory.run(call).site("core", attention, *(h[:, :, slots] for h in (q, k, v)))
        self.trajectory.leave(call, None)
        return linear("to_out.0", out[:, :, self.plan.inverse].transpose(1, 2).flatten(2))


@cases("20-re-ttention", lambda case: "PixArt" in case["name"])
def test_pixart(case: Case) -> None:
    keep = float(case["name"].split("keep ")[1])
    policy = Reshaped(keep=keep, block=32, kernel="cpu")
    attend = Attention(policy, Grid(1, 16, 16), text=0, total=20, times=3, norm=False)
    base, drift = (formula.tensor(f"ret1.{name}", (2, 256, WIDTH)) for name in ("base", "drift"))
    for step in range(20):
        out = attend(step, base + 0.03 * step * drift)
        flat, expected = out.flatten(), case["results"]["by_step"][str(step)]
        found = {"sum": out.sum(), "norm": out.norm(), "first": flat[0], "middle": flat[len(flat) // 2]}
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=EXACT)


@cases("20-re-ttention", lambda case: "CogVideoX" in case["name"])
def test_cogvideox(case: Case) -> None:
    policy = Reshaped(keep=0.25, warmup=15, block=16, kernel="cpu")
    attend = Attention(policy, Grid(3, 6, 8), text=5, total=40, times=1, norm=True)
    parts = [
        [
            formula.tensor(f"ret3.{part}.{name}", (2, rows, WIDTH))
            for part, rows in (("image", 144), ("text", 5))
        ]
        for name in ("base", "drift")
    ]
    base, drift = (torch.cat(part, 1) for part in parts)
    for step in range(40):
        image, text = attend(step, base + 0.02 * step * drift).split((144, 5), 1)
        found = {
            "image_sum": image.sum(), "image_norm": image.norm(), "text_sum": text.sum(), "text_norm": text.norm(),
            "image_middle": image.flatten()[image.numel() // 2],
        }  # fmt: skip
        if expected := case["results"]["by_step"].get(str(step)):
            assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=EXACT)
