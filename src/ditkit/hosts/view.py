"""What all host views share: the run in force, and the swap of classes on a pipeline's own modules.

A view replaces the class of a transformer and of its blocks by a subclass whose forward calls through sites.
The object, its weights, its hooks and its class name stay: offloading, LoRA, `isinstance` and saving go on.
"""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

from ditkit.core.errors import ConfigError, ConflictError, unknown
from ditkit.core.run import DIRECT, Run

Model = TypeVar("Model", bound=nn.Module)

_RUN: ContextVar[Run] = ContextVar("ditkit_run", default=DIRECT)
VIEWS: dict[type, type[nn.Module]] = {}
_HARMLESS = ("peft_autocast_disable",)
"""diffusers' hooks that wrap a forward without replacing what it computes."""


@contextmanager
def running(run: Run) -> Iterator[None]:
    """Every call of a viewed transformer inside goes through the handlers of `run`."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def current() -> Run:
    """The run in force; `DIRECT` outside of `running`."""
    return _RUN.get()


def stands_for(host: type[nn.Module]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Mark a class as the view of `host`, under the host's own name and module.

    diffusers writes both into `config.json` and `model_index.json`, and looks blocks up by name.
    """

    def mark(cls: type[nn.Module]) -> type[nn.Module]:
        home = cls.__module__
        cls.__name__, cls.__qualname__, cls.__module__ = host.__name__, host.__qualname__, host.__module__
        # a copy or a pickle would otherwise look for the view under the host's module
        copyreg.pickle(cls, lambda module: (_blank, (home, host), module.__getstate__()))
        VIEWS[host] = cls
        return cls

    return mark


def view(model: Model) -> Model:
    """Give `model` its sites, in place; a model that has them already stays as it is.

    Raises:
        ConfigError: no view is known for this class.
        ConflictError: as `refuse_foreign` says, or a forward cannot be rebound. Nothing has been changed then.
    """
    if type(model) not in (*VIEWS, *VIEWS.values()):
        names = [host.__name__ for host in VIEWS if issubclass(host, nn.Module)]
        raise ConfigError("view: " + unknown("transformer", type(model).__name__, names))
    refuse_foreign(model)
    _swap(model, VIEWS)
    return model


def restore(model: Model) -> Model:
    """Take the sites away again, in place.

    Raises:
        ConflictError: a forward was replaced since, and cannot be rebound.
    """
    _swap(model, {ours: host for host, ours in VIEWS.items()})
    return model


def _swap(model: nn.Module, classes: Mapping[type, type]) -> None:
    """Change classes after every hooked forward has been found, so that a refusal leaves the model whole."""
    moves = [
        (module, classes[type(module)], _bound_forwards(name, module))
        for name, module in model.named_modules()
        if type(module) in classes
    ]
    for module, cls, places in moves:
        module.__class__ = cls
        for holder, attribute in places:
            setattr(holder, attribute, cls.forward.__get__(module))  # type: ignore[attr-defined]


def _bound_forwards(name: str, module: nn.Module) -> list[tuple[Any, str]]:
    """Where hooks of accelerate and diffusers keep the forward that they wrap; empty without any."""
    registry = vars(module).get("_diffusers_hook")
    places: list[tuple[Any, str]] = [(module, "forward"), (module, "_old_forward")]
    for reference in registry._fn_refs if registry else ():
        places += [(reference, "forward"), (reference, "original_forward")]
    own = type(module).forward
    found = [place for place in places if getattr(vars(place[0]).get(place[1]), "__func__", None) is own]
    if "forward" in vars(module) and not found:
        raise ConflictError(
            f"{name or 'the transformer'}: its forward was replaced by {vars(module)['forward']!r}"
        )
    return found


def refuse_foreign(model: nn.Module) -> None:
    """Check that nothing else decides what a model computes, with its view or without.

    Raises:
        ConflictError: a module carries a cache of diffusers, is of a subclass, or is compiled together with
            decisions that a policy makes anew in each evaluation.
    """
    for path, module in model.named_modules():
        name = path or "the transformer"
        refuse_graph(name, module, whole=module is model)
        registry = vars(module).get("_diffusers_hook")
        for label, hook in registry.hooks.items() if registry else ():
            if hasattr(hook, "new_forward") and label not in _HARMLESS:
                kind = type(hook).__name__
                raise ConflictError(
                    f"{name}: diffusers' {label!r} ({kind}) already replaces it; call disable_cache()"
                )
        if isinstance(module, tuple(VIEWS)) and type(module) not in (*VIEWS, *VIEWS.values()):
            raise ConflictError(
                f"{name}: {type(module).__qualname__} is a subclass of a class that has a view"
            )


def refuse_graph(name: str, module: Any, whole: bool) -> None:
    """Raise ConflictError if a transformer, a part of a block with sites, or a block in a wrapper is compiled."""
    kinds = (*VIEWS, *VIEWS.values())
    if isinstance(getattr(module, "_orig_mod", None), kinds):
        raise ConflictError(f"{name}: torch.compile wrapped it; expected its own compile(), block by block")
    if type(module) in kinds and module._compiled_call_impl and (whole or hasattr(module, "processor")):
        raise ConflictError(f"{name}: compiled by itself; expected compile_repeated_blocks(), block by block")


def _blank(home: str, host: type) -> nn.Module:
    """An empty instance of the view of `host`, which the module `home` defines."""
    importlib.import_module(home)
    cls = VIEWS[host]
    return cls.__new__(cls)
