"""Peak memory of a workload's first batch, in a process that has done nothing else.

The other process is told what to draw as JSON; models travel as folders that `Model.save` wrote,
tensors as safetensors.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.checkpoint import read_state, write_state
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.evaluate.memory import PeakMemory, measure_peak
from ditkit.sample.field import placement
from ditkit.sample.workload import Drawn, Workload


class Isolated:
    """A workload written to `folder`, to be drawn by other processes under any of `policies`.

    Its models are written once.

    Raises:
        ConfigError: the workload or a policy holds something that JSON and model folders cannot describe.
    """

    def __init__(self, work: Workload, policies: Sequence[Policy], folder: Path) -> None:
        self.device = placement(work.model)[0].type
        self.folder = folder
        self.described = describe(work.first_batch(), folder)
        describe(tuple(policies), folder)  # what `peak` would refuse is refused before anything is measured

    def peak(self, policies: Sequence[Policy], steps: int) -> PeakMemory:
        """Peak memory while the first batch is drawn."""
        request = {
            "work": self.described,
            "policies": describe(tuple(policies), self.folder),
            "steps": steps,
            "threads": torch.get_num_threads(),
        }
        return measure_peak(f"{__name__}:prepare", request, device=self.device)


def prepare(work: Any, policies: Any, steps: int, threads: int) -> Callable[[], Drawn]:
    """In the other process: the call that is measured."""
    torch.set_num_threads(threads)
    workload, owned = revive(work), revive(policies)
    return lambda: workload.draw(owned, steps)


def describe(value: Any, folder: Path) -> Any:
    """Numbers, strings, tuples, tensors, dataclasses and models as JSON, which `revive` reads.

    Raises:
        ConfigError: `value` is something else, or its class cannot be imported by name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [describe(item, folder) for item in value]
    kind = type(value)
    if isinstance(value, Tensor):
        place = folder / f"tensor{sum(1 for _ in folder.iterdir())}.safetensors"
        write_state(place, {"tensor": value})
        return {"tensor": str(place)}
    if isinstance(value, Model) and kind in every(Model):  # type: ignore[type-abstract]
        device, dtype = placement(value)
        place = folder / f"model{sum(1 for _ in folder.iterdir())}"
        return {
            "model": str(value.save(place)),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
        }
    importable = kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__
    if not dataclasses.is_dataclass(value) or not importable:
        raise ConfigError(
            f"{kind.__module__}.{kind.__qualname__} cannot be described to another process, which measures peak "
            "memory; expected a dataclass of a module, holding plain values or models; or pass memory=False"
        )
    names = [f.name for f in dataclasses.fields(value)]
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "fields": {name: describe(getattr(value, name), folder) for name in names},
    }


def revive(given: Any) -> Any:
    """What `describe` described."""
    if isinstance(given, list):
        return tuple(revive(item) for item in given)
    if not isinstance(given, Mapping):
        return given
    if "tensor" in given:
        return read_state(Path(given["tensor"]))["tensor"]
    if "model" in given:
        return Model.load(given["model"]).to(given["device"], getattr(torch, given["dtype"]))
    module, name = given["class"].split(":")
    return getattr(importlib.import_module(module), name)(
        **{key: revive(value) for key, value in given["fields"].items()}
    )
