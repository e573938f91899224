"""Diffusion transformers and space-time transformers: faster, smaller or better, and what that cost."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditkit.api.compare import compare as compare
    from ditkit.api.compress import adapt as adapt
    from ditkit.api.compress import compress as compress
    from ditkit.api.evaluate import evaluate as evaluate
    from ditkit.api.generate import generate as generate
    from ditkit.api.harmonise import harmonise as harmonise
    from ditkit.api.profile import profile as profile
    from ditkit.api.train_pipeline import train_pipeline as train_pipeline
    from ditkit.api.tune import tune as tune
    from ditkit.core import errors as errors
    from ditkit.core.loading import load as load
    from ditkit.pipelines.accelerate import accelerate as accelerate
    from ditkit.pipelines.accelerate import restore as restore
    from ditkit.sample.sampler import Sampling as Sampling

    __version__: str

HOMES = {
    "accelerate": "ditkit.pipelines.accelerate",
    "compare": "ditkit.api.compare",
    "evaluate": "ditkit.api.evaluate",
    "generate": "ditkit.api.generate",
    "harmonise": "ditkit.api.harmonise",
    "load": "ditkit.core.loading",
    "profile": "ditkit.api.profile",
    "restore": "ditkit.pipelines.accelerate",
    "Sampling": "ditkit.sample.sampler",
    "train_pipeline": "ditkit.api.train_pipeline",
    "tune": "ditkit.api.tune",
}
"""Modules of the public names; each is imported when its name is first used."""
VERBS = {"adapt": "ditkit.api.compress", "compress": "ditkit.api.compress"}
"""Modules of the functions whose names are packages as well: the package is called."""

__all__ = [
    "Sampling",
    "__version__",
    "accelerate",
    "adapt",
    "compare",
    "compress",
    "errors",
    "evaluate",
    "generate",
    "harmonise",
    "load",
    "profile",
    "restore",
    "train_pipeline",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("ditkit.core.errors")
    if name == "__version__":
        from importlib.metadata import version

        return version("ditkit")
    if name in VERBS:
        return import_module(f"ditkit.{name}")
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'ditkit' has no attribute {name!r}")


class _Verb(ModuleType):
    """A package that is called as the function of its name: `ditkit.compress(model, ...)`, `ditkit.compress.Kept`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(VERBS[name]), name)(*args, **kwargs)


class _Package(ModuleType):
    """This one, which makes packages of `VERBS` callable when the import system hands them over."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
