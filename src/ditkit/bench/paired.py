"""Paired losses: arms of an experiment judged on the same held-out samples, noise and times.

Two networks that were trained alike differ by far less than the losses of two draws do. On the same draws that
difference is left alone, and a short run can show it, or show that it is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.model import Denoiser
from ditkit.core.path import Path, Prediction
from ditkit.systems.claims import Bounds, Verdict, judge
from ditkit.train.denoising import NoisyBatch
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import UNIFORM, Timesteps

LOWER: Bounds = (None, 0.0)
"""The claimed range of a difference of losses: below that of the rival."""
CONVERTED = (0.02, 0.98)
"""Noise-times in which predictions are converted: at the ends a conversion divides by alpha or sigma, which are 0."""

Target = Literal["own", "velocity", "noise", "data"]
TARGETS: tuple[Target, ...] = ("own", "velocity", "noise", "data")


class Samples(Protocol):
    """Held-out data: a length, and batches by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        """Return samples [B, ...] in float32 and their conditioning; `rng` is for what it draws itself."""
        ...


@dataclass(frozen=True)
class Draws:
    """A fixed set of (sample, noise, time), every draw keyed by the seed and its own number.

    Draw i is of sample i, and of sample i modulo the size of a smaller set; it is the same in every batch size.

    Args:
        count: of the draws.
        seed: of noise, times, and whatever the samples draw themselves (crops, masks).
        timesteps: density of the noise-times, the same for all arms, whatever they were trained with.
    """

    count: int = 2048
    seed: int = 0
    timesteps: Timesteps = UNIFORM

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ConfigError(f"Draws: count={self.count} should be at least 2")

    def batches(self, samples: Samples, size: int) -> Iterator[DrawBatch]:
        """Yield the draws in order, at most `size` at once."""
        for first in range(0, self.count, size):
            numbers = range(first, min(first + size, self.count))
            rng = SampleRNG(self.seed, 0, numbers)
            index = torch.tensor([number % len(samples) for number in numbers])
            data, cond = samples.batch(index, rng)
            noise, uniform, _ = rng.draws(tuple(data.shape[1:]))
            yield DrawBatch(index, data.float(), noise, self.timesteps.quantile(uniform), cond)


@dataclass(frozen=True)
class DrawBatch:
    """Some draws: the samples' indices [B], data and noise [B, ...] in float32, noise-times [B] in float64."""

    index: Tensor
    data: Tensor
    noise: Tensor
    t: Tensor
    cond: Cond


@dataclass(frozen=True)
class Difference:
    """A mean difference of losses, the arm's less the rival's, with its bootstrap interval.

    Attributes:
        mean: negative where the arm is better.
        interval: of the mean.
        relative: mean and interval as shares of the rival's mean loss.
    """

    mean: float
    interval: tuple[float, float]
    relative: tuple[float, float, float]

    def verdict(self, claimed: Bounds = LOWER) -> Verdict:
        """Return `held` where the interval lies inside the claimed range, `refuted` where it lies outside."""
        return judge(self.interval, claimed)


@dataclass(frozen=True)
class PairedLosses:
    """Losses of each arm on the same draws.

    Attributes:
        losses: [N] in float64, by the arms' names.
        index: [N], the sample of each draw.
    """

    losses: Mapping[str, Tensor]
    index: Tensor = field(repr=False)

    def mean(self, arm: str) -> float:
        """Return the mean loss of an arm."""
        return self._of(arm).mean().item()

    def difference(
        self, arm: str, rival: str, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
    ) -> Difference:
        """Return the mean of arm less rival over the draws, with its interval over samples.

        The interval is over draws and held-out samples, for these very weights. It says nothing of another run of
        the training: a claim on a method whose runs scatter takes several seeds, each pair with its own difference.

        Raises:
            ConfigError: there is no such arm.
        """
        differences = self._of(arm) - self._of(rival)
        units = _by_sample(differences, self.index)
        low, high = bootstrap(units, confidence=confidence, resamples=resamples, seed=seed)
        mean, base = units.mean().item(), self.mean(rival)
        shares = (mean / base, low / base, high / base) if base else (0.0, 0.0, 0.0)
        return Difference(mean, (low, high), shares)

    def _of(self, arm: str) -> Tensor:
        if arm not in self.losses:
            raise ConfigError(unknown("arm", arm, self.losses))
        return self.losses[arm]


def paired_loss(
    models: Mapping[str, Denoiser],
    samples: Samples,
    draws: Draws | None = None,
    *,
    target: Target = "own",
    batch_size: int = 64,
) -> PairedLosses:
    """Evaluate every model on the same draws: the loss that it was trained to lower, for each draw.

    The loss is `Regression`'s: the mean over all elements of the squared residual, given content counted as 0. Models
    are in eval mode meanwhile, under the policies that they were trained with, and are left as they were, random
    states and gradients included.

    With `target="own"` a residual is that of the model's own prediction, at the times in which it is trained; this
    takes arms of one path and one prediction. Arms of different predictions are compared in one of them, named by
    `target`: their outputs are converted, and noise-times lie in [0.02, 0.98], since a conversion divides by alpha or
    sigma. Velocity is the usual common scale; it weighs an error of the data by 1 / t^2 on the linear path, so that
    the mean of arms that predict data rests on few draws, and its interval is as wide as that makes it. Discrete
    paths have no velocity. Arms of different paths see different x at one t, and are refused.

    Args:
        models: the arms by name; their samples have one shape.
        draws: by default 2,048 of seed 0.
        batch_size: draws in one evaluation.

    Raises:
        ConfigError: no arm, arms that have no common target, an unknown target, or no samples.
        ShapeError: samples that are not of the models' shape.
    """
    draws = draws or Draws()
    common = _common_prediction(models, target)
    if not len(samples):
        raise ConfigError("paired_loss: got no held-out samples, expected at least one")
    losses: dict[str, list[Tensor]] = {name: [] for name in models}
    index: list[Tensor] = []
    with torch.random.fork_rng(), _evaluating(models):
        for batch in draws.batches(samples, batch_size):
            index.append(batch.index)
            for name, model in models.items():
                losses[name].append(_loss(model, name, batch, common))
    return PairedLosses({name: torch.cat(parts) for name, parts in losses.items()}, torch.cat(index))


def bootstrap(
    values: Tensor, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval of a mean (Efron 1987); `values` [n].

    The same values and seed give the same interval to the bit. Values that are all equal give that value twice.

    Raises:
        ConfigError: fewer than two values, or one that is not finite.
    """
    from scipy import stats

    array = values.double().cpu().numpy()
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ConfigError(f"bootstrap: got {tuple(values.shape)} values, expected two finite ones or more")
    if np.ptp(array) == 0:
        return float(array[0]), float(array[0])
    found = stats.bootstrap(
        (array,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 2**21 // len(array)),
        method="BCa",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _by_sample(values: Tensor, index: Tensor) -> Tensor:
    """Return means over the draws of each sample: draws of one sample are not independent, samples are."""
    samples, row = index.unique(return_inverse=True)
    zeros = torch.zeros(len(samples), dtype=values.dtype)
    return zeros.index_add(0, row, values) / zeros.index_add(0, row, torch.ones_like(values))


def _common_prediction(models: Mapping[str, Denoiser], target: Target) -> Prediction | None:
    """Return the prediction in which the arms are compared, None for their own."""
    if target not in TARGETS:
        raise ConfigError(unknown("target", target, TARGETS))
    if not models:
        raise ConfigError("paired_loss: got no models, expected at least one")
    conventions: dict[str, Convention] = {name: model.config.convention for name, model in models.items()}
    for what, reason in (
        ("path", "see different x at one time"),
        ("prediction", "have losses of different scale"),
    ):
        held = {name: getattr(convention, what) for name, convention in conventions.items()}
        if len(set(held.values())) > 1 and (what == "path" or target == "own"):
            arms = ", ".join(f"{name} {value}" for name, value in held.items())
            mend = "" if what == "path" else "; name a common target, such as target='velocity'"
            raise ConfigError(f"paired_loss: arms of different {what} ({arms}) {reason}{mend}")
    first = next(iter(conventions.values()))
    if target == "velocity" and first.discrete:
        raise ConfigError(
            f"paired_loss: path={first.path!r} is discrete and has no velocity; target 'noise' or 'data'"
        )
    if target == "own" or all(convention.prediction == target for convention in conventions.values()):
        return None
    return target


@torch.no_grad()  # not inference_mode: a table that a network keeps from here must serve its training, too
def _loss(model: Denoiser, name: str, batch: DrawBatch, common: Prediction | None) -> Tensor:
    """Return the loss of each draw, [B] in float64 on the CPU."""
    if tuple(batch.data.shape[1:]) != tuple(model.sample_shape):
        raise ShapeError(
            f"paired_loss: samples of {tuple(batch.data.shape[1:])} for {name!r}, whose samples are "
            f"{tuple(model.sample_shape)}"
        )
    convention: Convention = model.config.convention
    path, device = convention.make_path(), next(model.parameters()).device
    t = _times(path, batch.t, convention, common).to(device)
    data, noise, cond = batch.data.to(device), batch.noise.to(device), batch.cond.to(device)
    x = path.mix(data, noise, t.to(data.dtype))
    inputs = x, convention.model_time(t).to(data.dtype), cond
    times = path.noise_time(t).to(data.dtype)
    out, _ = run_with_taps(model, model, (), tuple(x.shape[1:]), *inputs, times=times)
    prediction, _ = convention.split(out.float())
    if common is not None:
        prediction = path.convert(prediction, x, t.to(x.dtype), convention.prediction, common)
        convention = replace(convention, prediction=common)
    judged = NoisyBatch(
        data=data,
        prediction=prediction,
        mask=cond.mask,
        taps={},
        path=path,
        convention=convention,
        noise=noise,
        x=x,
        t=t,
        fraction=None,
    )
    return Regression().loss(judged).double().cpu()


def _times(path: Path, t: Tensor, convention: Convention, common: Prediction | None) -> Tensor:
    """Return times of the path at noise-times t: those at which the prediction is trained, or can be converted."""
    if common is None:
        return path.trainable(path.place(t), convention.prediction)
    first, last = CONVERTED
    return path.place(first + (last - first) * t)


@contextmanager
def _evaluating(models: Mapping[str, Denoiser]) -> Iterator[None]:
    """Hold the models in eval mode; afterwards each of their modules is in the mode in which it was."""
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
