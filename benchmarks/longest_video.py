"""The longest clip that one exact sampling step makes within so much memory on a processor.

    python benchmarks/longest_video.py

Batch 1, fresh weights, each length in a process of its own. No step keeps what its blocks leave behind, so the peak
grows by the same bytes with every frame; the length at which it meets the limit is then measured itself, unless
attention would take longer than --seconds: there the longest that does not is measured, and the limit predicted.
Seconds are the processor's, of all threads: others at work do not stretch them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from common import device, record, show
from ditkit.bench.memory import measure_peak
from ditkit.core.cond import Cond
from ditkit.core.model import Denoiser
from ditkit.models.video_dit import VideoDiT
from ditkit.recipes.vdt import vdt
from ditkit.sample import sample

GIB = 2**30
MODELS: dict[str, Callable[[], Any]] = {
    "VDT, recipe vdt": lambda: vdt().network(),
    "VideoDiT small": lambda: VideoDiT.preset("small"),
}
LENGTHS = {"VDT, recipe vdt": (512, 1024, 2048), "VideoDiT small": (64, 128, 256)}
"""Frames of the first measurements: long enough that the peak is the clip's, not the interpreter's."""
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc keeps freed memory in blocks below a threshold that it raises up to 32 MiB; all blocks of a clip near the limit
are larger, so the shorter clips that it is predicted from must not be charged for that."""


class Step(NamedTuple):
    """What one sampling step of a clip took: the processor's seconds, the whole process's peak."""

    frames: int
    seconds: float
    peak_bytes: float


def main(seconds: float = 120.0, gib: float = 8.0, threads: int = 1) -> None:
    """Print one table, and keep it in results/longest_video.json.

    Args:
        seconds: of the processor that a step may take to be measured. gib: memory of the whole process.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    os.environ.update(HAND_BACK)  # of the processes to come
    rows = [row for name in MODELS for row in rows_of(name, seconds, gib * GIB, threads)]
    show(f"the longest clip in {gib:g} GiB, one step, {threads} thread(s); {device()}", rows)
    record("longest_video", rows)


def rows_of(name: str, most_seconds: float, most_bytes: float, threads: int) -> list[dict[str, object]]:
    """The measured steps of a model by length, and the one at the limit if that would take too long."""
    steps = [measure(name, frames, threads) for frames in LENGTHS[name]]
    longest, affordable = fitting(steps, most_bytes), lasting(steps, most_seconds)
    steps.append(measure(name, min(longest, affordable), threads))
    if longest <= affordable and fitting(steps, most_bytes) != longest:
        steps.append(measure(name, fitting(steps, most_bytes), threads))
    rows = [row(name, step, "measured") for step in sorted(steps)]
    if longest > affordable:
        frames = fitting(steps, most_bytes)
        rows.append(row(name, Step(frames, seconds_at(steps, frames), most_bytes), "predicted"))
    return rows


def row(name: str, step: Step, found: str) -> dict[str, object]:
    model = on_meta(name)
    channels, _, height, width = model.sample_shape
    return {
        "model": name,
        "frames": step.frames,
        "tokens": model.layout((channels, step.frames, height, width))[-1].length,
        "cpu_seconds": step.seconds,
        "peak_gib": step.peak_bytes / GIB,
        "found": found,
    }


def fitting(steps: Sequence[Step], most_bytes: float) -> int:
    """Frames at which a line through the measured peaks meets `most_bytes`."""
    slope, rest = np.polyfit([step.frames for step in steps], [step.peak_bytes for step in steps], 1)
    return int((most_bytes - rest) / slope)


def lasting(steps: Sequence[Step], most_seconds: float) -> int:
    """The most frames that take no longer than `most_seconds`; not fewer than were measured."""
    frames = max(steps).frames
    while seconds_at(steps, frames + 1) <= most_seconds:
        frames += 1
    return frames


def seconds_at(steps: Sequence[Step], frames: int) -> float:
    """Of a step, a T + b T^2 of T frames: b for attention, a for all else."""
    b, a = np.polyfit([step.frames for step in steps], [step.seconds / step.frames for step in steps], 1)
    return float(frames * (a + max(b, 0.0) * frames))


def measure(name: str, frames: int, threads: int) -> Step:
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "seconds"
        told = {"name": name, "frames": frames, "threads": threads, "clock": str(clock)}
        memory = measure_peak("longest_video:prepare", told)
        step = Step(frames, float(clock.read_text()), memory.peak_bytes)
    print(f"{name}: {frames} frames, {step.seconds:.1f} s, {step.peak_bytes / GIB:.2f} GiB", flush=True)
    return step


def prepare(name: str, frames: int, threads: int, clock: str) -> Callable[[], None]:
    """In a process of its own: one step, which writes its seconds to the file `clock`."""
    torch.set_num_threads(threads)
    model = MODELS[name]().eval()
    channels, _, height, width = model.sample_shape

    def step() -> None:
        start = time.process_time()
        sample(model, Cond(), [0], shape=(channels, frames, height, width), steps=1)
        Path(clock).write_text(str(time.process_time() - start))

    return step


def on_meta(name: str) -> Denoiser:
    """The model without memory, for its shapes."""
    with torch.device("meta"):
        return MODELS[name]()


if __name__ == "__main__":
    tyro.cli(main)
