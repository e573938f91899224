"""Device and type that a model is loaded on: by name, checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ditkit.core.errors import ConfigError, unknown

M = TypeVar("M", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


@dataclass(frozen=True)
class Placement:
    """The device and the type of a model's floating-point tensors; None leaves either as it is loaded."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def read(cls, device: str | torch.device | None, dtype: str | torch.dtype | None) -> Placement:
        """Read names such as "cuda", "cuda:1", "mps", "auto" and "bfloat16".

        Raises:
            ConfigError: a name that is none, or a device that this machine has not.
        """
        return cls(read_device(device), read_dtype(dtype))

    def place(self, model: M) -> M:
        """Move a model's weights, once."""
        if self.device is None and self.dtype is None:
            return model
        return model.to(device=self.device, dtype=self.dtype)


WANTED: ContextVar[Placement] = ContextVar("placement", default=Placement())  # noqa: B039  # it is frozen
"""The placement of models that are loaded without a word of their own."""


@contextmanager
def placed(device: str, dtype: str) -> Iterator[None]:
    """Load models on a device and in a type inside; the names are checked first."""
    token = WANTED.set(Placement.read(device, dtype))
    try:
        yield
    finally:
        WANTED.reset(token)


def read_device(name: str | torch.device | None) -> torch.device | None:
    """Return a device that is there; "auto" is the best of this machine."""
    if name is None:
        return None
    if name == AUTO:
        return torch.device(_accelerators()[0] if _accelerators() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(unknown("device", str(name), _known())) from None
    if device.type not in ("cpu", "meta", *_accelerators()):
        built = f"torch {torch.__version__} finds none here"
        raise ConfigError(f"device={name}: {built}; choose from: {', '.join(_known())}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()}, counted from 0")
    return device


def read_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return a type by its name."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ConfigError(unknown("dtype", name, tuple(DTYPES)))
    return DTYPES[name]


def _accelerators() -> list[str]:
    """Kinds of accelerators that this machine has, the best first."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [kind for kind, there in has.items() if there]


def _known() -> tuple[str, ...]:
    return (AUTO, "cpu", *_accelerators())
