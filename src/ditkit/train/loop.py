"""The training loop, on accelerate: one CPU, one GPU or DDP, as the launcher decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from ditkit.core.checkpoint import write_state
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.model import Model
from ditkit.train.ema import Average, Power
from ditkit.train.log import Log
from ditkit.train.objective import Objective
from ditkit.train.randomness import batch_indices, draws
from ditkit.train.settings import Settings
from ditkit.train.state import STATE, load_state, save_state


class Samples(Protocol):
    """Training data: a length, and batches by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Cond]:
        """Samples [B, ...] in float32 and what the model is told of them."""
        ...


Sheet = Callable[[Model, int], None]
"""Called with an average of the weights and the number of steps done."""


def train(
    model: Model,
    data: Samples,
    objective: Objective,
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    sheet: Sheet | None = None,
) -> Model:
    """Train `model`; the averaged model is returned and saved in `folder/model`.

    Killed at any moment, it goes on with `resume=True` from the last saved state; on a CPU with the same number of
    threads the losses are then the same to the last bit.

    Raises:
        ConfigError: the folder holds another run, or the settings do not fit the number of processes.
        DitkitError: the loss is no longer finite; the last saved state is intact.
    """
    run = _Run(model, data, objective, settings, folder, resume)
    with Log(folder, run.done, settings.steps, settings.batch, quiet=not run.main) as log:
        while run.done < settings.steps:
            losses = run.step()
            log.step(run.done, losses)
            run.accelerator.log(losses, step=run.done)
            run.keep(sheet)
    run.accelerator.end_training()
    averaged = run.averaged()
    if run.main:
        averaged.save(folder / "model")
    return averaged


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self, model: Model, data: Samples, objective: Objective, settings: Settings, folder: Path, resume: bool
    ) -> None:
        self.settings, self.data, self.objective, self.folder = settings, data, objective, folder
        self.accelerator = _accelerator(settings, folder)
        self.main = self.accelerator.is_main_process
        self.share = settings.share(self.accelerator.num_processes)
        if (folder / STATE).exists() and not resume:
            raise ConfigError(f"{folder} already holds a run; resume it, or choose another folder")
        model.train()
        if hasattr(model, "gradient_checkpointing"):
            model.gradient_checkpointing = settings.gradient_checkpointing
        self.path = model.config.convention.make_path()
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.model = model.to(self.accelerator.device)
        self.averages = [Average(self.model, decay) for decay in settings.averages]
        self.done = load_state(folder, self.model, self.averages, self.optimizer) if resume else 0
        forward = torch.compile(self.model) if settings.compile else self.model
        self.forward, self.stepper = self.accelerator.prepare(forward, self.optimizer)

    def step(self) -> dict[str, float]:
        """One optimiser step over the global batch of number `done`; the mean losses over it."""
        s, rank = self.settings, self.accelerator.process_index
        indices = batch_indices(len(self.data), s.batch, s.seed, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate(self.done)
        sums: dict[str, Tensor] = {}
        for part in range(s.accumulate):
            first = (rank * s.accumulate + part) * self.share
            with self.accelerator.accumulate(self.forward):
                losses = self.losses(indices, range(first, first + self.share))
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients and s.clip:
                    self.accelerator.clip_grad_norm_(self.forward.parameters(), s.clip)
                self.stepper.step()
                self.stepper.zero_grad()
            sums = {k: sums.get(k, 0) + v.detach() / s.accumulate for k, v in losses.items()}
        means = {k: float(self.accelerator.reduce(v, "mean")) for k, v in sums.items()}
        if not math.isfinite(means["loss"]):
            raise DitkitError(f"training: loss is {means['loss']} at step {self.done}; lower the learning rate or clip")
        self.done += 1
        for average in self.averages:
            average.update(self.model, self.done)
        return means

    def losses(self, indices: Tensor, places: range) -> dict[str, Tensor]:
        """The objective on some places of the global batch."""
        device = self.accelerator.device
        data, cond = self.data.batch(indices[places.start : places.stop])
        noise, time, drop = draws(places, tuple(data.shape[1:]), self.settings.seed, self.done)
        dropped = drop < getattr(self.model.config, "label_dropout", 0.0)
        told = Cond(**{**vars(cond), "drop": dropped}).to(device)
        t = self.path.place(self.settings.timesteps.quantile(time)).to(device)
        with self.accelerator.autocast():
            return self.objective(self.forward, self.model, self.path, data.to(device), noise.to(device), t, told)

    def keep(self, sheet: Sheet | None) -> None:
        """Write what is due after this step."""
        if not self.main:
            return
        s, last = self.settings, self.done == self.settings.steps
        due = lambda every: bool(every) and (last or self.done % every == 0)  # noqa: E731
        if due(s.save_every):
            save_state(self.folder, self.done, self.model, self.averages, self.optimizer)
        if due(s.snapshot_every):
            self.snapshot()
        if sheet is not None and due(s.sheet_every):
            sheet(self.averaged(), self.done)

    def snapshot(self) -> None:
        """The power-function averages, for reconstruction after training."""
        for average in self.averages:
            if isinstance(average.decay, Power):
                name = f"{self.done:08d}-{average.decay.std:.3f}.safetensors"
                about = {"step": str(self.done), "std": str(average.decay.std)}
                write_state(self.folder / "snapshots" / name, {k: v.half() for k, v in average.state.items()}, about)

    def averaged(self) -> Model:
        """A copy of the model with the first average's weights, in eval mode."""
        copy = type(self.model)(self.model.config).to(self.accelerator.device)
        copy.load_state_dict(self.averages[0].state)
        return copy.eval()


def _accelerator(settings: Settings, folder: Path) -> Accelerator:
    """CPU or GPU, number of processes and the tracker."""
    import importlib.util

    tracked = importlib.util.find_spec("tensorboard") is not None
    options: dict[str, Any] = {"log_with": "tensorboard", "project_dir": str(folder)} if tracked else {}
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        gradient_accumulation_steps=settings.accumulate,
        cpu=not torch.cuda.is_available(),
        **options,
    )
    if tracked:
        accelerator.init_trackers("tensorboard")
    return accelerator
