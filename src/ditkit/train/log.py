"""What a run leaves to read: a line a step in `losses.jsonl`, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ditkit.core.checkpoint import replacing

LOSSES = "losses.jsonl"
SPOKEN_EVERY_SECONDS = 30.0


class Log:
    """Writes each step's losses; on a terminal it draws a bar, elsewhere it prints a line now and then.

    Args:
        folder: of the run; lines of steps that are done again after a resume are dropped.
        start, steps, batch: first step, last step, samples a step.
        quiet: write nothing (every process but the first).
    """

    def __init__(self, folder: Path, start: int, steps: int, batch: int, quiet: bool = False) -> None:
        self.path, self.steps, self.batch, self.quiet = folder / LOSSES, steps, batch, quiet
        self.began = self.spoke = time.monotonic()
        self.start = start
        if not quiet:
            keep_until(self.path, start)
            self.file = self.path.open("a", encoding="utf8")
        self.bar = Progress(
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=quiet or not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("train", total=steps, completed=start, loss=float("nan"), rate=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if not self.quiet:
            self.file.close()

    def step(self, step: int, losses: dict[str, float]) -> None:
        """`step` optimiser steps are done; `losses` are of the last."""
        if self.quiet:
            return
        now = time.monotonic()
        rate = (step - self.start) * self.batch / max(now - self.began, 1e-9)
        line: dict[str, Any] = {"step": step, **losses, "images_per_second": round(rate, 2)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.bar.update(self.task, completed=step, loss=losses["loss"], rate=rate)
        if self.bar.disable and (now - self.spoke > SPOKEN_EVERY_SECONDS or step == self.steps):
            self.spoke = now
            left = (self.steps - step) * self.batch / max(rate, 1e-9)
            print(
                f"step {step}/{self.steps}  loss {losses['loss']:.4f}  {rate:.0f} images/s  {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a kill cut short."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf8").splitlines() if _step(line) <= step]
    with replacing(path) as draft:
        draft.write_text("".join(line + "\n" for line in kept), encoding="utf8")


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
