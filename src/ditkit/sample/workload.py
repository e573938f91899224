"""One sample a seed in batches: one model, one list of seeds, one way to sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.core.receipt import PolicyReceipt
from ditkit.core.trajectory import Trajectory
from ditkit.sample.guidance import Guidance
from ditkit.sample.loop import Sampled, sample
from ditkit.sample.solvers import Solver

Progress = Callable[[int, int], None]  # (evaluations done, evaluations in all)


@dataclass(frozen=True)
class Drawn:
    """What one pass over all seeds gave.

    Args:
        samples: [n, *sample_shape] float32 on the CPU, in the order of the seeds.
        receipts: as JSON, each once where batches do not differ.
        evaluations: of one trajectory. full: those of them in which no policy replaced anything.
        policy_bytes: the most that the policies held in a batch.
    """

    samples: Tensor
    receipts: tuple[dict[str, object], ...]
    evaluations: int
    full: int
    policy_bytes: int


@dataclass(frozen=True)
class Workload:
    """One sample a seed, in batches of at most `batch_size`.

    Args:
        labels: one class a seed; None for a model that is told none.
        max_bytes: memory that the policies may hold together in a batch.
    """

    model: Model
    labels: tuple[int, ...] | None
    seeds: tuple[int, ...]
    steps: int
    solver: Solver
    guidance: Guidance
    batch_size: int = 8
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} should be at least 1")

    def check(self, policies: Sequence[Policy]) -> None:
        """Raise what the first step would: a conflict, no usable site, a setting that does not fit."""
        Trajectory(self.model.sites(), policies, self.solver.evaluations(self.steps), self.max_bytes)

    def draw(
        self, policies: Sequence[Policy] = (), steps: int | None = None, progress: Progress | None = None
    ) -> Drawn:
        """One sample a seed, in `steps` steps (by default the workload's), under `policies`.

        Raises:
            NoEffectError: a policy saved nothing. DitkitError: as `ditkit.sample.sample` does.
        """
        steps = self.steps if steps is None else steps
        starts = range(0, len(self.seeds), self.batch_size)
        each = self.solver.evaluations(steps)
        parts = [
            self._batch(start, policies, steps, _shifted(progress, i * each, len(starts) * each))
            for i, start in enumerate(starts)
        ]
        receipts = [receipt.as_dict() for part in parts for receipt in part.receipts]
        return Drawn(
            samples=torch.cat([part.samples.cpu() for part in parts]),
            receipts=tuple(r for i, r in enumerate(receipts) if r not in receipts[:i]),
            evaluations=each,
            full=min((full_evaluations(r) for part in parts for r in part.receipts), default=each),
            policy_bytes=max(part.policy_bytes for part in parts),
        )

    def steps_like(self, share: float) -> int:
        """How many exact steps make nearest to `share` of the evaluations of this workload's steps."""
        wanted = share * self.solver.evaluations(self.steps)
        return min(range(1, self.steps + 1), key=lambda n: abs(self.solver.evaluations(n) - wanted))

    def first_batch(self) -> Workload:
        """The same, with the seeds of the first batch only."""
        labels = None if self.labels is None else self.labels[: self.batch_size]
        return replace(self, seeds=self.seeds[: self.batch_size], labels=labels)

    def _batch(
        self, start: int, policies: Sequence[Policy], steps: int, progress: Progress | None
    ) -> Sampled:
        part = slice(start, start + self.batch_size)
        return sample(
            self.model,
            Cond() if self.labels is None else Cond(label=torch.tensor(self.labels[part])),
            self.seeds[part],
            steps=steps,
            solver=self.solver,
            guidance=self.guidance,
            policies=policies,
            max_bytes=self.max_bytes,
            progress=progress,
        )


def full_evaluations(receipt: PolicyReceipt) -> int:
    """Evaluations of the lane with the most of them in which every owned site ran."""
    return max((sum(not gone for _, gone in lane.values()) for lane in receipt.rows.values()), default=0)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)
