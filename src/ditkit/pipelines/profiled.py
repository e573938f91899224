"""A pipeline's call in the form that the profiler takes: what to call, its transformers with sites, its other parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from ditkit.core.errors import ConfigError
from ditkit.core.run import Site
from ditkit.hosts.family import family, has_sites
from ditkit.hosts.view import restore, view
from ditkit.pipelines.accelerate import Accelerated, transformers_of
from ditkit.pipelines.replay import CallSnapshot


def prepared(
    stack: ExitStack, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], object], list[tuple[nn.Module, Sequence[Site]]], dict[str, nn.Module]]:
    """Return the call, the same each time, the transformers with their sites, and the other modules by name.

    A transformer without sites has them until `stack` closes.

    Raises:
        ConfigError: no pipeline, or none of its transformers has a view.
    """
    if not callable(pipe) or not hasattr(pipe, "components"):
        raise ConfigError(
            f"profile: got {type(pipe).__name__}, expected a model of ditkit or a pipeline of diffusers"
        )
    transformers = transformers_of(pipe)
    for model in transformers.values():
        if not has_sites(model):
            view(model)
            stack.callback(restore, model)
    denoisers: list[tuple[nn.Module, Sequence[Site]]] = [
        (model, family(model).sites(model)) for model in transformers.values()
    ]
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    stages = {name: part for name, part in parts.items() if name not in transformers}
    real: Any = object.__getattribute__(pipe, "_pipe") if type(pipe) is Accelerated else pipe
    snapshot = CallSnapshot(real, args, kwargs)

    def call() -> None:
        with snapshot.again() as generators:
            pipe(*args, **{**kwargs, **generators})

    return call, denoisers, stages
