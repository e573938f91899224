"""Claims of HASTE and of REPA, its first half, tried on the SiT of 8 blocks and garments of 32 x 32 pixels.

python benchmarks/donors/train_teacher.py --epochs 0.5 --precision float32      once: the ViT that teaches
python benchmarks/claims/42_haste.py      writes benchmarks/results/claims/42-haste.json and fills the page

All arms share initial weights, batches, noise and times; the plain run is also that of 32_sra.py. Block 4 of 8 is
aligned in its features, blocks 1 to 4 in their attention, each with weight 0.5; the stop is at 40 % of the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from ditkit.bench.claims import Claim, write
from ditkit.bench.paired import bootstrap, paired_loss
from ditkit.core.checkpoint import read_json
from ditkit.train.denoising import Denoising
from ditkit.train.loop import Training
from ditkit.train.schedules import Between, Weight
from ditkit.train.teacher import PictureTeacher
from ditkit.train.terms.attention_alignment import AttentionAlignment
from ditkit.train.terms.feature_alignment import FeatureAlignment
from ditkit.train.terms.regression import Regression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alignment import Pictures, agreement, gain, plain, probe, ratio, step_seconds, trained

ROOT = Path(__file__).resolve().parents[2]
TEACHER = PictureTeacher(f"vit:{ROOT / 'benchmarks' / 'donors' / 'vit'}")
BLOCK, LAYERS, STOP = 4, 4, 0.4
POINTS = 12
"""The number of steps at which gradients are compared."""


def features(weight: Weight = 0.5) -> FeatureAlignment:
    return FeatureAlignment(weight, BLOCK, hidden=256, teacher=TEACHER)


def holistic(weight: Weight = 0.5) -> Denoising:
    attention = AttentionAlignment(weight, BLOCK, LAYERS, teacher=TEACHER)
    return Denoising((Regression(), features(weight), attention))


def taught_by() -> str:
    """Say how good the teacher is."""
    facts = read_json(ROOT / "benchmarks" / "donors" / "vit" / "training.json")
    return f"a teacher that tells {100 * facts['accuracy']:.1f} % of test pictures' classes"


class Cosines:
    """The cosine between the gradients of the alignment and of the prediction, at some steps of a run."""

    def __init__(self, steps: int) -> None:
        self.every, self.found = max(1, steps // POINTS), []

    def __call__(self, run: Training) -> None:
        if run.done % self.every:
            return
        losses = run.losses(run.indices(), range(run.settings.batch), None)
        aligned = 0.5 * (losses["FeatureAlignment"] + losses["AttentionAlignment"])
        blocks: Any = run.model.blocks
        shared = [p for block in blocks[:BLOCK] for p in block.parameters()]
        self.found.append(agreement([losses["Regression"], aligned], shared))

    def fall(self) -> Tensor:
        """The later half of the cosines less the earlier, point by point."""
        half = len(self.found) // 2
        values = torch.tensor(self.found, dtype=torch.float64)
        return values[-half:] - values[:half]


def of_losses(steps: int) -> Iterator[Claim]:
    """Yield the claims on trained networks."""
    cosines, stop = Cosines(steps), round(STOP * steps)
    arms = {
        "plain": plain(steps),
        "REPA": trained(Denoising((Regression(), features())), steps),
        "never stopped": trained(holistic(), steps, cosines),
        "stopped": trained(holistic(Between(0.5, 0, stop)), steps),
    }
    judged, hits = paired_loss(arms, Pictures("test")), probe(arms, BLOCK)
    losses = ", ".join(f"{name} {judged.mean(name):.4g}" for name in arms)
    shares = ", ".join(f"{name} {100 * hits[name].mean():.2f}" for name in arms)
    about = f"{steps} steps of 32, 1 seed, stop at {stop}, {taught_by()}; losses: {losses}"

    def tried(claim: str, arm: str, rival: str, paper: str) -> Claim:
        found = judged.difference(arm, rival)
        return Claim.tried(
            f"{claim}: loss of {arm} less {rival}",
            paper=paper,
            ours=found.mean,
            interval=found.interval,
            claimed=(None, 0.0),
            unit="loss",
            against=f"{about}; {found.relative[0]:+.2%}",
        )

    yield tried(
        "Aligning features lowers the loss after as many steps",
        "REPA",
        "plain",
        "FID of SiT-XL/2 after 400K steps: 7.9 with REPA, 8.3 without after 7M",
    )
    yield tried(
        "Attention beside features is better than features alone, early",
        "never stopped",
        "REPA",
        "FID after 500K steps: 8.1 with both, never stopped, 7.5 with features alone; early both lead",
    )
    yield tried(
        "Stopping ends better than never stopping",
        "stopped",
        "never stopped",
        "FID after 500K steps: 5.3 stopped at 250K, 8.1 never",
    )
    yield tried(
        "Alignment and a stop end better than plain training",
        "stopped",
        "plain",
        "FID 5.3 after 500K steps, 8.6 of SiT after 7M",
    )
    for arm in ("REPA", "never stopped"):
        mean, interval = gain(hits, arm, "plain")
        yield Claim.tried(
            f"A linear probe of the aligned block rises: {arm} less plain",
            paper="shown as a figure: the probe rises with REPA",
            ours=100 * mean,
            interval=(100 * interval[0], 100 * interval[1]),
            claimed=(0.0, None),
            unit="points",
            against=f"block {BLOCK}, 4,000 test pictures at noise-time 0.3, no class, in %: {shares}",
        )
    fall, values = cosines.fall(), ", ".join(f"{v:.3f}" for v in cosines.found)
    yield Claim.tried(
        "The gradients of alignment and prediction agree less and less: cosine, later half less earlier",
        paper="positive early, near 0 from 200K to 400K steps, negative later",
        ours=fall.mean().item(),
        interval=bootstrap(fall),
        claimed=(None, 0.0),
        against=f"weights of blocks 1 to {BLOCK}, {len(cosines.found)} steps of the run that never stops: {values}",
    )


def of_costs(rounds: int) -> Iterator[Claim]:
    """Yield the claims on what a training step costs."""
    objectives = {
        "plain": Denoising(),
        "after the stop": holistic(Between(0.5, 0, 1)),
        "REPA": Denoising((Regression(), features())),
        "HASTE": holistic(),
    }
    seconds = step_seconds(objectives, rounds)
    others = ", ".join(f"{name} {ratio(seconds, name, 'plain')[0]:.3f}" for name in ("REPA", "HASTE"))
    mean, interval = ratio(seconds, "after the stop", "plain")
    yield Claim.tried(
        "A step after the stop takes the time of a plain one",
        paper="that of plain SiT in the paper; the published code goes on with teacher and scores",
        ours=mean,
        interval=interval,
        claimed=(0.97, 1.03),
        against=f"{rounds} rounds in turns, one thread; before the stop, of plain: {others}, with a teacher of two "
        "forward passes of the student, where DINOv2-B takes a fifth of one of SiT-XL/2's",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that this machine cannot try."""
    yield Claim.untried(
        "SiT-XL/2 under HASTE reaches the FID of 7M plain steps after 250K, 28 times earlier",
        paper="FID 8.6 at 50 epochs; 1.42 after 500 epochs with guidance in an interval, as REPA's best",
        reason="takes ImageNet, DINOv2's weights and a GPU",
    )
    yield Claim.untried(
        "An earlier or later stop than 250K of 500K is worse",
        paper="FID 5.3 at 250K, 7.4 at 400K, 8.1 without",
        reason="takes runs in which the gradients come to oppose each other, which ours are too short for",
    )


def main(steps: int = 150, rounds: int = 8) -> None:
    """Try the claims.

    Args:
        steps: of each training. rounds: of the timing.
    """
    torch.set_num_threads(1)
    TEACHER.facts()
    write("42-haste", [*of_costs(rounds), *of_losses(steps), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
