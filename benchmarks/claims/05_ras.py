"""Claims of RAS, tried on the shipped model of emoji: squared error to 100 exact steps of the same seeds.

python benchmarks/claims/05_ras.py      writes benchmarks/results/claims/05-ras.json and fills the page

The arms are those of benchmarks/regional.py, of which each has the published method's token-steps, a row in one
evaluation. The error is a mean over the pixels of a picture in units of [-1, 1]; intervals are over pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.caching.regional import RAS
from ditkit.core.grid import image_of
from ditkit.systems.claims import Claim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # arms are shared
from regional import Arguments, draw, methods

RIVALS = {
    "fewer steps": (
        "It has less error than as many token-steps of whole evaluations",
        "FID of SD3 at 1.43 pictures a second: 39.70 by 5 whole steps, 31.99 by 7 steps at ratio 0.25",
    ),
    "random rows": (
        "Rows chosen by the last prediction have less error than random rows",
        "FID of SD3 in 10 steps: 35.81, random 43.19",
    ),
    "no keys kept": (
        "Keys and values of the rows left out are needed",
        "FID of SD3 in 28 steps: 24.30, without them 31.36",
    ),
    "no resets": (
        "Evaluations of all rows in between are needed",
        "FID of SD3 in 10 steps: 35.81, without 46.10",
    ),
    "no starvation": (
        "What counts how often a row was left out is needed",
        "FID of SD3 in 10 steps: 35.81, without 39.87",
    ),
}


def errors(arguments: Arguments, steps: int) -> Iterator[tuple[str, float, Tensor]]:
    """Yield each arm with its token-steps and the squared error of each picture, [count]."""
    model = ditkit.load(arguments.model)
    length = image_of(model.layout(model.sample_shape)).length
    reference = draw(model, arguments, arguments.reference)

    def off(x: Tensor) -> Tensor:
        return (x - reference).double().square().flatten(1).mean(1)

    arms = {name: policy for name, policy in methods(steps).items() if name in ("published", *RIVALS)}
    arms["no starvation"] = RAS(starvation=0.0)
    for name, policy in arms.items():
        token_steps = steps - sum(policy.skipped(steps, length)) / length
        yield name, token_steps, off(draw(model, arguments, steps, policy))
        if name == "published":
            fewer = int(token_steps + 0.5)
            yield "fewer steps", fewer, off(draw(model, arguments, fewer))


def claims(arguments: Arguments, steps: int) -> Iterator[Claim]:
    """Yield the claims: against fewer steps, random rows, and the two ablations."""
    found = {name: (token_steps, error) for name, token_steps, error in errors(arguments, steps)}
    own, error = found["published"]
    for name, (claim, paper) in RIVALS.items():
        token_steps, rival = found[name]
        yield Claim.tried(
            claim,
            paper=paper,
            ours=(error - rival).mean().item(),
            interval=bootstrap(error - rival),
            claimed=(None, 0.0),
            unit="squared error",
            against=f"{steps} steps at ratio 0.5, 64 tokens; {own:g} token-steps, {name} {token_steps:g}; "
            f"means {error.mean():.3g}, {rival.mean():.3g}; {arguments.count} pictures",
        )


def untried() -> Iterator[Claim]:
    """Yield the claims that take other models than are here."""
    reason = "takes the published weights and a GPU"
    yield Claim.untried(
        "SD3 is up to 2.36 times as fast", paper="abstract: with minimal degradation", reason=reason
    )
    yield Claim.untried("Lumina-Next is up to 2.51 times as fast", paper="abstract, as SD3", reason=reason)
    yield Claim.untried(
        "At 1.6 times the speed people find it as good as full sampling",
        paper="45.2 % the same, 28.3 % prefer the full one, 26.5 % RAS",
        reason="takes people, and the published weights",
    )


def main(count: int = 8, steps: int = 20) -> None:
    """Try the claims.

    Args:
        count: of pictures, their labels spread over the classes. steps: of Euler.
    """
    torch.set_num_threads(1)
    write("05-ras", [*claims(Arguments(count=count), steps), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
