"""Putting a file in a folder is enough: subclasses are found by importing the packages where they live."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from inspect import isabstract
from typing import TypeVar

from ditkit.core.errors import ConfigError, unknown

T = TypeVar("T")


def every(base: type[T]) -> list[type[T]]:
    """List the final subclasses of `base` in the packages that its class attribute `homes` names, sorted by name."""
    homes: tuple[str, ...] = getattr(base, "homes", ())
    for home in homes:
        if importlib.util.find_spec(home) is None:
            continue
        package = importlib.import_module(home)
        for module in pkgutil.iter_modules(package.__path__, home + "."):
            importlib.import_module(module.name)
    found, todo = set(), [base]
    while todo:
        for cls in todo.pop().__subclasses__():
            todo.append(cls)
            if not isabstract(cls) and cls.__module__.startswith(tuple(home + "." for home in homes)):
                found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def find(base: type[T], name: str) -> type[T]:
    """Return the subclass called `name`, in any case.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    classes = {cls.__name__.lower(): cls for cls in every(base)}
    if name.lower() not in classes:
        raise ConfigError(unknown(base.__name__.lower(), name, classes))
    return classes[name.lower()]
