"""Settings of a training run: one frozen object, printed by `--dry-run` and kept beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from ditkit.core.config import Count, Natural, Share, check_fields
from ditkit.core.errors import ConfigError
from ditkit.train.ema import Constant, Power

Precision = Literal["float32", "bf16"]
Rule = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Group:
    """A part of the weights with a rate of its own.

    Args:
        part: as of `Settings.trained`, or "parts": all modules of terms, or a term's name: its own.
        rate: times the run's learning rate. decay: of the weights; None is the run's.
    """

    part: str
    rate: float = 1.0
    decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ConfigError(
                f"training: group {self.part!r}: rate={self.rate} should be positive and finite"
            )
        if self.decay is not None and not 0 <= self.decay < math.inf:
            raise ConfigError(
                f"training: group {self.part!r}: decay={self.decay} should be 0 or more, and finite"
            )


@dataclass(frozen=True)
class Settings:
    """Everything about a run but its model, its data and its objective.

    Args:
        steps: optimiser steps.
        batch: samples a step, over all processes and accumulated parts together.
        accumulate: parts into which each process cuts its share of the batch.
        optimizer: "adamw", or "muon" (arXiv 2502.16982) for the matrices of the blocks and AdamW for the rest.
        learning_rate: of AdamW and Muon, reached after `warmup` steps.
        warmup: steps in which the learning rate rises.
        decay_after: from this step on the learning rate falls as the inverse square root of the step (EDM2,
            eq. 67); 0 keeps it constant.
        cosine: the learning rate falls from its height to `lowest` at `steps`, along half a cosine.
        linear_after: from this step on the learning rate falls in a straight line, to `lowest` at `steps` (RAE); 0 for
            never.
        lowest: share of its height at which a cosine or a line ends.
        betas: of AdamW.
        weight_decay: of AdamW and Muon.
        clip: largest gradient norm; 0 for none.
        skip_above: a step whose gradient norm, before it is clipped, is larger changes no weight; 0 for never.
        precision: of the forward pass.
        trained: parts whose weights are, joined by "+": "all"; "attention", its projections, and what policies train of
            their own; "norms"; "learned"; a part that the network names; or the name of a transform or a policy, for
            what it trains.
        groups: parts with a learning rate of their own; the first that fits owns a weight.
        averages: of the weights; the first is what is sampled and saved.
        gradient_checkpointing: recompute blocks in the backward pass.
        compile: the network, by torch.compile.
        seed: of weights, order, noise, times and dropout.
        save_every: steps between resumable states; one more after the last step. 0 for never, then neither.
        sheet_every: steps between sample sheets; likewise.
        snapshot_every: steps between copies of the averages for post-hoc reconstruction; likewise.
    """

    steps: Count = 10_000
    batch: Count = 64
    accumulate: Count = 1
    optimizer: Rule = "adamw"
    learning_rate: Annotated[float, Interval(gt=0, lt=math.inf)] = 1e-4
    warmup: Natural = 0
    decay_after: Natural = 0
    cosine: bool = False
    linear_after: Natural = 0
    lowest: Share = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Interval(ge=0, lt=math.inf)] = 0.0
    clip: Annotated[float, Interval(ge=0, lt=math.inf)] = 0.0
    skip_above: Annotated[float, Interval(ge=0, lt=math.inf)] = 0.0
    precision: Precision = "float32"
    trained: str = "all"
    groups: tuple[Group, ...] = ()
    averages: tuple[Constant | Power, ...] = (Constant(),)
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Natural = 0
    save_every: Natural = 500
    sheet_every: Natural = 1000
    snapshot_every: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self, "training")
        self._check_parts()
        if self.warmup > self.steps:
            raise ConfigError(f"training: warmup={self.warmup} is longer than steps={self.steps}")
        self._check_fall()
        if self.batch % self.accumulate:
            raise ConfigError(
                f"training: batch={self.batch} does not divide into accumulate={self.accumulate} parts"
            )
        if not self.averages:
            raise ConfigError("training: averages is empty; the first average is what is sampled and saved")
        if self.snapshot_every and not any(isinstance(average, Power) for average in self.averages):
            raise ConfigError(
                f"training: snapshot_every={self.snapshot_every} keeps power-function averages, and averages="
                f"{self.averages} has none; expected a Power among them, or snapshot_every=0"
            )
        if len(set(self.averages)) < len(self.averages):
            raise ConfigError(f"training: averages={self.averages} names one twice")

    def _check_fall(self) -> None:
        falls = {"cosine": self.cosine, **{n: getattr(self, n) for n in ("decay_after", "linear_after")}}
        given = [name if value is True else f"{name}={value}" for name, value in falls.items() if value]
        if len(given) > 1:
            raise ConfigError(f"training: {' and '.join(given)} both lower the learning rate")
        if self.lowest and not (self.cosine or self.linear_after):
            raise ConfigError(
                f"training: lowest={self.lowest} is where a fall ends, expected cosine or linear_after beside it"
            )

    def _check_parts(self) -> None:
        if not all(self.trained.split("+")):
            raise ConfigError(
                f"training: trained={self.trained!r}, expected parts joined by '+', as in 'lora+norms'"
            )
        named = [group.part.lower() for group in self.groups]
        if repeated := [part for part in named if named.count(part) > 1]:
            raise ConfigError(f"training: groups name {repeated[0]!r} twice, expected each part once")

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        up = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        down = max(step / self.decay_after, 1.0) ** -0.5 if self.decay_after else 1.0
        first = self.linear_after or self.warmup
        done = max(step - first, 0) / max(self.steps - first, 1)
        if self.cosine:
            down = self.lowest + (1 - self.lowest) * (0.5 + 0.5 * math.cos(math.pi * done))
        elif self.linear_after:
            down = 1 - (1 - self.lowest) * done
        return self.learning_rate * up * down

    def share(self, processes: int) -> int:
        """Return the number of samples that one process holds at once.

        Raises:
            ConfigError: the batch does not divide.
        """
        parts = processes * self.accumulate
        if self.batch % parts:
            raise ConfigError(
                f"training: batch={self.batch} does not divide among {processes} processes "
                f"x accumulate={self.accumulate}"
            )
        return self.batch // parts
