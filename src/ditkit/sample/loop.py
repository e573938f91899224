"""One call from seeds to samples: solver, guidance and policies around a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.core.receipt import PolicyReceipt
from ditkit.sample.denoiser import GuidedDenoiser, Progress, placement
from ditkit.sample.guidance import Guidance, Unguided
from ditkit.sample.noise import SampleNoise
from ditkit.sample.solvers import Euler, Solver

EULER, UNGUIDED = Euler(), Unguided()


@dataclass(frozen=True)
class Sampled:
    """What a trajectory gave and what it took.

    Args:
        samples: [B, *shape] float32 on the model's device, in the order of the seeds.
        receipts: one a policy. policy_bytes: the most that all policies held together.
        evaluations: of the guided model, which a solver asks for.
        forwards: of the networks; a batched pair of branches is one.
    """

    samples: Tensor
    receipts: list[PolicyReceipt]
    policy_bytes: int
    evaluations: int
    forwards: int


@torch.no_grad()
def sample(
    model: Denoiser,
    cond: Cond,
    seeds: Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    steps: int = 50,
    solver: Solver = EULER,
    guidance: Guidance = UNGUIDED,
    policies: Sequence[Policy] = (),
    max_bytes: int | None = None,
    batched: bool = False,
    progress: Progress | None = None,
) -> Sampled:
    """Draw one sample a seed, the same alone, in a batch, or in another order (to the rounding of the model).

    Args:
        model: in eval mode, on the device where the sampling shall happen.
        cond: what each sample is told, in the order of `seeds`; given content comes out as it went in.
        shape: of one sample, without the batch axis; by default the model's own.
        max_bytes: memory that all policies may hold together.
        batched: run conditional and unconditional rows as one call of 2B rows, in the lane "cond+uncond"; by
            default they are two calls, in the lanes "cond" and "uncond".
        progress: called after each evaluation with (done, total).

    Raises:
        ConfigError: steps below 1, seeds that repeat or do not match `cond`, a model in train mode, or a
            solver, guidance or policy that does not fit the model.
        NoEffectError: a policy touched nothing or saved nothing.
        DitkitError: a sample is not finite.
    """
    integer("steps", steps, least=1)
    device, _ = placement(model)
    noise = SampleNoise(seeds, model.sample_shape if shape is None else shape)
    _check_batch(cond, len(noise.seeds))
    total = solver.evaluations(steps)
    field = GuidedDenoiser(
        model,
        cond.to(device),
        guidance,
        policies,
        total,
        batched=batched,
        max_bytes=max_bytes,
        progress=progress,
    )
    solver.times(field.path, steps)  # refuses a path before any work is done
    samples = solver.solve(field, noise.draw(device).to(state_dtype(device)), steps, noise).float()
    samples = cond.to(device).given(samples)
    _check_finite(samples, noise.seeds)
    receipts = [receipt for trajectory in field.trajectories for receipt in trajectory.finish()]
    held = sum(trajectory.peak_bytes for trajectory in field.trajectories)
    return Sampled(samples, receipts, held, field.index, field.forwards)


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_batch(cond: Cond, seeds: int) -> None:
    for f in fields(cond):
        value = getattr(cond, f.name)
        if value is not None and len(value) != seeds:
            raise ConfigError(f"Cond.{f.name} has {len(value)} rows for {seeds} seeds; expected one a seed")


def _check_finite(samples: Tensor, seeds: Sequence[int]) -> None:
    finite = samples.flatten(1).isfinite().all(1).tolist()
    bad = [seed for seed, ok in zip(seeds, finite, strict=True) if not ok]
    if bad:
        listed = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
        raise DitkitError(
            f"{len(bad)} of {len(finite)} samples are not finite (seeds {listed}); is the model sound?"
        )
