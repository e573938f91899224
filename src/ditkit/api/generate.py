"""Pictures and clips from a model, by seed, class and what is given of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.labels import class_names
from ditkit.core.model import Model
from ditkit.core.policy import Policy, as_policies
from ditkit.sample import Euler, Guidance, Solver
from ditkit.sample.denoiser import Progress
from ditkit.sample.workload import UNCONDITIONED, SamplingJob

EULER = Euler()


@dataclass(frozen=True)
class Generated:
    """What was drawn, and what it took.

    Args:
        images: [B, C, H, W], or clips [B, C, T, H, W]: float32, nominally in [-1, 1], on the CPU, in the order
            of the seeds.
        labels: the class each sample was told, by name; empty for a model without classes.
        receipts: one a policy and batch, as JSON, each once where batches do not differ.
        seconds: wall clock. policy_bytes: the most that the policies held in a batch.
        evaluations: of the guided model in one trajectory.
    """

    images: Tensor
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    receipts: tuple[dict[str, Any], ...]
    seconds: float
    policy_bytes: int
    evaluations: int


def generate(
    model: Model,
    label: str | int | Sequence[str | int] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    steps: int = 50,
    guidance: float | Guidance = 2.0,
    solver: Solver | str = EULER,
    policies: Policy | str | Sequence[Policy | str] = (),
    batch_size: int = 8,
    max_bytes: int | None = None,
    cond: Cond = UNCONDITIONED,
    shape: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Draw one sample a seed, the same alone and in a batch (to the rounding of the model).

    Args:
        label: a class by name or index, or one a seed; by default the seeds are spread over the classes.
        guidance: a classifier-free scale (1 is none), or any guidance.
        solver, policies: objects, or texts as the command line takes them ("heun", "taylorseer:interval=4").
        batch_size: samples drawn at once. max_bytes: memory that the policies may hold meanwhile.
        cond: what else each sample is told, in the order of the seeds, such as given frames and their mask, which
            gives some of each sample; without one, all is made.
        shape: of one sample (C, H, W) or (C, T, H, W); by default that of the given content, or the model's.
        progress: called after each evaluation with (done, total).

    Raises:
        ConfigError: an unknown class, a seed given twice, a number out of range, a policy that does not fit.
        ConfigError, ShapeError: those of `ditkit.sample.given.check_given`, before anything is drawn.
        ConflictError, NoEffectError: two policies own one site; a policy saved nothing.
    """
    work = SamplingJob.of(model, label, seeds, steps, solver, guidance, batch_size, max_bytes, cond, shape)
    work.check(policies := as_policies(policies))
    began = time.perf_counter()
    drawn = work.draw(policies, progress=progress)
    return Generated(
        images=drawn.samples,
        seeds=work.seeds,
        labels=() if work.labels is None else tuple(class_names(model)[c] for c in work.labels),
        receipts=drawn.receipts,
        seconds=time.perf_counter() - began,
        policy_bytes=drawn.policy_bytes,
        evaluations=drawn.evaluations,
    )
