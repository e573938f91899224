"""The guided model as a solver sees it: at (x, t) it gives an estimate that can be read in any form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.path import Path, Prediction
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.sample.guidance import Guidance

Progress = Callable[[int, int], None]
"""`progress(done, total)`, in evaluations."""

LATEST = 1 - 1e-3
"""Where quantities that are infinite at alpha = 0 are evaluated instead of at t = 1 (SiT's sample_eps)."""


@dataclass(frozen=True)
class Estimate:
    """What the guided model says at (x, t).

    Args:
        value: [B, C, ...] of the form `kind`, in the dtype of `x`. t: [1].
        fraction: [B, C, ...] where the model learns its variance; always of the conditional branch.
    """

    path: Path
    kind: Prediction
    value: Tensor
    x: Tensor
    t: Tensor
    fraction: Tensor | None = None

    def to(self, target: Prediction) -> Tensor:
        """The estimate as velocity, noise, data or score, [B, C, ...]."""
        return self.path.convert(self.value, self.x, self.t, self.kind, target)


class Field:
    """A model, its guidance and its policies on one trajectory; each call is one evaluation.

    Args:
        total: evaluations that the solver will make.
        batched: run conditional and unconditional rows as one call of 2B rows, in the lane "cond+uncond".

    Raises:
        ConfigError: a guide's path or prediction differs from the model's.
    """

    def __init__(
        self,
        model: Model,
        cond: Cond,
        guidance: Guidance,
        trajectory: Trajectory,
        total: int,
        batched: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.cond, self.guidance, self.trajectory = model, cond, guidance, trajectory
        self.total, self.batched, self.progress = total, batched, progress
        self.path: Path = model.config.convention.make_path()
        self.kind: Prediction = model.config.convention.prediction
        self.index = 0
        self.forwards = 0
        self.networks = dict(guidance.networks())
        for name, network in self.networks.items():
            self._same_convention(name, network)
        # policies key their state by (net, lane), so a guide built like the model shares its sessions
        self._other = Trajectory((), (), total)

    def __call__(self, x: Tensor, t: float) -> Estimate:
        """The guided estimate at `x` [B, C, ...] and time `t`, noise-time or the discrete index.

        A noise or score prediction says nothing of the data at alpha = 0; such a model is asked at `LATEST` instead.
        """
        if self._blind_at_noise:
            t = min(t, LATEST)
        clock = self.path.noise_time(t)
        calls: list[Call] = []
        fractions: dict[str, Tensor | None] = {}

        def branches(*names: str) -> tuple[Tensor, ...]:
            found = self._branches(names, x, t, clock, calls)
            fractions.update({name: fraction for name, (_, fraction) in found.items()})
            return tuple(found[name][0] for name in names)

        value = self.trajectory.guided(calls[0] if calls else Call(0, 0, 0), self.guidance(branches, clock))
        raise NotImplementedError
