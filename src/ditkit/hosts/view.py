"""Host views: the run in force, and the swap of classes on a pipeline's own modules.

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
from ditkit.nn.narrow import lost_text

Model = TypeVar("Model", bound=nn.Module)

_RUN: ContextVar[Run | None] = ContextVar("ditkit_run", default=None)
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
    """Return the run in force; `DIRECT` outside of `running`."""
    return _RUN.get() or DIRECT


def is_running() -> bool:
    """Return whether a caller decides under what a viewed transformer runs, be it under nothing."""
    return _RUN.get() is not None


class View(type):
    """The class of views, each equal to the class that it stands for: diffusers' `from_pipe` compares classes.

    As a key of a dictionary or in a set it is still itself.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, type) and VIEWS.get(other) is cls)

    __hash__ = type.__hash__


def stands_for(host: type[nn.Module]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Make a class the view of `host`, under the host's own name and module.

    diffusers writes both into `config.json` and `model_index.json`, and looks blocks up by name.
    """

    def subclass(written: type[nn.Module]) -> type[nn.Module]:
        names = {"__module__": host.__module__, "__qualname__": host.__qualname__, "__doc__": written.__doc__}
        cls: Any = View(host.__name__, (written,), names)
        # a copy or a pickle would otherwise look for the view under the host's module
        copyreg.pickle(cls, lambda module: (_blank, (written.__module__, host), module.__getstate__()))
        return VIEWS.setdefault(host, cls)

    return subclass


def view(model: Model) -> Model:
    """Give `model` its sites, in place; a model that has them already stays as it is.

    Raises:
        ConfigError: no view is known for this class.
        ConflictError: as `refuse_foreign` says, or a forward cannot be rebound. Nothing has been changed then.
    """
    if not _has_view(type(model)):
        names = [host.__name__ for host in VIEWS if issubclass(host, nn.Module)]
        raise ConfigError("view: " + unknown("transformer", type(model).__name__, names))
    refuse_foreign(model)
    _swap(model, VIEWS)
    return model


def restore(model: Model) -> Model:
    """Take the sites away again, in place; but from blocks without a text of their own, which diffusers cannot run.

    Raises:
        ConflictError: a forward was replaced since, and cannot be rebound.
    """
    if not lost_text(model):
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
    """List the attributes where hooks of accelerate and diffusers keep the forward that they wrap."""
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
    hosts, kinds = tuple(VIEWS), set[type]()
    for path, module in model.named_modules():
        name, kind = path or "the transformer", type(module)
        refuse_graph(name, module, whole=module is model)
        registry = vars(module).get("_diffusers_hook")
        for label, hook in registry.hooks.items() if registry else ():
            if hasattr(hook, "new_forward") and label not in _HARMLESS:
                raise ConflictError(
                    f"{name}: diffusers' {label!r} ({type(hook).__name__}) already replaces it; call disable_cache()"
                )
        if kind not in kinds and isinstance(module, hosts) and not _has_view(kind):
            raise ConflictError(f"{name}: {kind.__qualname__} is a subclass of a class that has a view")
        kinds.add(kind)


def refuse_graph(name: str, module: nn.Module, whole: bool) -> None:
    """Raise ConflictError if a transformer, a part of a block with sites, or a block in a wrapper is compiled."""
    wrapped = module._modules.get("_orig_mod")
    if wrapped is not None and isinstance(wrapped, tuple(VIEWS)):
        raise ConflictError(f"{name}: torch.compile wrapped it; expected its own compile(), block by block")
    is_compiled = module._compiled_call_impl and _has_view(type(module))
    if is_compiled and (whole or hasattr(module, "processor")):
        raise ConflictError(f"{name}: compiled by itself; expected compile_repeated_blocks(), block by block")


def _has_view(kind: type) -> bool:
    """Return whether a class has a view or is one."""
    return kind in VIEWS or isinstance(kind, View)


def _blank(home: str, host: type) -> nn.Module:
    """Make an empty instance of the view of `host`, which the module `home` defines."""
    importlib.import_module(home)
    cls = VIEWS[host]
    return cls.__new__(cls)
