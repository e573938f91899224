"""Sampling: the settings (`Sampling`), one batch (`sample`), and all seeds of a model in batches (`Sampler`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ditkit.core.codec import IDENTITY, SIDE, Codec, Coded, check_side, encode_given
from ditkit.core.cond import Cond, check_cond, listed
from ditkit.core.condition import Condition
from ditkit.core.config import LARGEST, MOST_STEPS, integer
from ditkit.core.errors import ConfigError, DitkitError, ShapeError, unknown
from ditkit.core.labels import class_names, resolve_labels
from ditkit.core.model import Denoiser
from ditkit.core.path import Path
from ditkit.core.policy import Policy, with_inherent
from ditkit.core.receipt import PolicyReceipt
from ditkit.core.spec import components
from ditkit.core.trajectory import Trajectory, refuse_idle
from ditkit.nn.text_encoder import text_encoder
from ditkit.sample.denoiser import GuidedDenoiser, Progress, placement
from ditkit.sample.guidance import ClassifierFree, Guidance, Unguided, guided
from ditkit.sample.noise import SampleNoise, distinct
from ditkit.sample.solvers import Solver, default_solver

LOG = logging.getLogger(__name__)
PICTURES = 4
"""Axes of a batch of pictures."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, for every verb that draws.

    A solver and policies may be given as texts ("heun", "taylorseer:interval=4"), one policy without a sequence
    around it, and a guidance as its classifier-free scale, of which 1 is none; all are kept as objects.

    Args:
        steps: of the solver. solver: from noise to sample; by default Euler's on a continuous path, and DDIM's on a
            discrete one, which has no velocity.
        guidance: of the branches of the model.
        policies: at work together.
        batch_size: samples drawn at once. max_bytes: memory that the policies may hold meanwhile.
        seeds: one a sample, each from 0 to 2^32 - 1.

    Raises:
        ConfigError: one of them is nothing of the kind or out of range, or a seed is given twice.
    """

    steps: int = 50
    solver: Solver | None = None
    guidance: Guidance = ClassifierFree(2.0)
    policies: tuple[Policy, ...] = ()
    batch_size: int = 8
    max_bytes: int | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, most in (("steps", MOST_STEPS), ("batch_size", LARGEST)):
            integer(name, getattr(self, name), least=1, most=most)
        for name, value in (
            ("solver", self._one_solver()),
            ("guidance", guided(self.guidance)),
            ("policies", components("policies", Policy, self.policies)),  # type: ignore[type-abstract]
            ("seeds", distinct(self.seeds)),
        ):
            object.__setattr__(self, name, value)

    def _one_solver(self) -> Solver | None:
        if self.solver is None:
            return None
        solvers = components("solver", Solver, self.solver)  # type: ignore[type-abstract]
        if len(solvers) != 1:
            raise ConfigError(f"solver={self.solver!r}, expected one Solver")
        return solvers[0]

    def on(self, path: Path) -> tuple[Self, Solver]:
        """Return the same settings with the solver that they have on `path`, and that solver."""
        solver = default_solver(path) if self.solver is None else self.solver
        return replace(self, solver=solver), solver

    def resolved(self, model: Denoiser) -> Self:
        """Return the same settings with the solver that they have on the path of `model`."""
        return self.on(model.config.convention.make_path())[0]

    @property
    def evaluations(self) -> int:
        """Evaluations of the guided model in one trajectory; both default solvers make one a step."""
        return self.steps if self.solver is None else self.solver.evaluations(self.steps)

    def changed(self, **changes: Any) -> Self:
        """Return the same settings but for `changes`.

        Raises:
            ConfigError: there is no such setting, or no such value of it.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(unknown("setting of sampling", name, known))
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        return {
            "steps": self.steps,
            "solver": None if self.solver is None else str(self.solver),
            "guidance": str(self.guidance),
            "policies": [str(policy) for policy in self.policies],
            "batch_size": self.batch_size,
            "max_bytes": self.max_bytes,
            "seeds": list(self.seeds),
        }


@dataclass(frozen=True)
class Samples:
    """Samples, and what they cost.

    Args:
        samples: [n, C, H, W] pictures, [n, C, T, H, W] clips, ...: float32, nominally in [-1, 1], in the order of the
            seeds; on the CPU, those of `sample` on the model's device.
        labels: the class of each sample by name; empty for a model without classes.
        receipts: one a policy and batch, each once where batches do not differ.
        evaluations: of the guided model in one trajectory. full: those of them in which no policy replaced anything.
        forwards: of the networks in one trajectory; a batched pair of branches is one.
        policy_bytes: the most that the policies held together in a batch.
        seconds: wall clock of drawing all of them.
        prompts: the prompt of each sample; empty where there was none.
    """

    samples: Tensor
    seeds: tuple[int, ...]
    receipts: tuple[PolicyReceipt, ...]
    evaluations: int
    full: int
    forwards: int
    policy_bytes: int
    seconds: float
    labels: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @classmethod
    def joined(
        cls,
        parts: Sequence[Samples],
        labels: tuple[str, ...],
        seconds: float,
        prompts: tuple[str, ...] = (),
    ) -> Self:
        """Return the samples of several batches as one."""
        receipts = [receipt for part in parts for receipt in part.receipts]
        known = [receipt.as_dict() for receipt in receipts]
        return cls(
            samples=torch.cat([part.samples.cpu() for part in parts]),
            seeds=tuple(seed for part in parts for seed in part.seeds),
            receipts=tuple(r for i, r in enumerate(receipts) if known[i] not in known[:i]),
            evaluations=parts[0].evaluations,
            full=min(part.full for part in parts),
            forwards=parts[0].forwards,
            policy_bytes=max(part.policy_bytes for part in parts),
            seconds=seconds,
            labels=labels,
            prompts=prompts,
        )


@torch.no_grad()
def sample(
    model: Denoiser,
    cond: Cond,
    seeds: Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    sampling: Sampling = Sampling(guidance=Unguided()),
    batched: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Samples:
    """Draw one batch in the model's own space, which of a latent model is that of latents.

    A sample is the same alone, in a batch, or in another order (to the rounding of the model).

    Args:
        model: in eval mode, on the device where the sampling shall happen.
        cond: conditioning of each sample, in the order of `seeds`; given content comes out as it went in.
        shape: of one sample, without the batch axis; by default the model's own.
        sampling, changes: the settings, and words of `Sampling` that differ; `batch_size` has no effect.
        batched: run conditional and unconditional rows as one call of 2B rows, in the lane "cond+uncond"; by
            default they are two calls, in the lanes "cond" and "uncond".
        progress: called after each evaluation with (done, total).

    Raises:
        ConfigError: steps below 1, seeds that repeat or do not match `cond`, a model in train mode, or a
            solver, guidance or policy that does not fit the model.
        NoEffectError: a policy touched nothing or saved nothing; before anything is drawn, where its setting says so.
        DitkitError: a sample is not finite.
    """
    began = time.perf_counter()
    sampling, solver = sampling.changed(**{"seeds": seeds, **changes}).on(model.config.convention.make_path())
    device, _ = placement(model)
    own = tuple(model.sample_shape if shape is None else shape)
    _check_rows(cond, len(sampling.seeds))
    cond, trajectory = cond.to(device), trajectory_of(model, sampling)
    side = check_side(model.codec, cond, own)
    noise = SampleNoise(sampling.seeds, own, side if side is None else partial(model.codec.weave, side=side))
    refuse_idle(trajectory.policies, trajectory.total)
    denoiser = GuidedDenoiser(model, cond, sampling.guidance, trajectory, batched=batched, progress=progress)
    steps = solver.times(denoiser.path, sampling.steps)[:-1]  # refuses a path before any work is done
    for policy in trajectory.policies:
        policy.check_schedule([denoiser.path.noise_time(t) for t in steps.tolist()], str(solver))
    start = noise.draw(device).to(state_dtype(device))
    samples = cond.given(solver.solve(denoiser, start, sampling.steps, noise).float())
    _check_finite(samples, sampling.seeds)
    receipts = tuple(receipt for one in denoiser.trajectories for receipt in one.finish())
    return Samples(
        samples=samples,
        seeds=sampling.seeds,
        receipts=receipts,
        evaluations=denoiser.index,
        full=min((full_evaluations(r) for r in receipts if not r.policy.inherent), default=denoiser.index),
        forwards=denoiser.forwards,
        policy_bytes=sum(one.peak_bytes for one in denoiser.trajectories),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, eq=False)
class Sampler:
    """One model and one conditioning, of which all seeds are drawn in batches.

    Args:
        cond: conditioning of each sample, in the order of the seeds.
        shape: of one sample as a signal, without the batch axis.
        prompts: one a seed, as texts; none where there are none.
    """

    model: Denoiser
    cond: Cond
    shape: tuple[int, ...]
    sampling: Sampling
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Denoiser,
        label: int | str | Sequence[int | str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        cond: Cond = Cond(),
        shape: Sequence[int] | None = None,
        sampling: Sampling = Sampling(),
        **changes: Any,
    ) -> Self:
        """Return the sampler for what `generate` and `compare` take.

        Args:
            label: a class by name or index, or one a seed; by default those of `cond`, else the seeds are spread over
                the classes.
            prompt: a text, or one a seed, for the model's text encoder; without one, that of `cond`, if any.
            cond: further conditioning of each sample, in the order of the seeds, such as given frames and their mask.
            shape: of one sample; by default that of the given content, if any, else the model's own.

        Raises:
            ConfigError: one of them is nothing of the kind, or out of range.
            ConfigError, ShapeError: given content that cannot be completed, as `check_given` has it.
        """
        if not isinstance(model, Denoiser):
            raise ConfigError(f"model={model!r} should be a denoiser, such as ditkit.load gives")
        sampling = sampling.changed(**changes).resolved(model)
        if label is None and cond.label is not None:
            label = cond.label.tolist()
        labels = resolve_labels(model, label, len(sampling.seeds))
        if labels is not None:
            cond = replace(cond, label=torch.tensor(labels))
        cond = with_prompt(model, cond, prompt, len(sampling.seeds))
        check_cond(type(model).__name__, _in_signal_space(model), cond, len(sampling.seeds))
        own = model.signal_shape if cond.context is None else cond.context.shape[1:]
        shape = tuple(own) if shape is None else _sides(shape)
        check_given(model, cond, len(sampling.seeds), shape)
        check_side(model.codec, cond, model.codec.latent_shape(shape))
        return cls(model, cond, shape, sampling, prompts_of(prompt, len(sampling.seeds)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The class of each sample by name; empty for a model without classes."""
        if self.cond.label is None:
            return ()
        names = class_names(self.model)
        return tuple(names[index] for index in self.cond.label.tolist())

    def check(self, policies: Sequence[Policy]) -> None:
        """Raise the error of the first step: a conflict, no usable site, a setting that does not fit."""
        trajectory_of(self.model, self.sampling.changed(policies=policies))

    def draw(self, progress: Progress | None = None, **changes: Any) -> Samples:
        """Draw one sample a seed, under settings that differ from the sampler's by `changes`.

        Args:
            progress: called after each evaluation with (done, total), of all batches.

        Raises:
            NoEffectError: a policy saved nothing. DitkitError: as `sample` does.
        """
        began, sampling = time.perf_counter(), self.sampling.changed(**changes).resolved(self.model)
        starts, each = range(0, len(sampling.seeds), sampling.batch_size), sampling.evaluations
        parts = [
            self._batch(start, sampling, _shifted(progress, i * each, len(starts) * each))
            for i, start in enumerate(starts)
        ]
        return Samples.joined(parts, self.labels, time.perf_counter() - began, self.prompts)

    def steps_like(self, share: float) -> int:
        """Return how many exact steps make nearest to `share` of the evaluations of this sampler's steps."""
        wanted, own = share * self.sampling.evaluations, self.sampling
        return min(range(1, own.steps + 1), key=lambda n: abs(replace(own, steps=n).evaluations - wanted))

    def first_batch(self) -> Sampler:
        """Return the sampler of the first batch's seeds."""
        first = slice(self.sampling.batch_size)
        sampling = self.sampling.changed(seeds=self.sampling.seeds[first])
        return replace(self, sampling=sampling, cond=self.cond.rows(first), prompts=self.prompts[first])

    def _batch(self, start: int, sampling: Sampling, progress: Progress | None) -> Samples:
        part = slice(start, start + sampling.batch_size)
        codec, cond = self.model.codec, self.cond.rows(part)
        drawn = sample(
            self.model,
            encode_given(codec, cond, self.model.conditions),
            sampling.seeds[part],
            shape=codec.latent_shape(self.shape),
            sampling=sampling,
            progress=progress,
        )
        signal = _decode(codec, Coded(drawn.samples, cond.streams.get(SIDE)))
        return replace(drawn, samples=cond.to(signal.device).given(signal))


def _sides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a sample as Python's integers.

    Raises:
        ConfigError: it is no sequence of positive whole numbers.
    """
    if not isinstance(shape, Iterable):
        raise ConfigError(f"shape={shape!r}, expected sides of a sample such as (3, 64, 64)")
    return tuple(integer(f"shape[{i}]", side, least=1, most=LARGEST) for i, side in enumerate(shape))


def prompts_of(prompt: str | Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return one text a sample, of one for all or one each; none where there is none.

    Raises:
        ConfigError: there are neither 1 nor `count`, or one is no text.
    """
    if prompt is None:
        return ()
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"prompt={text!r}, expected a text")
    if len(texts) not in (1, count):
        raise ConfigError(f"{len(texts)} prompts for {count} seeds; expected one, or one a seed")
    return texts if len(texts) == count else texts * count


def with_prompt(model: Denoiser, cond: Cond, prompt: str | Sequence[str] | None, count: int) -> Cond:
    """`cond` with the tokens of one prompt for all samples, or of one each; as it is where there is none.

    Raises:
        ConfigError: the model takes no prompt, `cond` has a text already, or there are neither 1 nor `count`.
        DataError: the encoder's weights are missing.
    """
    if prompt is None:
        return cond
    texts = prompts_of(prompt, count)
    encoder = getattr(model.config, "text_encoder", "")
    if not encoder:
        takes = listed(model.conditions)
        raise ConfigError(f"prompt={texts[0]!r}: a {type(model).__name__} takes no prompt, expected {takes}")
    if cond.text is not None:
        raise ConfigError(f"prompt={texts[0]!r} with Cond.text, expected one of the two")
    distinct_texts = list(dict.fromkeys(texts))
    found = text_encoder(encoder).encode(distinct_texts, model.config.text_tokens)
    if found.cut:
        LOG.warning("%d prompts are longer than %d tokens and were cut", found.cut, model.config.text_tokens)
    rows = torch.tensor([distinct_texts.index(text) for text in texts])
    return replace(cond, text=found.tokens[rows], text_mask=found.mask[rows])


def trajectory_of(model: Denoiser, sampling: Sampling) -> Trajectory:
    """Return the policies of `sampling`, and the model's inherent ones, at work on its sites.

    Raises:
        ConfigError, ConflictError, NoEffectError: as `Trajectory` does.
    """
    policies = with_inherent(model, sampling.policies)
    trajectory = Trajectory(model.sites(), policies, sampling.evaluations, sampling.max_bytes, model.learned)
    for policy in policies:
        policy.check_model(model)
    return trajectory


def state_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_evaluations(receipt: PolicyReceipt) -> int:
    """Return the evaluations, of the lane with the most of them, in which every owned site ran on all rows."""
    return max((len(receipt.full(lane)) for lane in receipt.rows), default=0)


def check_given(model: Denoiser, cond: Cond, seeds: int, shape: Sequence[int]) -> None:
    """Refuse given content that is not of a part of each sample, or is not finite there.

    Samples of which nothing is given have neither a context nor a mask.

    Args:
        seeds: samples to be drawn. shape: of one, such as (C, T, H, W).

    Raises:
        ConfigError: a model that completes nothing, a context or a mask alone, a value of the mask that is neither 0
            nor 1, a sample that is given whole or not at all, a given value that is not finite.
        ShapeError: a context or a mask of another shape.
    """
    context, mask = cond.context, cond.mask
    if context is None and mask is None:
        return
    if not model.completes:
        raise ConfigError(
            f"Cond gives content of samples {list(shape)}, which a {type(model).__name__} does not complete; "
            "expected a model that does, such as a VDT"
        )
    if context is None:
        raise ConfigError("Cond.mask says what is given, but Cond.context is None")
    if mask is None:
        raise ConfigError(
            "Cond.context is given, but Cond.mask is None; expected one that is 0 where it counts"
        )
    for name, found, channels in (("context", context, shape[0]), ("mask", mask, 1)):
        expected = [seeds, channels, *shape[1:]]
        if list(found.shape) != expected:
            raise ShapeError(f"Cond.{name} {list(found.shape)} should be {expected}, a row a seed")
    _check_mask(mask)
    odd = ~(context.isfinite() | mask.to(context.device).bool())
    if odd.any():
        raise ConfigError(
            f"Cond.context: {context[odd][0]:g} in {_first(odd)}, expected finite numbers where Cond.mask is 0"
        )


def _check_mask(mask: Tensor) -> None:
    other = (mask != 0) & (mask != 1)
    if other.any():
        raise ConfigError(
            f"Cond.mask: {mask[other][0]:g} in {_first(other)}, expected 0 (given) or 1 (to be generated)"
        )
    for sample, generated in enumerate(mask.bool().flatten(1)):
        if generated.all():
            raise ConfigError(
                f"Cond.mask: sample {sample} is all 1, which gives nothing, expected some 0; "
                "to generate all of every sample, give no mask"
            )
        if not generated.any():
            raise ConfigError(
                f"Cond.mask: sample {sample} is all 0, which leaves nothing to be generated, expected some 1"
            )


def _first(where: Tensor) -> str:
    """Name the first true entry of [B, C, T, H, W], or of a picture's [B, C, H, W]."""
    sample, _, frame = where.nonzero()[0, :3].tolist()
    return f"sample {sample}, {'frame' if where.ndim > PICTURES else 'row'} {frame}"


def _in_signal_space(model: Denoiser) -> dict[str, Condition]:
    """List what the model can be given before its codec: the shape of a signal that is coded is known to that alone."""
    found = dict(model.conditions)
    if model.codec is IDENTITY:
        return found
    for name, condition in found.items():
        if condition.coded:
            found[name] = replace(condition, shape=None)
    return found


def _check_rows(cond: Cond, seeds: int) -> None:
    for name, value in cond.tensors():
        if len(value) != seeds and not name.startswith(
            "streams."
        ):  # those are checked against what is declared
            raise ConfigError(f"Cond.{name} has {len(value)} rows for {seeds} seeds; expected one a seed")


def _check_finite(samples: Tensor, seeds: Sequence[int]) -> None:
    finite = samples.flatten(1).isfinite().all(1).tolist()
    bad = [seed for seed, ok in zip(seeds, finite, strict=True) if not ok]
    if bad:
        listed = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
        raise DitkitError(
            f"{len(bad)} of {len(finite)} samples are not finite (seeds {listed}); is the model sound?"
        )


@torch.no_grad()
def _decode(codec: Codec, coded: Coded) -> Tensor:
    side = None if coded.side is None else coded.side.to(coded.z.device)
    return codec.decode_coded(coded._replace(side=side))


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)
