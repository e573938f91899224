"""Diffusion transformers and space-time transformers: faster, smaller or better, and what that cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditkit.api.compare import compare as compare
    from ditkit.api.evaluate import evaluate as evaluate
    from ditkit.api.generate import generate as generate
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
    "load": "ditkit.core.loading",
    "restore": "ditkit.pipelines.accelerate",
    "Sampling": "ditkit.sample.sampler",
    "tune": "ditkit.api.tune",
}
"""Modules of the public names; each is imported when its name is first used."""

__all__ = [
    "Sampling",
    "__version__",
    "accelerate",
    "compare",
    "errors",
    "evaluate",
    "generate",
    "load",
    "restore",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("ditkit.core.errors")
    if name == "__version__":
        from importlib.metadata import version

        return version("ditkit")
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'ditkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
