"""What `import ditkit` adds to `import torch`, in fresh processes run in turns.

    python benchmarks/import_time.py

Gate: added_s < 0.3, and none of the heavy optional libraries imported.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from statistics import median

import tyro
from rich.progress import track

from common import record, show

HEAVY = ("accelerate", "diffusers", "huggingface_hub", "matplotlib", "peft", "torchmetrics", "transformers")
TIMED = """
import sys, time
start = time.perf_counter()
import {what}
print(time.perf_counter() - start, *sorted(set(sys.modules) & set({heavy})))
"""


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        rounds: fresh processes of each kind.
    """

    rounds: int = 9


def main(arguments: Arguments) -> None:
    seconds: dict[str, list[float]] = {"torch": [], "torch, ditkit": []}
    imported: list[str] = []
    for turn in track(range(arguments.rounds + 1), description="fresh processes"):
        for what in seconds if turn % 2 else reversed(seconds):
            taken, imported_now = fresh(what)
            if turn:  # the first reads the files from the disk
                seconds[what].append(taken)
            if "ditkit" in what:
                imported = imported_now
    torch_s, both_s = map(median, seconds.values())
    rows = [
        {
            "torch_s": torch_s,
            "torch_and_ditkit_s": both_s,
            "added_s": both_s - torch_s,
            "heavy_imports": ", ".join(imported) or "none",
        }
    ]
    show("import ditkit", rows)
    record("import_time", rows)


def fresh(what: str) -> tuple[float, list[str]]:
    """Seconds that importing `what` takes in a new process, and the heavy libraries it brought along."""
    code = TIMED.format(what=what, heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, *modules = run.stdout.split()
    return float(taken), modules


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
