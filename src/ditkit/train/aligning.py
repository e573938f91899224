"""Attentions learn alone, each from the queries, keys and values that it met while attention was dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.path import Path
from ditkit.core.run import Call, Handler, Run, attended
from ditkit.core.trajectory import Trajectory
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.objective import NOTHING, Term
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import Stopped
from ditkit.train.teacher import Answer, Held
from ditkit.train.terms.distillation import AttentionDistillation


@dataclass(frozen=True)
class Aligning(Denoising):
    """The first of two stages of fine-tuning: the teacher runs densely, and the model's policies only at attentions.

    Each attention of the model is given the queries, keys and values that the teacher's had, and is compared with its
    output; so no error of one layer reaches the next, and blocks are run once, without gradients. Train what the
    policies learn (`Settings.trained`) by it: the model's own layers are not run.
    """

    terms: tuple[Term, ...] = (AttentionDistillation(weight=1.0, every=1),)

    def check(self, model: Model) -> None:
        super().check(model)
        for term in self.active:
            if not isinstance(term, AttentionDistillation):
                raise ConfigError(
                    f"Aligning: {type(term).__name__} needs the model's prediction, expected AttentionDistillation"
                )
        trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
        owned = {name for claims in trajectory.claims for name, how in claims.items() if how == "own"}
        if not owned & set(attended(model.sites())):
            raise ConfigError("Aligning: no policy has attention of its own, so there is nothing to align")

    def at(
        self,
        forward: Callable[..., Any],
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
        """Compute the losses at noise [B, ...] and times [B]."""
        convention = model.config.convention
        t = path.trainable(t, convention.prediction)
        x = path.mix(data, noise, t.to(data.dtype), None)
        names = self.taps(model, held.step)
        teacher: Any = held.teachers[type(self.active_at(held.step)[0]).__name__]
        pairs = _attentions(model, teacher, names, x, path.noise_time(t).to(x.dtype), t, cond, held.step)
        batch = NoisyBatch(
            data=data,
            prediction=data,
            taps={name: own for name, (own, _) in pairs.items()},
            sites=model.sites(),
            cond=cond,
            rng=rng,
            step=held.step,
            path=path,
            convention=convention,
            noise=noise,
            x=x,
            t=t,
            fraction=None,
        )
        taught = Answer(None, {name: dense for name, (_, dense) in pairs.items()})
        return self.weigh(batch, held, {type(term).__name__: taught for term in self.active_at(held.step)})


def _attentions(
    model: Model,
    teacher: Any,
    names: Sequence[str],
    x: Tensor,
    times: Tensor,
    t: Tensor,
    cond: Cond,
    step: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return of each attention, on the teacher's dense activations, the model's output and the dense one.

    The teacher's rows are in the order that the model's policies give them; both outputs are in the model's.
    """
    trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
    call = Call(0, 1, nan, layout=model.layout(tuple(x.shape[1:])), times=times, step=step)
    beside = Beside(trajectory.run(call), names, trajectory.rows(call))
    cards = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cards), suppress(Stopped):
        teacher(x, teacher.config.convention.model_time(t).to(x.dtype), cond, beside)
    return beside.found


class Beside(Run):
    """A run whose attentions are dense, and which keeps beside each what another run makes of the same inputs.

    Args:
        inside: the other run. names: the attentions, in the order of the network; after the last it stops.
        rows: by attention, where the model's rows stand among those that it is given.
    """

    __slots__ = ("found",)

    def __init__(self, inside: Run, names: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        own = {
            name: partial(self._both, name, len(names), inside, rows.get(name))
            for name in inside.handlers
            if name in names
        }
        super().__init__({**inside.handlers, **own})

    def _both(
        self,
        name: str,
        last: int,
        inside: Run,
        rows: Tensor | None,
        fn: Handler,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *masks: Tensor,
    ) -> Tensor:
        rows = None if rows is None else rows.to(q.device)
        with torch.enable_grad():
            own: Tensor = inside.site(name, fn, q, k, v, *masks)
            own = own if rows is None else own[:, :, rows]
        if rows is None:
            dense: Tensor = fn(q, k, v, *masks)
            self.found[name] = own, dense
        else:
            real: Tensor = fn(*(x[:, :, rows] for x in (q, k, v)), *masks)
            dense = real.new_zeros(*real.shape[:2], q.shape[2], real.shape[3]).index_copy(2, rows, real)
            self.found[name] = own, real
        if len(self.found) == last:
            raise Stopped
        return dense
