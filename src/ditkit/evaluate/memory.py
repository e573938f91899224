"""Peak memory of one call, measured in a process of its own.

In a shared process the allocator keeps what an earlier row freed, so that a later row seems to need nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditkit.core.errors import ConfigError, DitkitError, unknown

CHILD = "from ditkit.evaluate.memory import child; child()"
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
    """What the fresh interpreter runs: request on stdin, answer in the file that its first argument names."""
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
    """Set-up may have peaked above the call. Where the kernel cannot forget that, it counts."""
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
    """A field of Linux' /proc/self/status, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def _max_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
