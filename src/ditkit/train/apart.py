"""Denoising by one term for which the network is run in pieces, each given states of its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.model import Model
from ditkit.core.path import Path
from ditkit.train.denoising import Denoising, NoisyBatch, _answer, time_axis
from ditkit.train.objective import NOTHING
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import weight_at
from ditkit.train.taps import run_with_taps
from ditkit.train.teacher import Held


@dataclass(frozen=True)
class Apart(Denoising):
    """The teacher is asked first, at the same noise and times; then the pieces are run that its states are given to.

    No piece hears of another, and what the term does not train is not computed.
    """

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
        """Compute the loss at noise [B, ...] and times [B] or [B, T], moved to where the prediction can be trained."""
        (term,), convention = self.active, model.config.convention
        name, t = type(term).__name__, path.trainable(t, convention.prediction)
        x = path.mix(data, noise, t.to(data.dtype), time_axis(t))
        shape = tuple(x.shape[1:])
        batch = NoisyBatch(
            data=data,
            prediction=data,  # of which there is none
            taps={},
            sites=model.sites(),
            own=held.modules.get(name),
            cond=cond,
            rng=rng,
            step=held.step,
            layout=model.layout(shape),
            path=path,
            convention=convention,
            noise=noise,
            x=x,
            t=t,
            fraction=None,
        )
        ask, teacher = term.asks(batch), held.teachers[name]
        assert ask is not None
        batch = replace(batch, taught=_answer(teacher, teacher, batch, ask))
        feed = term.feed(batch)
        times = path.noise_time(t).to(x.dtype)
        inputs = x, convention.model_time(t).to(x.dtype), cond
        _, tapped = run_with_taps(
            forward, model, feed.taps, shape, *inputs, times=times, step=held.step, fed=feed.handlers
        )
        loss = term.loss(replace(batch, taps={**tapped, **feed.kept})).mean()
        return {name: loss, **term.followed(batch), "loss": weight_at(term.weight, held.step) * loss}
