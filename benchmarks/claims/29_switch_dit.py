"""Claims of Switch-DiT, tried on small networks: experts against DTR, none, and more width; the prior against none.

python benchmarks/claims/29_switch_dit.py    writes benchmarks/results/claims/29-switch-dit.json and 39-dtr.json

All arms of both systems are trained here, so that one plain run and one of DTR serve both; `--alone` leaves out those
of DTR's claims and its file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import tyro

from ditkit.bench.claims import write
from ditkit.bench.expert_use import ExpertUse, use_of
from ditkit.bench.macs import count_macs
from ditkit.core.cond import Cond
from ditkit.models.dit import DiT
from ditkit.models.switch_dit import SwitchDiT
from ditkit.systems.claims import Claim

sys.path.extend(map(str, Path(__file__).resolve().parents[:2]))  # arms and claims are shared with DTR's
from routed_by_time import MORE, OF_DTR, OF_SWITCH, Arms, of_seeds, run, within

PAIRS = (
    (
        "Switch-DiT has less loss than DTR after as many steps",
        "Switch-DiT",
        "DTR",
        "FID after 400K steps: S 33.99 and 37.43, B 16.21 and 16.58, L 8.78 and 8.90, XL 8.76 and 10.85",
    ),
    (
        "Switch-DiT has less loss than the plain network after as many steps",
        "Switch-DiT",
        "plain",
        "FID after 400K steps: S 33.99 and 44.28, B 16.21 and 27.96, L 8.78 and 12.59, XL 8.76 and 9.40",
    ),
    (
        "Switch-DiT has less loss than a wider plain network of at least as many parameters",
        "Switch-DiT",
        "wider",
        "none; a control",
    ),
    (
        "The prior lowers the loss of the network with experts: weight 1 less weight 0",
        "Switch-DiT",
        "no prior",
        "none in our specification; the prior is part of the method",
    ),
)


def of_losses(arms: Arms) -> Iterator[Claim]:
    """Yield the differences of held-out losses."""
    for claim, arm, rival, paper in PAIRS:
        mean, interval = arms.difference(arm, rival)
        yield Claim.tried(
            f"{claim}: {arm} less {rival}",
            paper=paper,
            ours=mean,
            interval=interval,
            claimed=(None, 0.0),
            unit="loss",
            against=f"{arms.setting(arm, rival)}; parameters: {within((arm, rival), arms.models)}",
        )


def of_routes(arms: Arms) -> Iterator[Claim]:
    """Yield how the noise-times share experts, with the prior and without."""
    uses = {name: [use_of(model) for model in arms.models[name]] for name in ("Switch-DiT", "no prior")}
    untrained = use_of(SwitchDiT(arms.models["Switch-DiT"][0].config))
    paper = "each block has an expert that all tasks share (abstract); no figure of the overlaps"
    for claim, of, bounds, unit in (
        (
            "The overlaps of the noise-times' experts, Q Q^T, correlate with the prior's above 0.8",
            lambda use: use.likeness,
            (0.8, None),
            "correlation",
        ),
        (
            "A noise-time and the next share over 95 % of their experts",
            lambda use: use.near,
            (0.95, None),
            "of experts",
        ),
        (
            "Every block has an expert that over 95 % of the noise-times choose, the shared path: the least share",
            lambda use: use.shares.amax(1).min(),
            (0.95, None),
            "of noise-times",
        ),
    ):
        yield _of_seeds(arms.steps, claim, paper, of, bounds, unit, uses, untrained)


def _of_seeds(
    steps: int, claim: str, paper: str, of: Any, bounds: Any, unit: str, uses: Any, untrained: ExpertUse
) -> Claim:
    found = {name: torch.tensor([float(of(use)) for use in own]) for name, own in uses.items()}
    own = found["Switch-DiT"]
    rivals = ", ".join(f"{v:.3f}" for v in found["no prior"].tolist())
    return Claim.tried(
        claim,
        paper=paper,
        ours=own.mean().item(),
        interval=of_seeds(own.double()),
        claimed=bounds,
        unit=unit,
        against=f"{steps} steps of 32; "
        f"seeds {', '.join(f'{v:.3f}' for v in own.tolist())}; without the prior {rivals}; untrained "
        f"{of(untrained):.3f}; 1000 noise-times",
    )


def of_cost() -> Iterator[Claim]:
    """Yield the work of an evaluation of XL/2, counted on the meta device."""
    label = Cond(label=torch.zeros(1, dtype=torch.long, device="meta"))
    macs = []
    for kind in (DiT, SwitchDiT):
        with torch.device("meta"), torch.no_grad():
            model = kind.preset("XL/2").eval()
            macs.append(count_macs(model, torch.empty(1, 4, 32, 32), torch.empty(1), label).total)
    ratio = macs[1] / macs[0]
    yield Claim.tried(
        "Two of three experts take a sixth more MACs than DiT-XL/2",
        paper="not given; 118.6 and 137.7 GMAC follow from the sizes",
        ours=ratio,
        interval=(ratio, ratio),
        claimed=(1.15, 1.17),
        unit="times",
        against=f"{macs[1] / 1e9:.1f} against {macs[0] / 1e9:.1f} GMAC at 256 pixels, counted on the meta device; a "
        "sampler's step, in which all samples have one time, merges the experts and takes half of the addition",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that cannot be tried here."""
    yield Claim.untried(
        "Switch-DiT-XL has FID 8.76 on ImageNet at 256 pixels after 400K steps",
        paper="8.76, IS 169.17; DiT-XL 9.40, 166.83",
        reason="takes ImageNet and a GPU",
    )
    yield Claim.untried(
        "A training step of XL/2 takes at most 1.25 times DiT's, an evaluation 1.12 times",
        paper="no speed is claimed",
        reason="takes a GPU",
    )


def main(steps: int = 60, seeds: int = 5, more: bool = False, alone: bool = False) -> None:
    """Try the claims.

    Args:
        steps: of each training. seeds: of each arm. more: of DTR's arms. alone: without DTR's claims.
    """
    torch.set_num_threads(1)
    of_dtr = {**OF_DTR, **(MORE if more else {})}
    arms = run(OF_SWITCH if alone else {**of_dtr, **OF_SWITCH}, steps, seeds)
    write("29-switch-dit", [*of_losses(arms), *of_routes(arms), *of_cost(), *untried()])
    if not alone:
        write("39-dtr", list(import_module("39_dtr").of(arms)))


if __name__ == "__main__":
    tyro.cli(main)
