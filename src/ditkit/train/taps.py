"""One evaluation of a network in training: under the policies it is trained with, with taps outside of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, NoEffectError, unknown
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Call, Handler, Run, named
from ditkit.core.trajectory import Trajectory


class Output(NamedTuple):
    """The prediction of a network, and what sites returned meanwhile, by name.

    Rows of attentions are in the model's order.
    """

    out: Any
    taps: Mapping[str, Any]


PARTS = {"in": 0, "q": 0, "k": 1, "v": 2}
"""Ends of a tap's name, after a colon, that ask for an argument of the site instead of its output: "blocks.3:in" is
what block 3 was given, "blocks.3.attn.core:k" the keys that its attention saw."""


class Whole(tuple[Policy, ...]):
    """A network's own policies at their `whole` settings, whichever they are; a tuple of none until it is asked."""


WHOLE = Whole()


class Stopped(Exception):
    """Nothing after this site was asked for."""


def site_of(tap: str) -> str:
    """Return the site of a tap.

    Raises:
        ConfigError: it asks for a part that there is not.
    """
    name, colon, part = tap.partition(":")
    if colon and part not in PARTS:
        raise ConfigError(f"tap {tap!r}: " + unknown("part", part, PARTS))
    return name


class Tap(Run):
    """A run within a run that keeps the outputs, or arguments, of some sites.

    Where a block is computed again in the backward pass, the same is done again and nothing more is kept.

    Args:
        names: of sites, or of their arguments (`PARTS`).
        rows: by site, the rows of an output [..., rows, K] that are kept, in their order; without, all are.
        stop: the site after which `Stopped` is raised.
    """

    __slots__ = ("inside", "recorded", "rows", "stop")

    def __init__(
        self,
        names: Sequence[str],
        inside: Run = DIRECT,
        rows: Mapping[str, Tensor] | None = None,
        stop: str = "",
    ) -> None:
        self.recorded: dict[str, Any] = {}
        self.inside, self.rows, self.stop = inside, rows or {}, stop
        taps: dict[str, list[str]] = {stop: []} if stop else {}
        for name in names:
            taps.setdefault(site_of(name), []).append(name)
        super().__init__({**inside.handlers, **{site: self._keep(site, own) for site, own in taps.items()}})

    def _keep(self, site: str, taps: Sequence[str]) -> Handler:
        def handler(fn: Handler, *args: Any) -> Any:
            out = self.inside.site(site, fn, *args)
            rows = self.rows.get(site)
            for tap in taps:
                part = tap.partition(":")[2]
                value = args[PARTS[part]] if part else out
                self.recorded.setdefault(
                    tap, value if rows is None else value.index_select(-2, rows.to(value.device))
                )
            if site == self.stop:
                raise Stopped
            return out

        return handler


class Around(Run):
    """A run within a run whose handlers get, as what a site does, what the inner run makes of it."""

    __slots__ = ()

    def __init__(self, inside: Run, handlers: Mapping[str, Handler]) -> None:
        def around(site: str, handler: Handler) -> Handler:
            return lambda fn, *args: handler(partial(inside.site, site, fn), *args)

        super().__init__({**inside.handlers, **{site: around(site, h) for site, h in handlers.items()}})


def run_with_taps(
    network: Callable[..., Any],
    model: Model,
    taps: Sequence[str],
    shape: tuple[int, ...],
    *inputs: Any,
    times: Tensor | None = None,
    stop: str = "",
    policies: Sequence[Policy] | None = None,
    step: int | None = None,
    fed: Mapping[str, Handler] | None = None,
) -> Output:
    """Run `network`, which is `model` or a wrapper around it, on `inputs` under the model's policies.

    Args:
        taps: sites whose outputs are kept.
        shape: of one sample, without the batch axis.
        times: noise-time of each sample, [B] or [B, T]; of a network that has none, 0.
        stop: the site after which nothing is computed; the output is then None.
        policies: in the place of the model's; `WHOLE` is those, leaving nothing out.
        step: of the optimiser, for policies that change in training.
        fed: by site, what is done around what policies do there.

    Raises:
        NoEffectError: a policy touched nothing or saved nothing.
    """
    times = torch.zeros(1) if times is None else times
    if isinstance(policies, Whole):
        policies = tuple(policy.whole() for policy in model.policies)
    chosen = model.policies if policies is None else policies
    trajectory, call, run = _under(model, shape, times, chosen, step)
    if fed:
        run = Around(run, fed)
    tap = Tap(taps, run, trajectory.rows(call), stop)
    try:
        out = trajectory.leave(call, network(*inputs, tap if taps or stop or fed else run))
    except Stopped:
        return Output(None, tap.recorded)
    trajectory.finish()
    return Output(out, tap.recorded)


def check_policies(model: Model, taps: Sequence[str]) -> None:
    """Refuse policies that the model cannot be trained under, before the first step.

    Raises:
        ConfigError, ShapeError: one does not fit the model's samples, or a trajectory of one evaluation; or puts rows
            of `taps` in an order that is known of attentions only.
        NoEffectError: one would do nothing; the message says why.
    """
    trajectory, call, run = _under(model, model.sample_shape, torch.tensor([0.5]), model.policies)
    policies = ", ".join(str(policy) for policy in model.policies)
    ordered = trajectory.rows(call)
    inside = named(model.sites(), "stack", "block", "branch", "kv", "core") if ordered else ()
    if lost := [tap for tap in taps if site_of(tap) in inside and site_of(tap) not in ordered]:
        raise ConfigError(
            f"a term reads {lost[0]!r}, whose rows {policies} reorders; expected attentions only"
        )
    if not run.handlers and any(policy != policy.exact() for policy in model.policies):
        why = [
            f"{name} {value}" for session in trajectory.sessions for name, value in session.remarks.items()
        ]
        raise NoEffectError("; ".join([f"{policies} would do nothing in training", *why]))


def _under(
    model: Model,
    shape: tuple[int, ...],
    times: Tensor,
    policies: Sequence[Policy],
    step: int | None = None,
) -> tuple[Trajectory, Call, Run]:
    """Return a trajectory of one evaluation, whose samples have each a time of their own."""
    trajectory = Trajectory(model.sites(), policies, 1, learned=model.learned)
    call = Call(0, 1, nan, layout=model.layout(shape) if policies else (), times=times, step=step)
    return trajectory, call, trajectory.run(call)
