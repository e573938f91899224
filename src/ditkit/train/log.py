"""Logs of a run: a line a step in `losses.jsonl`, and progress on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ditkit.core.errors import ConfigError

LOSSES = "losses.jsonl"
SPOKEN_EVERY_SECONDS = 30.0
RATED_STEPS = 50
"""The rate is the mean over so many of the last steps."""


class Log:
    """Writes each step's losses; on a terminal it draws a bar, elsewhere it prints a line now and then.

    Args:
        folder: of the run; lines of steps that are done again after a resume are dropped.
        start, steps, batch: steps done, steps in all, samples a step.

    `processor_seconds` of a line are of all threads, which other work on the machine does not stretch.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, start: int, steps: int, batch: int) -> None:
        self.folder, self.steps, self.batch = folder, steps, batch
        self.done, self.spoke, self.worked = start, time.monotonic(), time.process_time()
        self.times = deque([self.spoke], maxlen=RATED_STEPS + 1)
        with writing(folder):
            keep_until(folder / LOSSES, start)
            self.file = (folder / LOSSES).open("ab", buffering=0)
        self.bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[progress_text]}"),
            expand=True,
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("train", total=steps, completed=start, progress_text="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.file.close()

    def step(self, step: int, losses: Mapping[str, float]) -> float:
        """`step` optimiser steps are done; `losses` are of the last. Returns samples a second."""
        now = time.monotonic()
        self.times.append(now)
        rate = (len(self.times) - 1) * self.batch / max(now - self.times[0], 1e-9)
        worked, self.worked = self.worked, time.process_time()
        line = {
            "step": step,
            **losses,
            "samples_per_second": round(rate, 2),
            "processor_seconds": round(self.worked - worked, 4),
        }
        with writing(self.folder):
            self.file.write(json.dumps(line).encode() + b"\n")
        left = timedelta(seconds=round((self.steps - step) * self.batch / rate))
        progress_text = f"loss {losses['loss']:.4f}  {rate:,.1f} samples/s  {left} left"
        self.bar.update(self.task, completed=step, progress_text=progress_text)
        if self.bar.disable and (now - self.spoke > SPOKEN_EVERY_SECONDS or step == self.steps):
            self.spoke = now
            print(f"step {step}/{self.steps}  {progress_text}", file=sys.stderr, flush=True)
        return rate


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an operating system's error into one line that names the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write in {folder}: {error.strerror or error}") from error


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a kill cut short."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept = 0
        for line in file:
            if not _is_of(line, step):
                break
            kept += len(line)
        file.truncate(kept)


def _is_of(line: bytes, last: int) -> bool:
    """Return whether it is a whole line of a step up to `last`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError):
        return False
