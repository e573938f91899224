"""Learning to undo noise: flow matching, DDPM, and whatever else a convention says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditkit.core.codec import check_side
from ditkit.core.cond import Cond, check_cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser, Model
from ditkit.core.path import Path, spread
from ditkit.core.policy import Policy
from ditkit.core.transform import origin_of
from ditkit.nn.encoders import PictureEncoder
from ditkit.train.objective import NOTHING, Batch, Objective, Term
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import Output, run_with_taps
from ditkit.train.teacher import Answer, Ask, Held
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import (
    INDEPENDENT,
    UNIFORM,
    Independent,
    LogitNormal,
    Paired,
    PerFrame,
    Shifted,
    Stratified,
    Uniform,
)

FRAMES = 2
"""Axis of the frames of clips [B, C, T, H, W]."""


@dataclass(frozen=True, kw_only=True)
class NoisyBatch(Batch):
    """A noisy batch and what the network said of it.

    Args:
        noise, x: [B, ...] in float32; x = alpha data + sigma noise.
        t: [B] or [B, T] noise-time, or the index of a discrete path. other: [B], a second one, of paired times.
        prediction: the network's, in noise-time. fraction: of the learned variance, or None.
    """

    path: Path
    convention: Convention
    noise: Tensor
    x: Tensor
    t: Tensor
    fraction: Tensor | None
    other: Tensor | None = None

    def residual(self) -> Tensor:
        """Return the target that the convention names, less the prediction.

        A score's target, -noise / sigma, grows without bound towards the data; its error is weighted by
        sigma^2 (SiT), which makes it DDPM's loss too.
        """
        if self.convention.prediction == "score":
            t = self.t.to(self.data.dtype)
            return self.noise + self.path.at(spread(t, self.x, time_axis(t))).sigma * self.prediction
        return self.target() - self.prediction

    def target(self) -> Tensor:
        """Return the prediction that is right, [B, ...], in noise-time: velocity, data or noise, of bounded scale."""
        if self.convention.prediction == "velocity":
            t = self.t.to(self.data.dtype)
            return self.path.velocity(self.data, self.noise, t, time_axis(t))
        return self.data if self.convention.prediction == "data" else self.noise


def without_dropped(cond: Cond, model: Denoiser, draw: Tensor, rng: SampleRNG) -> Cond:
    """`cond` that names the samples in which a condition counts as absent, each with the share of its own.

    The label and the text of a sample share a draw [B], so that of equal shares they go together; each stream has a
    draw of its own. What counts as absent already stays so.
    """
    device = next((value.device for _, value in cond.tensors()), draw.device)
    shares = {name: condition.dropout for name, condition in model.conditions.items()}
    absent = dict(cond.absent)
    for name, share in shares.items():
        if name != "label" and share:
            own = draw if name == "text" else rng.of_term(f"absent {name}")[:, 0]
            dropped = (own < share).to(device)
            absent[name] = dropped | absent[name] if name in absent else dropped
    label = shares.get("label", getattr(model.config, "label_dropout", 0.0))
    return replace(cond, drop=(draw < label).to(device), absent=absent)


def time_axis(t: Tensor) -> int | None:
    """Return the axis of samples [B, C, T, ...] along which times [B, T] run; None for times [B]."""
    return FRAMES if t.ndim > 1 else None


@dataclass(frozen=True)
class Denoising(Objective):
    """The network is shown data mixed with noise. Given content (`Cond.mask`) is not learned from.

    Args:
        timesteps: which noise-times are visited.
        clock: what has a time of its own: a sample, drawn alone or stratified over the batch; each frame; or a pair.
    """

    supports_teacher: ClassVar[bool] = True
    terms: tuple[Term, ...] = (Regression(),)
    timesteps: Uniform | LogitNormal | Shifted = UNIFORM
    clock: Independent | Stratified | PerFrame | Paired = INDEPENDENT

    def check(self, model: Model) -> None:
        if not isinstance(model, Denoiser):
            raise ConfigError(
                f"Denoising: a {type(model).__name__} has no noise-time; train it by Forecasting"
            )
        self.clock.check(model)
        even = isinstance(self.clock, Stratified) and self.timesteps == UNIFORM
        for term in self.active:
            if term.strata and not (even and self.clock == Stratified(term.strata)):
                raise ConfigError(
                    f"{type(term).__name__} needs as many samples of each of {term.strata} parts of noise-time; got "
                    f"{self.clock} of {self.timesteps}, expected {Stratified(term.strata)} of {UNIFORM}"
                )
        super().check(model)

    def check_batch(self, batch: int) -> None:
        self.clock.check_batch(batch)

    def __call__(
        self,
        forward: Callable[..., Any],
        model: Model,
        data: Tensor,
        cond: Cond,
        rng: SampleRNG,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        noise, time, drop = rng.draws(tuple(data.shape[1:]))
        time, other = self.clock.uniforms(time, rng, data.shape)
        assert isinstance(model, Denoiser)
        check_cond(type(model).__name__, model.conditions, cond, len(data))
        cond = without_dropped(cond, model, drop, rng)
        path, noise = model.config.convention.make_path(), noise.to(data.device)
        side = check_side(model.codec, cond, tuple(data.shape[1:]))
        density = self.timesteps.of(data.shape[1:])
        return self.at(
            forward,
            model,
            path=path,
            data=data,
            noise=noise if side is None else model.codec.weave(noise, side),
            t=path.place(density.quantile(time)).to(data.device),
            other=None if other is None else path.place(density.quantile(other)).to(data.device),
            cond=cond,
            rng=rng,
            held=held,
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
        other: Tensor | None = None,
        rng: SampleRNG | None = None,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        """Compute the losses at noise [B, ...] and times [B] or [B, T].

        Times are moved to where the prediction can be trained.

        A loss is the mean over all elements, given ones counted as 0 (VDT); beside it stands the mean over
        those that were made, as NAME_made, unless the term counts others as well.
        """
        convention: Convention = model.config.convention
        t = path.trainable(t, convention.prediction)
        x = path.mix(data, noise, t.to(data.dtype), time_axis(t))
        out, tapped = _predicted(forward, model, self.taps(model, held.step), x, t, cond, step=held.step)
        prediction, fraction = convention.split(out.to(torch.promote_types(out.dtype, torch.float32)))
        batch = NoisyBatch(
            data=data,
            prediction=prediction,
            mask=cond.mask,
            taps=tapped,
            sites=model.sites(),
            cond=cond,
            rng=rng,
            step=held.step,
            layout=model.layout(tuple(x.shape[1:])),
            path=path,
            convention=convention,
            noise=noise,
            x=x,
            t=t,
            other=None if other is None else path.trainable(other, convention.prediction),
            fraction=fraction,
        )
        losses = self.weigh(batch, held, self._answers(forward, model, batch, held))
        if cond.mask is None:
            return losses
        share = cond.mask.float().mean().clamp_min(1 / data[0].numel())
        return losses | {
            f"{type(term).__name__}_made": losses[type(term).__name__].detach() / share
            for term in self.active_at(held.step)
            if not (term.on_given or term.taps(model.sites()))  # a loss at sites is a mean over all rows
        }

    def _answers(
        self, forward: Callable[..., Tensor], model: Model, batch: NoisyBatch, held: Held
    ) -> dict[str, Answer | None]:
        """Return each term's answer from its teacher.

        Teachers that are asked the same are asked once; an encoder once for all that look at the same pictures.
        """
        answers: dict[str, Answer | None] = {}
        alike: dict[Any, list[Term]] = {}
        looks: dict[Any, dict[str, Ask]] = {}
        for term in self.active_at(held.step):
            name = type(term).__name__
            taps = {tap: batch.taps[tap] for tap in term.taps(batch.sites)}
            ask = term.asks(replace(batch, own=held.modules.get(name), taps=taps))
            if ask is not None:
                network = model if ask.student else held.teachers[name]
                if isinstance(network, PictureEncoder):
                    looks.setdefault((network, ask.x, ask.grid), {})[name] = ask
                    continue
                answers[name] = _answer(forward if ask.student else network, network, batch, ask)
            elif term.teacher is not None:
                alike.setdefault(term.teacher, []).append(term)
        for (network, x, grid), asks in looks.items():
            found = Answer(network(x, grid, max(ask.maps for ask in asks.values())), {})
            answers |= dict.fromkeys(asks, found)
        for terms in alike.values():
            network = held.teachers[type(terms[0]).__name__]
            read = {
                type(term).__name__: {tap: _origin(model, network, tap) for tap in term.taps(batch.sites)}
                for term in terms
            }
            names = tuple(sorted({was for taps in read.values() for was in taps.values()}))
            answer = _answer(network, network, batch, Ask(taps=names))
            for name, taps in read.items():
                answers[name] = answer._replace(taps={tap: answer.taps[was] for tap, was in taps.items()})
        return answers


def _predicted(
    network: Callable[..., Any],
    model: Model,
    taps: Sequence[str],
    x: Tensor,
    t: Tensor,
    cond: Cond,
    stop: str = "",
    policies: Sequence[Policy] | None = None,
    step: int | None = None,
) -> Output:
    """Predict for x [B, ...] at times of the network's own path, and return the noise-times of this very call."""
    convention = model.config.convention
    times = convention.make_path().noise_time(t).to(x.dtype)
    inputs = x, convention.model_time(t).to(x.dtype), cond
    return run_with_taps(
        network,
        model,
        taps,
        tuple(x.shape[1:]),
        *inputs,
        times=times,
        stop=stop,
        policies=policies,
        step=step,
    )


def _answer(network: Callable[..., Any], model: nn.Module, batch: NoisyBatch, ask: Ask) -> Answer:
    """Answer a term's question.

    That of a denoiser is a prediction in noise-time. A teacher draws nothing of the student's.
    """
    x = batch.x if ask.x is None else ask.x
    if not isinstance(model, Denoiser):
        with torch.no_grad():
            return Answer(network(x), {})
    t, cond = batch.t if ask.t is None else ask.t, batch.cond if ask.cond is None else ask.cond
    assert cond is not None
    if ask.student:
        out, tapped = _predicted(network, model, ask.taps, x, t, cond, policies=ask.policies, step=batch.step)
    else:
        cards = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(cards):
            out, tapped = _predicted(network, model, ask.taps, x, t, cond, ask.stop, ask.policies)
    if out is None:
        return Answer(None, tapped)
    prediction, fraction = model.config.convention.split(out.float())
    return Answer(prediction, tapped, fraction)


def _origin(model: Model, teacher: Model, tap: str) -> str:
    """Return the name of the student's tap in the teacher, which has not all of its transforms."""
    site, colon, part = tap.partition(":")
    if model.transforms[: len(teacher.transforms)] != teacher.transforms:
        return tap
    return origin_of(model.transforms[len(teacher.transforms) :], site) + colon + part
