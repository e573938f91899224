"""Peak memory of one call, measured in a process of its own.

In a shared process the allocator keeps what an earlier row freed, so that a later row seems to need nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.checkpoint import read_state, write_state
from ditkit.core.errors import ConfigError, DitkitError, unknown
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.sample.denoiser import placement
from ditkit.sample.sampler import Sampler, Samples

CHILD = "from ditkit.bench.memory import child; child()"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes before the call and at its highest point: resident memory on a CPU, allocated memory on a GPU.

    Resident memory contains the interpreter and its libraries: compare rows by peaks, or by `added_bytes`.
    """

    device: str
    baseline_bytes: int
    peak_bytes: int

    @property
    def added_bytes(self) -> int:
        return self.peak_bytes - self.baseline_bytes


def measure_peak(target: str, kwargs: Mapping[str, Any], *, device: str = "cpu") -> PeakMemory:
    """Peak memory of `module:function` in a fresh interpreter with the module search path of this one.

    `function(**kwargs)` sets up (loads the model, say) and returns the callable without arguments that is
    measured; kwargs must be JSON. Raises ConfigError for a malformed target, device or kwargs, and
    DitkitError, with the last line that the process wrote, when the process fails.
    """
    if target.count(":") != 1 or not all(target.split(":")):
        raise ConfigError(f"measure_peak: expected a target 'module:function', got {target!r}")
    if device not in DEVICES:
        raise ConfigError(unknown("device", device, DEVICES))
    try:
        request = json.dumps({"target": target, "kwargs": dict(kwargs), "device": device})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"measure_peak: kwargs of {target} cannot be written as JSON ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        finished = subprocess.run(
            [sys.executable, "-c", CHILD, str(answer)],
            input=request,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if finished.returncode != 0:
            lines = finished.stderr.strip().splitlines() or ["no message"]
            raise DitkitError(
                f"measure_peak: {target} ended with code {finished.returncode}, expected 0: {lines[-1]}"
            )
        return PeakMemory(**json.loads(answer.read_text()))


def child() -> None:
    """Run in the fresh interpreter: request on stdin, answer in the file that its first argument names."""
    request = json.load(sys.stdin)
    module, name = request["target"].split(":")
    call = getattr(importlib.import_module(module), name)(**request["kwargs"])
    if not callable(call):
        raise ConfigError(
            f"{request['target']}: expected to return the callable to be measured, got {type(call).__name__}"
        )
    measure = _cuda_peak if request["device"] == "cuda" else _resident_peak
    Path(sys.argv[1]).write_text(json.dumps(asdict(measure(call))))


def _resident_peak(call: Callable[[], object]) -> PeakMemory:
    _forget_earlier_peak()
    baseline = _resident_now_bytes()
    call()
    return PeakMemory("cpu", baseline, _resident_highest_bytes())


def _cuda_peak(call: Callable[[], object]) -> PeakMemory:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return PeakMemory("cuda", baseline, torch.cuda.max_memory_allocated())


def _forget_earlier_peak() -> None:
    """Reset the kernel's peak, since set-up may have peaked above the call; where it cannot be reset, it counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM := VmRSS, see proc(5)
    except OSError:
        return


def _resident_now_bytes() -> int:
    return _status_bytes("VmRSS") or _max_resident_bytes()


def _resident_highest_bytes() -> int:
    # VmHWM first: ru_maxrss survives exec, so a child of a large process would inherit its parent's peak.
    return _status_bytes("VmHWM") or _max_resident_bytes()


def _status_bytes(name: str) -> int | None:
    """Read a field of Linux' /proc/self/status, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def _max_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


class Isolated:
    """A sampler written to `folder`, to be drawn by other processes under any of `policies`.

    Its models are written once.

    Raises:
        ConfigError: the sampler or a policy holds something that JSON and model folders cannot describe.
    """

    def __init__(self, work: Sampler, policies: Sequence[Policy], folder: Path) -> None:
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


def prepare(work: Any, policies: Any, steps: int, threads: int) -> Callable[[], Samples]:
    """In the other process: the call that is measured."""
    torch.set_num_threads(threads)
    sampler, owned = revive(work), revive(policies)
    return lambda: sampler.draw(policies=owned, steps=steps)


def describe(value: Any, folder: Path) -> Any:
    """Numbers, strings, tuples, mappings, tensors, dataclasses and models as JSON, which `revive` reads.

    Raises:
        ConfigError: `value` is something else, or its class cannot be imported by name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [describe(item, folder) for item in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"mapping": {name: describe(item, folder) for name, item in value.items()}}
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
    """Rebuild a value from what `describe` returned."""
    if isinstance(given, list):
        return tuple(revive(item) for item in given)
    if not isinstance(given, Mapping):
        return given
    if "mapping" in given:
        return {name: revive(value) for name, value in given["mapping"].items()}
    if "tensor" in given:
        return read_state(Path(given["tensor"]))["tensor"]
    if "model" in given:
        return Model.load(given["model"]).to(given["device"], getattr(torch, given["dtype"]))
    module, name = given["class"].split(":")
    return getattr(importlib.import_module(module), name)(
        **{key: revive(value) for key, value in given["fields"].items()}
    )
