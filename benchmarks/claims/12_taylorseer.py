"""Claims of TaylorSeer, tried on two shipped models: squared error to the exact run of the same seeds.

python benchmarks/claims/12_taylorseer.py      writes benchmarks/results/claims/12-taylorseer.json and fills the page

The error is a mean over the pixels of a picture, in units of the data range [-1, 1]; intervals are over pictures.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.api.generate import generate
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.systems.claims import Bounds, Claim

STEPS, GUIDANCE = 50, 2.0
WARMUP, INTERVALS = 3, (3, 6)
"""Those published for FLUX, with two differences; the rule of the warm-up acts on settings like these."""
ABOUT = 1.1
"""How many times the error of order 1 counts as about as good as it."""


class EagerTaylorSeer(TaylorSeer):
    """A control: differences, and differences of them, are taken in all of the warm-up."""

    def keep(self, step: int) -> int:
        return self.kept


class Errors:
    """Squared errors of pictures, [count], to those of the exact run."""

    def __init__(self, name: str, count: int) -> None:
        self.model: Model = ditkit.load(name)
        self.name, self.count = name, count
        self.exact = self.drawn(STEPS)

    def drawn(self, steps: int, *policies: Policy) -> Tensor:
        seeds = range(self.count)
        return generate(self.model, seeds=seeds, steps=steps, guidance=GUIDANCE, policies=policies).images

    def of(self, *policies: Policy, steps: int = STEPS) -> Tensor:
        return (self.drawn(steps, *policies) - self.exact).double().square().flatten(1).mean(1)


def versus(
    claim: str,
    paper: str,
    error: Tensor,
    rival: Tensor,
    setting: str,
    claimed: Bounds = (None, 0.0),
    times: float = 1,
) -> Claim:
    """The claim that an error is less than so many times a rival's."""
    off = error - times * rival
    return Claim.tried(
        claim,
        paper=paper,
        ours=off.mean().item(),
        interval=bootstrap(off),
        claimed=claimed,
        unit="squared error",
        against=f"{setting}; means {error.mean():.3g}, {rival.mean():.3g}; {len(error)} pictures",
    )


def of_orders(errors: Errors) -> Iterator[Claim]:
    """Yield the claims on order and interval."""
    reuse, first, second = (errors.of(TaylorSeer(4, order)) for order in (0, 1, 2))
    full = len(TaylorSeer(4).full_steps(STEPS))
    setting = f"{errors.name}, N=4 of {STEPS} Euler steps"
    fora = "FID-50k of DiT-XL/2 at N=5: 2.65 with O=3, 6.58 of reuse (FORA)"
    yield versus(
        "Linear forecasts have less than half the error of reuse", fora, first, reuse, setting, times=0.5
    )
    yield versus(
        f"The second difference does no harm: less than {ABOUT} times the error of the first alone",
        "ImageReward of FLUX at N=6: 0.9953 with O=1, 1.0039 with O=2",
        second,
        first,
        setting,
        times=ABOUT,
    )
    fewer = errors.of(steps=full)
    yield versus(
        f"Forecasts have less error than as many exact steps ({full})",
        "compared by FID at equal FLOPs only",
        second,
        fewer,
        f"{setting}, O=2",
    )
    wider = errors.of(TaylorSeer(6, 1))
    yield versus(
        "The error grows with the interval: N=4 less than N=6",
        "FID-50k of DiT-XL/2: 2.34, 2.49, 2.65 at N = 3, 4, 5",
        first,
        wider,
        f"{errors.name}, O=1",
    )


def of_the_warmup(errors: Errors) -> Iterator[Claim]:
    """Compare the published warm-up with one that takes differences throughout."""
    for interval in INTERVALS:
        published, eager = (errors.of(kind(interval, 2, WARMUP)) for kind in (TaylorSeer, EagerTaylorSeer))
        yield versus(
            "A warm-up of three that takes one difference has less error than one that takes all",
            "published code takes the first difference at the last evaluation of the warm-up; no figure without that",
            published,
            eager,
            f"{errors.name}, N={interval}, O=2",
        )


def untried() -> Iterator[Claim]:
    """Yield the claims that take other models than are here."""
    reason = "takes the published weights and a GPU"
    yield Claim.untried(
        "FLUX.1-dev keeps its ImageReward at 4.99 times fewer FLOPs",
        paper="0.9898 to 1.0039 (N=6, O=2)",
        reason=reason,
    )
    yield Claim.untried(
        "DiT-XL/2 keeps its FID at N=3, O=3", paper="2.32 to 2.34, 2.77 times fewer FLOPs", reason=reason
    )
    yield Claim.untried(
        "HunyuanVideo loses less than one point of VBench", paper="80.66 to 79.93", reason=reason
    )


def main(count: int = 12) -> None:
    """Try the claims.

    Args:
        count: of pictures, their labels spread over the classes.
    """
    torch.set_num_threads(1)
    emoji, fashion = Errors("emoji", count), Errors("fashion", count)
    write("12-taylorseer", [*of_orders(emoji), *of_the_warmup(emoji), *of_the_warmup(fashion), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
