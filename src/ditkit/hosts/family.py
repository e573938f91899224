"""Families: the module of this package that knows a transformer, found by the class for which its view stands."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ditkit import hosts
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.grid import Segment
from ditkit.core.run import Site
from ditkit.core.transform import Stacked
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.view import VIEWS, View


class Family(NamedTuple):
    """The functions of a host module.

    The parameters of its `layout` are named after arguments of the transformer's forward, or are `model`, `shape`
    (of the latents) and `text` (rows of it). `CHANNEL_AXIS` says where latents have their channels, if not at 1, and
    `STACKS` the lists of blocks that a transform may name, and `INPUTS` how it is trained.
    """

    sites: Callable[[nn.Module], tuple[Site, ...]]
    make_layout: Callable[..., tuple[Segment, ...]]
    channel_axis: int = 1
    stacks: Mapping[str, Stacked] = MappingProxyType({})
    inputs: Inputs | None = None

    def asks(self) -> tuple[str, ...]:
        """List the arguments that `layout` needs."""
        return _parameters(self.make_layout)

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Segment, ...]:
        """Build the layout of a call of `model` with these arguments."""
        text = arguments.get("encoder_hidden_states")
        rows = text.shape[1] if isinstance(text, Tensor) and text.ndim > 1 else 0
        known = {"model": model, "shape": arguments["hidden_states"].shape, "text": rows, **arguments}
        return self.make_layout(**{name: known[name] for name in self.asks() if name in known})


def is_known(model: object) -> bool:
    """Return whether `model` is a transformer that has, or can have, a view."""
    families()
    return type(model) in transformers()


def has_sites(model: nn.Module) -> bool:
    """Return whether the view of `model` is on."""
    return isinstance(type(model), View)


def family(model: nn.Module) -> Family:
    """Find the family of a transformer, with its view or without.

    Raises:
        ConfigError: no view is known for this class.
    """
    modules = families()
    if not is_known(model):
        names = dict.fromkeys(cls.__name__ for cls in transformers())
        raise ConfigError("accelerate: " + unknown("transformer", type(model).__name__, names))
    ours = VIEWS.get(type(model), type(model))
    home = next(module for module in modules if ours in vars(module).values())
    axis, stacks = getattr(home, "CHANNEL_AXIS", 1), getattr(home, "STACKS", {})
    return Family(home.sites, home.layout, axis, stacks, getattr(home, "INPUTS", None))


def transformers() -> list[type]:
    """Classes of whole transformers among those met so far, diffusers' own and their views."""
    from diffusers import ModelMixin

    return [cls for pair in VIEWS.items() for cls in pair if issubclass(cls, ModelMixin)]


@cache
def families() -> list[Any]:
    """Import the modules of all families, which makes their views known."""
    found = pkgutil.iter_modules(hosts.__path__, hosts.__name__ + ".")
    modules = [import_module(module.name) for module in found if module.name != __name__]
    return [module for module in modules if hasattr(module, "sites") and hasattr(module, "layout")]


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
