"""One sample a seed in batches: one model, one list of seeds, one way to sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ditkit.core.codec import Codec, encode_given
from ditkit.core.cond import Cond
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError
from ditkit.core.labels import resolve_labels
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy, as_policies
from ditkit.core.receipt import PolicyReceipt
from ditkit.core.spec import component
from ditkit.core.trajectory import Trajectory
from ditkit.sample.given import check_given
from ditkit.sample.guidance import Guidance, guided
from ditkit.sample.loop import Sampled, sample
from ditkit.sample.noise import distinct
from ditkit.sample.solvers import Solver

Progress = Callable[[int, int], None]  # (evaluations done, evaluations in all)
UNCONDITIONED = Cond()


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


@dataclass(frozen=True, eq=False)
class SamplingJob:
    """One sample a seed, in batches of at most `batch_size`.

    Args:
        cond: what each sample is told, in the order of the seeds.
        shape: of one sample as a signal, without the batch axis.
        max_bytes: memory that the policies may hold together in a batch.
    """

    model: Denoiser
    cond: Cond
    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    steps: int
    solver: Solver
    guidance: Guidance
    batch_size: int = 8
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            integer(name, getattr(self, name), least=1)

    @classmethod
    def of(
        cls,
        model: Denoiser,
        label: int | str | Sequence[int | str] | None,
        seeds: Sequence[int],
        steps: int,
        solver: Solver | str,
        guidance: float | Guidance,
        batch_size: int,
        max_bytes: int | None,
        cond: Cond = UNCONDITIONED,
        shape: Sequence[int] | None = None,
    ) -> Self:
        """The workload that `generate` and `compare` are asked for in these words.

        Args:
            label: a class by name or index, or one a seed; by default those of `cond`, or else the seeds are spread
                over the classes.
            cond: what else each sample is told, in the order of the seeds.
            shape: of one sample; by default that of the given content, if any, else the model's own.
            solver: or its text, such as "heun". guidance: or a classifier-free scale, of which 1 is none.

        Raises:
            ConfigError: one of them is nothing of the kind, or out of range.
            ConfigError, ShapeError: those of `check_given`.
        """
        if not isinstance(model, Denoiser):
            raise ConfigError(f"model={model!r} should be a denoiser, such as ditkit.load gives")
        if isinstance(solver, str):
            solver = component(Solver, solver)  # type: ignore[type-abstract]
        if not isinstance(solver, Solver):
            raise ConfigError(f"solver={solver!r} should be a Solver, or a text such as 'heun'")
        seeds = distinct(seeds)
        if label is None and cond.label is not None:
            label = cond.label.tolist()
        labels = resolve_labels(model, label, len(seeds))
        if labels is not None:
            cond = replace(cond, label=torch.tensor(labels))
        own = model.signal_shape if cond.context is None else cond.context.shape[1:]
        shape = tuple(own if shape is None else shape)
        check_given(cond, len(seeds), shape)
        return cls(model, cond, seeds, shape, steps, solver, guided(guidance), batch_size, max_bytes)

    @property
    def labels(self) -> list[int] | None:
        """The class of each sample; None for a model that is told none."""
        return None if self.cond.label is None else self.cond.label.tolist()

    def check(self, policies: Sequence[Policy]) -> None:
        """Raise what the first step would: a conflict, no usable site, a setting that does not fit."""
        total = self.solver.evaluations(self.steps)
        Trajectory(self.model.sites(), policies, total, self.max_bytes, self.model.learned)
        for policy in policies:
            policy.check_model(self.model)

    def draw(
        self,
        policies: Policy | str | Sequence[Policy | str] = (),
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> Drawn:
        """One sample a seed, in `steps` steps (by default the workload's), under `policies`.

        Raises:
            NoEffectError: a policy saved nothing. DitkitError: as `ditkit.sample.sample` does.
        """
        policies = as_policies(policies)
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

    def first_batch(self) -> SamplingJob:
        """The same, with the seeds of the first batch only."""
        first = slice(self.batch_size)
        return replace(self, seeds=self.seeds[first], cond=self.cond.rows(first))

    def _batch(
        self, start: int, policies: Sequence[Policy], steps: int, progress: Progress | None
    ) -> Sampled:
        part = slice(start, start + self.batch_size)
        codec, cond = self.model.codec, self.cond.rows(part)
        drawn = sample(
            self.model,
            encode_given(codec, cond),
            self.seeds[part],
            shape=codec.latent_shape(self.shape),
            steps=steps,
            solver=self.solver,
            guidance=self.guidance,
            policies=policies,
            max_bytes=self.max_bytes,
            progress=progress,
        )
        signal = decoded(codec, drawn.samples)
        return replace(drawn, samples=cond.to(signal.device).given(signal))


@torch.no_grad()
def decoded(codec: Codec, latents: Tensor) -> Tensor:
    return codec.decode(latents)


def full_evaluations(receipt: PolicyReceipt) -> int:
    """Evaluations of the lane with the most of them in which every owned site ran, on all rows."""
    return max((len(receipt.full(lane)) for lane in receipt.rows), default=0)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)
