"""Weights out of the files that training scripts write with `torch.save`: tensors by name, and nothing else."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import CheckpointError

LOG = logging.getLogger(__name__)
WRAPPINGS = (
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
"""The keys under which training scripts keep weights; averages first, as these are what is published."""
RUN_CODE = ("builtins.", "os.", "posix.", "nt.", "sys.", "subprocess.", "runpy.", "importlib.", "torch.hub.")
"""Modules whose functions no checkpoint needs: a file that names one is refused whole."""


def read_pickled(path: Path) -> Any:
    """Read what `torch.save` wrote: tensors and plain containers. Any other object stays an empty place.

    Raises:
        CheckpointError: damaged, or a pickle that would run code.
    """
    refused = f"{path} cannot be read as plain tensors (weights_only=True)"
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not others or any(name.startswith(RUN_CODE) for name in others):
                raise
            places: list[Any] = [(type("Place", (Place,), {}), name) for name in others]
            with torch.serialization.safe_globals(places):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{refused}: it is no whole file of torch.save's, or holds code") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        first = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(f"{refused}: {first}") from error


class Place:
    """The empty place of an object that is not unpickled, such as the arguments of a script."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __new__(cls, *args: Any, **kwargs: Any) -> Place:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


def unwrapped(found: Any, path: Path) -> Any:
    """Return the weights among the parts of a checkpoint, where it has parts; the log says which was taken."""
    taken: list[str] = []
    while isinstance(found, Mapping) and not _is_state(found):
        key = next((k for k in WRAPPINGS if isinstance(found.get(k), Mapping) and found[k]), None)
        if key is None:
            break
        taken.append(key)
        found = found[key]
    if taken:
        LOG.warning(
            "%s: the weights under %s are read, not its other parts", path, " ".join(map(repr, taken))
        )
    return found


def without_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    """Take off what `torch.compile` and the wrappers of several processes put before the names of weights."""
    plain = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): v for name, v in state.items()
    }
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain if len(plain) == len(state) else state


def _is_state(found: Mapping[Any, Any]) -> bool:
    """Return whether all values are tensors, and so none is a part that holds some."""
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())
