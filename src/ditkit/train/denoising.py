"""Learning to undo noise: flow matching, DDPM, and whatever else a convention says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser, Model
from ditkit.core.path import Path, spread
from ditkit.train.objective import Batch, Objective, Term
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import Output, run_with_taps
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import UNIFORM, LogitNormal, Shifted, Uniform


@dataclass(frozen=True, kw_only=True)
class NoisyBatch(Batch):
    """A noisy batch and what the network said of it.

    Args:
        noise, x: [B, ...] in float32; x = alpha data + sigma noise.
        t: [B] noise-time, or the index of a discrete path.
        prediction: the network's, in noise-time. fraction: of the learned variance, or None.
    """

    path: Path
    convention: Convention
    noise: Tensor
    x: Tensor
    t: Tensor
    fraction: Tensor | None

    def residual(self) -> Tensor:
        """The target that the convention names, less the prediction.

        A score's target, -noise / sigma, grows without bound towards the data; its error is weighted by
        sigma^2 (SiT), which makes it DDPM's loss too.
        """
        if self.convention.prediction == "score":
            t = self.t.to(self.data.dtype)
            return self.noise + self.path.at(spread(t, self.x)).sigma * self.prediction
        return self.target() - self.prediction

    def target(self) -> Tensor:
        """What the network should predict, [B, ...], in noise-time: velocity, data or noise, whose scale is bounded."""
        if self.convention.prediction == "velocity":
            return self.path.velocity(self.data, self.noise, self.t.to(self.data.dtype))
        return self.data if self.convention.prediction == "data" else self.noise


@dataclass(frozen=True)
class Denoising(Objective):
    """The network is shown data mixed with noise. Given content (`Cond.mask`) is not learned from.

    Args:
        timesteps: which noise-times are visited.
    """

    supports_teacher: ClassVar[bool] = True
    terms: tuple[Term, ...] = (Regression(),)
    timesteps: Uniform | LogitNormal | Shifted = UNIFORM

    def check(self, model: Model) -> None:
        if not isinstance(model, Denoiser):
            raise ConfigError(
                f"Denoising: a {type(model).__name__} has no noise-time; train it by Forecasting"
            )
        super().check(model)

    def __call__(
        self,
        forward: Callable[..., Any],
        model: Model,
        data: Tensor,
        cond: Cond,
        rng: SampleRNG,
        teacher: Model | None = None,
    ) -> dict[str, Tensor]:
        noise, time, drop = rng.draws(tuple(data.shape[1:]))
        dropped = drop < getattr(model.config, "label_dropout", 0.0)
        path = model.config.convention.make_path()
        return self.at(
            forward,
            model,
            path=path,
            data=data,
            noise=noise.to(data.device),
            t=path.place(self.timesteps.quantile(time)).to(data.device),
            cond=replace(cond, drop=dropped.to(data.device)),
            teacher=teacher,
        )

    def at(
        self,
        forward: Callable[..., Tensor],
        model: Model,
        *,
        path: Path,
        data: Tensor,
        noise: Tensor,
        t: Tensor,
        cond: Cond,
        teacher: Model | None = None,
    ) -> dict[str, Tensor]:
        """The losses at noise [B, ...] and times [B], which are moved to where the prediction can be trained.

        A loss is the mean over all elements, given ones counted as 0 (VDT); beside it stands the mean over
        those that were made, as NAME_made, unless the term counts others as well.
        """
        convention: Convention = model.config.convention
        t = path.trainable(t, convention.prediction)
        x = path.mix(data, noise, t.to(data.dtype))
        taps, shape = self.taps(model), tuple(x.shape[1:])
        told = x, convention.model_time(t).to(data.dtype), cond
        times = path.noise_time(t).to(data.dtype)
        out, seen = run_with_taps(forward, model, taps, shape, *told, times=times)
        prediction, fraction = convention.split(out.to(torch.promote_types(out.dtype, torch.float32)))
        batch = NoisyBatch(
            data=data,
            prediction=prediction,
            mask=cond.mask,
            taps=seen,
            sites=model.sites(),
            teacher=None if teacher is None else _taught(teacher, taps, shape, *told, times=times),
            path=path,
            convention=convention,
            noise=noise,
            x=x,
            t=t,
            fraction=fraction,
        )
        losses = self.weigh(batch)
        if cond.mask is None:
            return losses
        share = cond.mask.float().mean().clamp_min(1 / data[0].numel())
        return losses | {
            f"{type(term).__name__}_made": losses[type(term).__name__].detach() / share
            for term in self.active
            if not (term.on_given or term.taps(model.sites()))  # a loss at sites is a mean over all rows
        }


@torch.no_grad()
def _taught(teacher: Model, taps: Sequence[str], shape: tuple[int, ...], *told: Any, times: Tensor) -> Output:
    """What a teacher says, its prediction in noise-time."""
    out, seen = run_with_taps(teacher, teacher, taps, shape, *told, times=times)
    return Output(teacher.config.convention.split(out.float())[0], seen)
