"""Claims of DTR, tried on small networks trained alike but for the routing.

python benchmarks/claims/39_dtr.py           writes benchmarks/results/claims/39-dtr.json and fills the page
python benchmarks/claims/29_switch_dit.py    writes these and Switch-DiT's, with one plain run for both

Windows that slide late (alpha 4) against none, against random masks and against windows that slide evenly; and under
the loss weights that the paper combines them with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

from ditkit.bench.claims import write
from ditkit.core.model import parameter_count
from ditkit.systems.claims import Claim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # arms are shared with Switch-DiT's claims
from routed_by_time import MORE, OF_DTR, Arms, run

PAIRS = (
    (
        "DTR has less loss than the plain network after as many steps",
        "DTR",
        "plain",
        "FID after 400K steps: S 37.43 and 44.28, B 16.58 and 27.96, L 8.90 and 12.59; XL 10.85 and 9.40",
    ),
    (
        "Sliding windows have less loss than as many random channels a task and block",
        "DTR",
        "random masks",
        "random routing is its control; no figure of it is in our specification",
    ),
    (
        "Windows that slide late (alpha 4) have no more loss than those that slide evenly (alpha 1)",
        "DTR",
        "even windows",
        "alpha 4 is its choice; no figure of others is in our specification",
    ),
    (
        "Under Min-SNR weights DTR has less loss than the plain network",
        "DTR, Min-SNR",
        "Min-SNR",
        "FID of L after 400K steps: 8.24 against 9.58",
    ),
    (
        "Under ANT-UW's weights DTR has less loss than the plain network",
        "DTR, UW",
        "UW",
        "FID of L after 400K steps: 4.61 against 5.85",
    ),
)


def of(arms: Arms) -> Iterator[Claim]:
    """Yield the claims, from trained arms."""
    for claim, arm, rival, paper in PAIRS:
        if arm not in arms.losses or rival not in arms.losses:
            reason = "its trainings are left out for their time; `--more` has them"
            yield Claim.untried(f"{claim}: {arm} less {rival}", paper=paper, reason=reason)
            continue
        mean, interval = arms.difference(arm, rival)
        yield Claim.tried(
            f"{claim}: {arm} less {rival}",
            paper=paper,
            ours=mean,
            interval=interval,
            claimed=(None, 0.0),
            unit="loss",
            against=arms.setting(arm, rival),
        )
    plain, routed = (parameter_count(arms.models[name][0]) for name in ("plain", "DTR"))
    yield Claim.tried(
        "Routing adds no parameters",
        paper="none added",
        ours=routed - plain,
        interval=(routed - plain,) * 2,
        claimed=(-0.5, 0.5),
        unit="parameters",
        against=f"{plain:,} parameters without it",
    )
    yield Claim.untried(
        "DTR-L with ANT-UW has FID 4.61 on ImageNet at 256 pixels after 400K steps",
        paper="4.61; DiT-XL 9.40, DTR-XL 10.85",
        reason="takes ImageNet and a GPU",
    )
    yield Claim.untried(
        "A compiled training step of XL/2 takes at most 2 % longer",
        paper="two operations an element more in each block; no speed is claimed",
        reason="takes a GPU",
    )


def main(steps: int = 60, seeds: int = 5, more: bool = False) -> None:
    """Try the claims.

    Args:
        steps: of each training. seeds: of each arm. more: arms too, of even windows and of Min-SNR.
    """
    torch.set_num_threads(1)
    write("39-dtr", list(of(run({**OF_DTR, **(MORE if more else {})}, steps, seeds))))


if __name__ == "__main__":
    tyro.cli(main)
