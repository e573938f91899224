"""A run of `taught_run` on this rank; fails where ranks end with other weights: `two_ranks.py FOLDER NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from taught_run import RUNS, model_of
from toy_run import Pictures, settings

from ditkit.train.log import Log
from ditkit.train.loop import Training

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    run = Training(
        model_of(name, False), Pictures(), RUNS[name], settings(steps=4, warmup=2, save_every=2), folder
    )
    run.open({}, False)
    if run.accelerator.is_main_process:
        with Log(folder, 0, 4, 8) as log:
            run.follow(log, None)
    else:
        run.follow(None, None)
    own = {**run.model.state_dict(), **{f"part.{k}": v for k, v in run.modules.state_dict().items()}}
    states = gather_object([{k: v.detach().clone() for k, v in own.items()}])
    if not all(torch.equal(v, states[0][k]) for state in states for k, v in state.items()):
        sys.exit(f"{name}: ranks hold other weights")
    run.accelerator.end_training()
