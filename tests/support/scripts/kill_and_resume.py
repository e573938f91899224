"""Train the toy in FOLDER, killed with SIGKILL again and again: `kill_and_resume.py FOLDER KILLS SEED`.

Every other kill comes at a random moment, the others while a state file is being written. Prints how many of
the kills left an unfinished state file behind.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils import tensorboard  # noqa: F401  imported before the forks, not in each of them
from toy_run import toy_run

STEPS = 60


def child(folder: Path) -> int:
    """Go on with the run in a process of its own; what it says goes to a file beside the folder."""
    pid = os.fork()
    if pid == 0:
        said = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, sys.stderr.fileno())
        toy_run(folder, resume=(folder / "recipe.json").exists(), steps=STEPS, save_every=1)
        os._exit(0)
    return pid


def drafts(folder: Path) -> set[Path]:
    """State files that are being written, or that a kill left half-written."""
    return set(folder.glob(".state.safetensors.*"))


def lines(folder: Path) -> int:
    path = folder / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(folder: Path, steps: int) -> None:
    """Until the run has done so many steps more, or for ten seconds."""
    goal, deadline = lines(folder) + steps, time.monotonic() + 10
    while lines(folder) < goal and time.monotonic() < deadline:
        time.sleep(0.001)


def stop_in_writing(pid: int, folder: Path, chance: random.Random) -> None:
    """Stop the run at random moments until one lies within the writing of a state."""
    old, deadline = drafts(folder), time.monotonic() + 1
    while time.monotonic() < deadline:
        time.sleep(chance.uniform(0, 0.004))
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        if drafts(folder) - old:
            break
        os.kill(pid, signal.SIGCONT)


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance, halfway = random.Random(seed), 0
    for kill in range(kills):
        pid = child(folder)
        wait(folder, chance.randint(0, 6))
        if kill % 2:
            stop_in_writing(pid, folder, chance)
        else:
            time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"the run ended by itself before kill {kill}: status {status}")
        halfway += kill % 2 and bool(drafts(folder))
    _, status = os.waitpid(child(folder), 0)
    if status:
        sys.exit(f"the last resume failed with status {status}")
    print(halfway)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
