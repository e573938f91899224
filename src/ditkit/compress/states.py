"""States of a network's blocks in recorded calls: what probes and projections are fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.compress.calibration import Calibration
from ditkit.core.errors import ConfigError
from ditkit.core.run import Handler, Run
from ditkit.nn.time_path import Bound

STUDENT = "student:"
"""Prefix of what sites gave when a block was asked with the state before its span."""
STREAMS = ("image", "text")


def streams_in(state: Any) -> dict[str, Tensor]:
    """Return the features [B, L, D] of a state by stream; one without streams is the image's."""
    if isinstance(state, Tensor):
        return {"image": state}
    return {stream: getattr(state, stream) for stream in STREAMS if hasattr(state, stream)}


def rows_of(x: Tensor) -> Tensor:
    """Return features [B, L, D] as rows [R, D], in float32 or wider."""
    return x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def record(
    model: Any, call: Bound, names: Iterable[str], students: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what sites gave in a call, by name; with ":in" after it, what a site was given.

    Args:
        students: blocks that are asked once more, with the state before another, by its name: what is inside them then
            has the prefix `STUDENT`.
    """
    again = students or {}
    wanted: dict[str, list[str]] = {name: [] for name in again}
    for name in dict.fromkeys((*names, *(first + ":in" for first in again.values()))):
        wanted.setdefault(name.removesuffix(":in"), []).append(name)
    found: dict[str, Any] = {}
    prefix = [""]

    def keep(site: str, own: Sequence[str]) -> Handler:
        def handler(fn: Handler, *args: Any) -> Any:
            before = dict.fromkeys((name for name in own if name.endswith(":in")), args[0] if args else None)
            found.update({prefix[0] + name: value for name, value in before.items()})
            if site in again and not prefix[0]:
                prefix[0] = STUDENT
                found[STUDENT + site] = fn(found[again[site] + ":in"], *args[1:])
                prefix[0] = ""
            out = fn(*args)
            found.update({prefix[0] + name: out for name in own if not name.endswith(":in")})
            return out

        return handler

    model(**call, run=Run({site: keep(site, own) for site, own in wanted.items()}))
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def checked(who: str, calibration: Any, why: str, shape: tuple[int, ...] = ()) -> Calibration:
    """Return the calibration that something is fitted to.

    Raises:
        ConfigError, ShapeError: there is none, or none of this kind or shape; `why` says what for.
    """
    if calibration is None:
        raise ConfigError(
            f"{who}: {why} from calibration, and got none; ditkit.compress draws it for models that sample, and a "
            "pipeline's is recorded by ditkit.compress.recording(pipe.transformer)"
        )
    if not isinstance(calibration, Calibration):
        raise ConfigError(f"{who}: calibration={calibration!r:.60}, expected a Calibration of recorded calls")
    calibration.check(who, 1, shape)
    return calibration


def some(x: Tensor, most: int) -> Tensor:
    """Return at most so many of the rows, evenly spread."""
    if len(x) <= most:
        return x
    return x[torch.linspace(0, len(x) - 1, most, device=x.device).round().long()]
