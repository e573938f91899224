"""Claims of GRAT on the attentions of a trained clip model: the error of their output by pattern, at equal density.

python benchmarks/claims/18_grat.py      writes benchmarks/results/claims/18-grat.json and fills the page

Queries, keys and values of all layers of digits-video-dit are taken at three noise levels of its own trajectories. The
error of an attention is the squared distance of its output under a mask to that over all pairs, over the square of
the latter, and its mean over layers and levels is that of a clip. Patterns of other densities are compared by
interpolation within the family that can be made finer; intervals are over clips.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.attention.grouped import Grouped
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.core.grid import Grid
from ditkit.systems.claims import Claim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # states and controls are shared
from attention_controls import Diagonal, RandomBlocks
from attention_states import (
    State,
    balls,
    interpolated,
    masked,
    of_tokens,
    relative_error,
    states_along,
    trained_for,
)

MODEL, STEPS, LEVELS = "digits-video-dit", 25, (5, 12, 20)
GRID = Grid(16, 8, 8)
GROUP, BLOCK = (2, 2, 2), 8
REACHES = (0, 1, 2, 3)
BALLS = (3, 4, 6, 9, 14, 20, 30, 45, 60, 80)
"""Radii, by their place among the distances of the grid."""
BLOCKS = (1, 16, 18, 52, 70, 100)
"""Key blocks of each block of queries in the controls."""


class Tried(NamedTuple):
    """A mask: its density, and its error for each clip [B]."""

    density: float
    error: Tensor


def tried(masks: Iterable[Tensor], states: list[State]) -> list[Tried]:
    """Return the error of each mask, the mean over the states."""
    masks = list(masks)
    errors = torch.zeros(len(masks), len(states[0].q), dtype=torch.float64)
    for state in states:
        weights = state.weights
        exact = weights @ state.v
        for place, mask in enumerate(masks):
            errors[place] += relative_error(masked(weights, state.v, mask)[0], exact).double()
    densities = [mask.double().mean().item() for mask in masks]
    return [Tried(density, error / len(states)) for density, error in zip(densities, errors, strict=True)]


def versus(claim: str, paper: str, one: Tried, rivals: list[Tried], name: str, setting: str) -> Claim:
    """The claim that a mask has less error than a family of others at its density."""
    rival = interpolated(one.density, [r.density for r in rivals], [r.error for r in rivals])
    off = one.error - rival
    return Claim.tried(
        claim,
        paper=paper,
        ours=off.mean().item(),
        interval=bootstrap(off),
        claimed=(None, 0.0),
        unit="relative squared error",
        against=f"{one.density:.1%} of pairs; means {one.error.mean():.3g}, {name} {rival.mean():.3g}; {setting}",
    )


def claims(count: int) -> Iterator[Claim]:
    """Yield the claims on order at equal density, on the reach, and the two controls."""
    model = ditkit.load(MODEL)
    states = [state for level in states_along(model, count, STEPS, LEVELS).values() for state in level]
    setting = f"{MODEL} {trained_for(model)}, {count} clips, {len(states)} attentions"

    cross = of_tokens(Grouped(meeting="crisscross", group=GROUP, block=BLOCK), GRID)
    reaches = [of_tokens(Grouped(reach=reach, group=GROUP, block=BLOCK), GRID) for reach in REACHES]
    near = [mask for place, mask in enumerate(balls(GRID)) if place in BALLS]
    controls = [
        [of_tokens(kind(each=each, block=BLOCK), GRID) for each in BLOCKS]
        for kind in (RandomBlocks, Diagonal)
    ]
    found = iter(tried([cross, *reaches, *near, *controls[0], *controls[1]], states))
    x, b, circle, *rest = ([next(found) for _ in group] for group in ([cross], reaches, near, *controls))
    random, diagonal = rest

    fid = "FID of FLUX on COCO: full 33.89, X 34.59, B 35.99, CLEAR without training 47.50; densities differ"
    yield versus("Criss-cross groups have less error than blocks of groups", fid, x[0], b, "blocks", setting)
    yield versus(
        "Blocks of groups have less error than a ball about each token", fid, b[1], circle, "ball", setting
    )
    yield versus("Criss-cross groups have less error than a ball", fid, x[0], circle, "ball", setting)
    for name, control in (
        ("random blocks", random),
        ("nearest blocks in the order of the sequence", diagonal),
    ):
        yield versus(
            f"Blocks of groups have less error than {name}", "not compared", b[1], control, "control", setting
        )
    falls = torch.stack([wider.error - nearer.error for nearer, wider in pairwise(b)]).amax(0)
    yield Claim.tried(
        "The error falls with the reach",
        paper="a wider reach is closer to full attention; no figure",
        ours=falls.mean().item(),
        interval=bootstrap(falls),
        claimed=(None, 0.0),
        unit="relative squared error",
        against=f"reaches {REACHES}: {', '.join(f'{one.error.mean():.3g}' for one in b)}; the least fall; {setting}",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that take large models and a GPU."""
    reason = "takes the published weights and a GPU"
    yield Claim.untried(
        "FLUX at 8192 x 8192 attends 35.8 times as fast (B), 11.6 times (X)", paper="A100", reason=reason
    )
    yield Claim.untried(
        "FLUX with criss-cross keeps its pictures",
        paper="FID 33.89 to 34.59, ImageReward 1.076 to 1.068",
        reason=reason,
    )
    yield Claim.untried(
        "HunyuanVideo with criss-cross keeps its clips",
        paper="VBench 82.71 to 83.82 at 2.4 times",
        reason=reason,
    )
    yield Claim.untried(
        "The order holds in pictures that are drawn",
        paper="FID, as above",
        reason="no picture model of 32 x 32 tokens ships; drawn clips by pattern are in results/attention_error.json",
    )


def main(count: int = 6) -> None:
    """Try the claims.

    Args:
        count: of clips, their labels spread over the classes.
    """
    torch.set_num_threads(1)
    write("18-grat", [*claims(count), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
