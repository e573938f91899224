"""Origin of a measured number: the command, day, device and versions that every recorded result has."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ditkit.systems.check import checkout


def origin(packages: Sequence[str] = ("torch", "ditkit")) -> dict[str, object]:
    """Return command, date, device, threads, load and versions; where load is above threads, others worked too.

    Args:
        packages: those whose versions matter to the number.
    """
    return {
        "command": shlex.join(["python", _script(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def device() -> str:
    """Return the GPU's name, or the processor's with the number of cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def _script() -> str:
    """Return the running script as typed from the repository's root, without the folders of one machine."""
    script, root = Path(sys.argv[0]).resolve(), checkout()
    inside = root is not None and script.is_relative_to(root)
    return script.relative_to(root).as_posix() if root is not None and inside else script.name
