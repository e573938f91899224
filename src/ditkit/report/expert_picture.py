"""A picture of experts over noise-time: which each block uses, and how many two noise-times have in common."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from ditkit.bench.expert_use import ExpertUse

SIDE = 250
"""Noise-times across and down; every fourth of the thousand."""
INCHES, DPI = (11.0, 4.2), 110


def expert_page(use: ExpertUse, title: str) -> bytes:
    """Draw the gates of all experts over noise-time, the overlap of noise-times, and the prior's; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    gates, own, wanted = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _draw_gates(figure, gates, use)
    most = use.active * len(use.shares)
    for axes, overlap, name in (
        (own, use.overlap, f"experts in common\ncorrelation {use.likeness:.2f}"),
        (wanted, use.wanted_overlap, "experts in common\nunder the prior"),
    ):
        drawn = axes.imshow(_thinned(overlap), vmin=0, vmax=most, cmap="viridis", extent=(0, 1, 1, 0))
        axes.set(title=name, xlabel="noise-time")
    figure.colorbar(drawn, ax=[own, wanted], shrink=0.8)
    figure.suptitle(title)
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()


def _draw_gates(figure: Any, axes: Any, use: ExpertUse) -> None:
    """Draw the gate of each slot over noise-time, white where it is not chosen; lines part the blocks."""
    blocks, experts = use.shares.shape
    gates = (use.p * use.chosen).flatten(1).mT  # [slots, T]
    shown = gates.masked_fill(gates == 0, torch.nan).numpy()
    drawn = axes.imshow(
        shown,
        aspect="auto",
        vmin=0,
        vmax=1,
        cmap="viridis",
        extent=(0, 1, blocks * experts, 0),
        interpolation="none",
    )
    for edge in range(1, blocks):
        axes.axhline(edge * experts, color="black", linewidth=0.6)
    axes.set_yticks([(i + 0.5) * experts for i in range(blocks)], [str(i) for i in range(blocks)])
    axes.set(title="gates of the experts that are chosen", xlabel="noise-time (0 is clean)", ylabel="block")
    figure.colorbar(drawn, ax=axes, shrink=0.8)


def _thinned(overlap: Tensor) -> Any:
    return overlap[:: len(overlap) // SIDE, :: len(overlap) // SIDE].numpy()
