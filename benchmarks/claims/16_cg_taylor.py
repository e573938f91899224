"""Claims of CG-Taylor, tried on the shipped model of emoji, every picture gated on its own.

python benchmarks/claims/16_cg_taylor.py      writes benchmarks/results/claims/16-cg-taylor.json and fills the page

The arms and the ranking of the gate are those of benchmarks/confident_taylor.py: squared errors to the exact run of the
same seeds, each rival with as many full evaluations as the gate asked for. Intervals are over pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.systems.claims import Bounds, Claim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # arms and ranking are shared
from confident_taylor import (
    CORRELATED,
    PUBLISHED,
    RIVALS,
    Arguments,
    Gated,
    draw,
    gated,
    outputs,
    questions,
    rank_correlation,
)

LOOSE = 0.03
"""Published for FLUX; on this model most evaluations pass it."""
FIFTHS = 5
RIVAL_NAMES = {
    "equal_intervals": "a list of equal intervals",
    "reused": "reuse of the last block's output (O_L = 0) on the same list",
    "taylorseer": "TaylorSeer of the same order",
    "fewer_steps": "exact steps",
}
PAPER = "no figure of quality that could be read; the abstract says without loss, or with a small one"


def mean(claim: str, paper: str, values: Tensor, claimed: Bounds, unit: str, against: str) -> Claim:
    """A claim on the mean over pictures."""
    return Claim.tried(
        claim,
        paper=paper,
        ours=values.double().mean().item(),
        interval=bootstrap(values),
        claimed=claimed,
        unit=unit,
        against=f"{against}; {len(values)} pictures",
    )


def against(runs: Sequence[Gated], threshold: float) -> Iterator[Claim]:
    """Yield how the gate fares against each rival, in the mean error and in the share of pictures."""
    error = {name: torch.cat([run.errors[name] for run in runs]) for name in ("gate", *RIVALS)}
    full = sum(len(run.full) for run in runs) / len(runs)
    for name in RIVALS:
        means = f"means {error['gate'].mean():.3g}, {error[name].mean():.3g}"
        yield mean(
            f"At threshold {threshold:g} its error is less than that of {RIVAL_NAMES[name]}",
            PAPER,
            error["gate"] - error[name],
            (None, 0.0),
            "squared error",
            f"{full:.1f} of {Arguments.steps} evaluations full; {means}",
        )
    better = (error["gate"] <= error["equal_intervals"]).double()
    yield mean(
        f"At threshold {threshold:g} most pictures are no worse than with equal intervals",
        PAPER,
        better,
        (0.5, None),
        "of pictures",
        f"{full:.1f} of {Arguments.steps} evaluations full",
    )


def of_the_gate(runs: Sequence[Gated], ranks: Tensor) -> Iterator[Claim]:
    """Yield the premise of the gate, and where it asks."""
    yield mean(
        f"The first block's error ranks evaluations as the last block's does: Spearman's at least {CORRELATED}",
        "the premise; no figure",
        ranks,
        (CORRELATED, None),
        "rank correlation",
        "on the states of the exact run",
    )
    forced = {*range(PUBLISHED.warmup + 1), Arguments.steps - 1}
    fifth = Arguments.steps // FIFTHS
    asked = torch.tensor(
        [[sum(s // fifth == i for s in run.full if s not in forced) for i in range(FIFTHS)] for run in runs]
    ).double()
    inner = asked[:, 1:-1].mean(1)
    for name, place in (("first", 0), ("last", -1)):
        yield mean(
            f"It asks for more evaluations in the {name} fifth than in those between",
            "no figure",
            asked[:, place] - inner,
            (0.0, None),
            "evaluations",
            f"those that are full in any case left out; means {asked[:, place].mean():.2f}, {inner.mean():.2f}",
        )


def untried() -> Iterator[Claim]:
    """Yield the claims that take other models than are here."""
    figures: Mapping[str, str] = {
        "FLUX.1-dev is about three times as fast without loss": "abstract: 3.17 times as fast",
        "DiT-XL/2 is about twice as fast without loss": "abstract: 2.36 times as fast",
        "Wan 2.1 is more than four times as fast with a small loss": "abstract: 4.14 times as fast",
    }
    for claim, paper in figures.items():
        yield Claim.untried(claim, paper=paper, reason="takes the published weights and a GPU")


def main(count: int = 10) -> None:
    """Try the claims.

    Args:
        count: of pictures, their labels spread over the classes.
    """
    torch.set_num_threads(1)
    arguments = Arguments(count=count, batch=1)
    model = ditkit.load(arguments.model)
    runs: dict[float, list[Gated]] = {PUBLISHED.threshold: [], LOOSE: []}
    ranks = []
    for seeds in torch.arange(count).split(1):
        with outputs(model, 0) as first, outputs(model, model.config.depth - 1) as last:
            exact = draw(model, seeds, arguments).samples
        ranks.append(rank_correlation(questions(model, PUBLISHED.threshold, first, last)))
        for threshold, found in runs.items():
            found.append(gated(model, seeds, exact, threshold, arguments))
    premise = of_the_gate(runs[PUBLISHED.threshold], torch.tensor(ranks))
    rivals = [claim for threshold, found in runs.items() for claim in against(found, threshold)]
    write("16-cg-taylor", [*premise, *rivals, *untried()])


if __name__ == "__main__":
    tyro.cli(main)
