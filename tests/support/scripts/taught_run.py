"""Training runs with terms that own modules, teachers, schedules, an adversary, and an objective that remembers.

Or: `taught_run.py FOLDER NAME STEPS [--resume] [--kill N] [--save-every N]`, which kills itself by SIGKILL in the
middle of step N.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_run import Pictures, settings, toy_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from ditkit.adapt.lora import LoRA
from ditkit.attention import Neighbourhood
from ditkit.compress import Kept
from ditkit.core.cond import Cond
from ditkit.core.convention import SIT
from ditkit.core.run import Site, named
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.objective import Cursor, Term
from ditkit.train.randomness import generator
from ditkit.train.schedules import Between, Weight
from ditkit.train.settings import Group
from ditkit.train.teacher import Ask, EmaTeacher, EncoderTeacher, Teacher
from ditkit.train.terms.distillation import AttentionDistillation, PredictionDistillation
from ditkit.train.terms.regression import Regression
from toy_transforms import ToyAffine

CALLS: list[tuple[int, str]] = []
"""Steps at which a term's loss was asked for."""


def width_of(model: Any) -> int:
    return next(site.width for site in model.sites() if site.kind == "block")


AVERAGE = EmaTeacher(1)


@dataclass(frozen=True)
class Aligned(Term):
    """A block through a head, to a later block of an average of the weights, at a time nearer to the data."""

    weight: Weight = 0.2
    gap: float = 0.2
    teacher: Teacher = AVERAGE

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [named(sites, "block")[0]]

    def modules(self, model: Any) -> nn.Module:
        width = width_of(model)
        return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def asks(self, batch: Any) -> Ask:
        t = (batch.t - self.gap * batch.rng.of_term("Aligned")[:, 0]).clamp_min(0)
        last = named(batch.sites, "block")[-1]
        x = batch.path.mix(batch.data, batch.noise, t.to(batch.data.dtype))
        return Ask(x=x, t=t, taps=(last,), stop=last)

    def loss(self, batch: Any) -> Tensor:
        CALLS.append((batch.step, "Aligned"))
        (own,), (taught,) = batch.taps.values(), batch.taught.taps.values()
        assert batch.taught.out is None
        return F.smooth_l1_loss(batch.own(own), taught, reduction="none").flatten(1).mean(1)


def encoder() -> nn.Module:
    torch.manual_seed(3)
    return nn.Conv2d(1, 16, 2, 2)


ENCODER = EncoderTeacher(encoder)


@dataclass(frozen=True)
class Represented(Term):
    """A block through a projector, to a frozen encoder of the data."""

    weight: Weight = 0.5
    teacher: Teacher = ENCODER

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [named(sites, "block")[-1] + ":in"]

    def modules(self, model: Any) -> nn.Module:
        return nn.Linear(width_of(model), 16)

    def asks(self, batch: Any) -> Ask:
        return Ask(x=batch.data)

    def loss(self, batch: Any) -> Tensor:
        CALLS.append((batch.step, "Represented"))
        (tap,) = batch.taps.values()
        target = batch.taught.out.flatten(2).mT
        return 1 - F.cosine_similarity(batch.own(tap), target, dim=-1).mean(1)


@dataclass(frozen=True)
class Adversary(Term):
    """A network of its own tells velocities that are from those that are predicted."""

    weight: Weight = 0.1
    rate: float = 1e-3
    every: int = 2

    def modules(self, model: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 1), nn.SiLU(), nn.Conv2d(8, 1, 1))

    def loss(self, batch: Any) -> Tensor:
        CALLS.append((batch.step, "Adversary"))
        return F.softplus(-batch.own(batch.prediction)).flatten(1).mean(1)

    def opposed(self, batch: Any) -> Tensor:
        assert not batch.prediction.requires_grad
        real = batch.own(batch.path.velocity(batch.data, batch.noise, batch.t.float()))
        return (F.softplus(-real) + F.softplus(batch.own(batch.prediction))).flatten(1).mean(1)


@dataclass(frozen=True)
class Walk(Denoising):
    """Each step of the optimiser is one denoising step of a trajectory, towards the exact network's own direction."""

    points: int = 4
    can_say: bool = True

    def begin(self, run: Any) -> Cursor:
        return Walking(self, run)


class Walking(Cursor):
    def __init__(self, objective: Walk, run: Any) -> None:
        self.objective, self.run, self.number, self.point = objective, run, 0, 0
        self.x = torch.zeros(4, 1, 8, 8)

    @property
    def rests(self) -> bool:
        return self.point == 0

    def losses(self, step: int) -> dict[str, Tensor]:
        if self.point == 0:  # randomness belongs to the trajectory
            rank = self.run.accelerator.process_index
            self.x = torch.randn(
                self.x.shape, generator=generator(self.run.settings.seed, 50, self.number, rank)
            )
        t = torch.full((4,), 1 - self.point / self.objective.points)
        out = self.run.forward(self.x, t, Cond(label=torch.arange(4), drop=torch.zeros(4, dtype=torch.bool)))
        out = self.run.model.config.convention.split(out)[0]
        self.x = (self.x - out.detach() / self.objective.points).clamp(-3, 3)
        self.point = (self.point + 1) % self.objective.points
        self.number += self.point == 0
        return {"loss": (out - self.x).square().mean()}

    def state(self) -> Mapping[str, Tensor] | None:
        if not self.objective.can_say:
            return None if self.point else {"at": torch.tensor([self.number, 0])}
        return {"x": self.x, "at": torch.tensor([self.number, self.point])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.x = state.get("x", self.x).clone()
        self.number, self.point = state["at"].tolist()


POLICY = Neighbourhood(radius=2, pooled=2, block=8, kernel="cpu")
ADAPTED = (Kept(blocks=(0, 2)), LoRA(rank=2), ToyAffine())
RUNS: dict[str, Any] = {
    "plain": Denoising(),
    "zero": Denoising((Regression(), Aligned(0.0), Represented(0.0), Adversary(0.0))),
    "aligned": Denoising((Regression(), Aligned(), Represented(Between(0.5, 0, 4)))),
    "adversary": Denoising((Regression(), Adversary())),
    "walk": Walk(),
    "silent walk": Walk(can_say=False),
    "adapted": Denoising(),
    "distilled": Denoising((Regression(), PredictionDistillation(), AttentionDistillation(every=1))),
}


class Killing(Pictures):
    """Data that kill the process when the batch of some step is asked for."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step = step

    def batch(self, indices: Tensor, chance: Any = None) -> tuple[Tensor, Cond]:
        if self.step is not None and chance.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices, chance)


def model_of(name: str, resume: bool) -> Any:
    """A resumed one has other values and only the structure: the state brings all of them."""
    model = toy_model(SIT, depth=3)
    if name != "adapted":
        return model
    if resume:
        torch.manual_seed(77)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model.shaped(ADAPTED).adopt([POLICY])
    for transform in ADAPTED:
        model.transform(transform)
    return model.adopt([POLICY])


def run(
    folder: Path, name: str, steps: int = 6, resume: bool = False, kill: int | None = None, **changed: Any
) -> Any:
    if name == "adapted":
        changed = {"trained": "lora+toyaffine+neighbourhood", "groups": (Group("lora", 2.0),), **changed}
    given = settings(steps=steps, **{"save_every": 1, "warmup": 2, **changed})
    return train(model_of(name, resume), Killing(kill), RUNS[name], given, folder, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:]
    killed = int(words[words.index("--kill") + 1]) if "--kill" in words else None
    every = int(words[words.index("--save-every") + 1]) if "--save-every" in words else 1
    run(Path(words[0]), words[1], int(words[2]), "--resume" in words, killed, save_every=every)
