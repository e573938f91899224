"""One evaluation of a network in training: under the policies it is trained with, with taps outside of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, NoEffectError
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Call, Handler, Run, named
from ditkit.core.trajectory import Trajectory


class Output(NamedTuple):
    """What a network said, and what sites returned meanwhile, by name: rows of attentions in the model's order."""

    out: Any
    taps: Mapping[str, Any]


class Tap(Run):
    """A run within a run that keeps the outputs of some sites.

    Where a block is computed again in the backward pass, the same is done again and nothing more is kept.

    Args:
        rows: by site, the rows of an output [..., rows, K] that are kept, in their order; without, all are.
    """

    __slots__ = ("inside", "rows", "seen")

    def __init__(
        self, names: Sequence[str], inside: Run = DIRECT, rows: Mapping[str, Tensor] | None = None
    ) -> None:
        self.seen: dict[str, Any] = {}
        self.inside, self.rows = inside, rows or {}
        super().__init__({**inside.handlers, **{name: self._keep(name) for name in names}})

    def _keep(self, name: str) -> Handler:
        def handler(fn: Handler, *args: Any) -> Any:
            out = self.inside.site(name, fn, *args)
            rows = self.rows.get(name)
            self.seen.setdefault(name, out if rows is None else out.index_select(-2, rows.to(out.device)))
            return out

        return handler


def run_with_taps(
    network: Callable[..., Any],
    model: Model,
    taps: Sequence[str],
    shape: tuple[int, ...],
    *inputs: Any,
    times: Tensor | None = None,
) -> Output:
    """What `network`, which is `model` or a wrapper around it, says of `inputs` under the model's policies.

    Args:
        taps: sites whose outputs are kept.
        shape: of one sample, without the batch axis.
        times: noise-time of each sample, [B] or [B, T]; of a network that has none, 0.

    Raises:
        NoEffectError: a policy touched nothing or saved nothing.
    """
    trajectory, call, run = _under(model, shape, torch.zeros(1) if times is None else times)
    tap = Tap(taps, run, trajectory.rows(call))
    out = trajectory.leave(call, network(*inputs, tap if taps else run))
    trajectory.finish()
    return Output(out, tap.seen)


def check_policies(model: Model, taps: Sequence[str]) -> None:
    """Refuse policies that the model cannot be trained under, before the first step.

    Raises:
        ConfigError, ShapeError: one does not fit the model's samples, or a trajectory of one evaluation; or puts rows
            of `taps` in an order that is known of attentions only.
        NoEffectError: one would do nothing; the message says why.
    """
    trajectory, call, run = _under(model, model.sample_shape, torch.tensor([0.5]))
    policies = ", ".join(str(policy) for policy in model.policies)
    ordered = trajectory.rows(call)
    inside = named(model.sites(), "stack", "block", "branch", "kv", "core") if ordered else ()
    if lost := [name for name in taps if name in inside and name not in ordered]:
        raise ConfigError(
            f"a term reads {lost[0]!r}, whose rows {policies} reorders; expected attentions only"
        )
    if not run.handlers and any(policy != policy.exact() for policy in model.policies):
        why = [
            f"{name} {value}" for session in trajectory.sessions for name, value in session.remarks.items()
        ]
        raise NoEffectError("; ".join([f"{policies} would do nothing in training", *why]))


def _under(model: Model, shape: tuple[int, ...], times: Tensor) -> tuple[Trajectory, Call, Run]:
    """A trajectory of one evaluation, whose samples have each a time of their own."""
    trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
    call = Call(0, 1, nan, layout=model.layout(shape) if model.policies else (), times=times)
    return trajectory, call, trajectory.run(call)
