"""The training loop, on accelerate: one CPU, one GPU or DDP, as the launcher decides."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ditkit.core.checkpoint import write_json
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.model import Model
from ditkit.train.ema import Average
from ditkit.train.interrupt import noted_interrupts
from ditkit.train.log import Log, writing
from ditkit.train.objective import Objective
from ditkit.train.optimizers import optimizers_of
from ditkit.train.parts import train_only
from ditkit.train.posthoc import write_snapshot
from ditkit.train.randomness import SampleRNG, batch_indices, ordered_indices
from ditkit.train.record import RECIPE, check_resume, check_start
from ditkit.train.settings import Settings
from ditkit.train.state import STATE, discard_drafts, load_state, save_state

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class TrainingSet(Protocol):
    """Training data: a length, and batches by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Any, Cond]:
        """Samples [B, ...] in float32, or what else the objective takes and has a `to(device)`, and their
        conditioning; `rng` is for what it draws."""
        ...


Sheet = Callable[[Model, int], None]
"""Called with an average of the weights and the number of steps done."""
Finish = Callable[[Model], None]
"""Called with the averaged model when training is done, before it is saved."""


def train(
    model: Model,
    data: TrainingSet,
    objective: Objective,
    settings: Settings,
    folder: Path,
    *,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    sheet: Sheet | None = None,
    finish: Finish | None = None,
) -> Model:
    """Train `model` in place; the averaged model is returned in eval mode and saved in `folder/model`.

    Killed at any moment, it goes on with `resume=True` from the last saved state, or from the start if
    there is none; on a CPU with the same number of threads the losses are then the same to the last bit.

    Args:
        about: what identifies the run beside its model, settings, objective and number of samples, as JSON.
        sheet: called on the main process every `settings.sheet_every` steps. finish: once, by every process.

    Raises:
        ConfigError: the folder holds another run or cannot be written, the disk is full, or the settings or
            the objective do not fit the model or the launcher.
        DitkitError: a loss or gradient is no longer finite; the last saved state is intact.
        KeyboardInterrupt: says what is saved. One process saves its state first, unless `save_every` is 0.
    """
    run = _Run(model, data, objective, settings, folder)
    run.open(about or {}, resume)
    if run.accelerator.is_main_process:
        with Log(folder, run.done, settings.steps, settings.batch) as log:
            run.follow(log, sheet)
    else:
        run.follow(None, None)
    averaged = run.averaged()
    if finish is not None:
        finish(averaged)
    if run.accelerator.is_main_process:
        averaged.save(folder / "model")
    run.accelerator.end_training()
    return averaged


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self, model: Model, data: TrainingSet, objective: Objective, settings: Settings, folder: Path
    ) -> None:
        if not len(data):
            raise ConfigError("training: there are no samples")
        objective.check(model)
        self.settings, self.data, self.objective, self.folder = settings, data, objective, folder
        self.accelerator = _accelerator(folder)
        self.device = self.accelerator.device
        self.share = settings.share(self.accelerator.num_processes)
        model.gradient_checkpointing = settings.gradient_checkpointing
        self.model = model.train().to(self.device)
        self.teacher = objective.teacher(model)
        train_only(model, settings.trained)
        self.optimizers = optimizers_of(self.model, settings)
        self.averages = [Average(self.model, decay) for decay in settings.averages]
        self.done = self.saved = 0

    def open(self, about: Mapping[str, Any], resume: bool) -> None:
        """Take over the folder: check what it holds, restore the state, write the record."""
        described = {
            **about,
            "samples": len(self.data),
            "model": dataclasses.asdict(self.model.config),
            "objective": self.objective.describe(),
            "settings": dataclasses.asdict(self.settings),
        }
        if resume:
            check_resume(self.folder, described)
        else:
            check_start(self.folder)
        if (self.folder / STATE).exists():
            self.done = load_state(self.folder, self.model, self.averages, self.optimizers)
            self.saved = self.done
        if self.done > self.settings.steps:
            raise ConfigError(
                f"{self.folder} has done {self.done} steps, more than steps={self.settings.steps}"
            )
        self.accelerator.wait_for_everyone()  # all have looked before the first writes
        if self.accelerator.is_main_process:
            write_json(self.folder / RECIPE, described)
            if resume:
                discard_drafts(self.folder)
        with writing(self.folder):
            self.accelerator.init_trackers(
                "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.done + 1}}
            )
        compiled: Any = torch.compile(self.model) if self.settings.compile else self.model
        self.forward = self.accelerator.prepare_model(compiled)

    def follow(self, log: Log | None, sheet: Sheet | None) -> None:
        """Step to the end; the process that has the log also writes what is due."""
        alone = self.accelerator.num_processes == 1  # one of several that stops leaves the others waiting
        try:
            with noted_interrupts(alone) as asked:
                while self.done < self.settings.steps and not asked.is_set():
                    losses = self.step()
                    if log is not None:
                        log.step(self.done, losses)
                        with writing(self.folder):
                            self.accelerator.log(losses, step=self.done)
                        self.keep(sheet)
                if self.done < self.settings.steps:
                    self.save()
                    raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            kept = f"the state of step {self.saved}" if self.saved else "no state"
            raise KeyboardInterrupt(f"{kept} is saved in {self.folder}") from stop

    def step(self) -> dict[str, float]:
        """One optimiser step over the global batch of number `done`; its mean losses and gradient norm."""
        settings = self.settings
        losses = self.gradients(self.indices())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        losses["gradient_norm"] = norm.item()
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(losses[name]):
                raise DitkitError(
                    f"training: {name} is {losses[name]} at step {self.done + 1}; "
                    "the last saved state is intact; lower learning_rate or set clip"
                )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(self.done)
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        for average in self.averages:
            average.update(self.model, self.done)
        return losses

    def indices(self) -> Tensor:
        """Samples of the global batch of number `done`, shuffled unless the objective keeps their order."""
        size, settings = len(self.data), self.settings
        if self.objective.in_order:
            return ordered_indices(size, settings.batch, self.done)
        return batch_indices(size, settings.batch, settings.seed, self.done)

    def gradients(self, indices: Tensor) -> dict[str, float]:
        """Gradients over the global batch, this process's share of it in parts; the mean losses over all."""
        parts = self.settings.accumulate
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            first = (self.accelerator.process_index * parts + part) * self.share
            last = part == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.forward):
                losses = self.losses(indices, range(first, first + self.share))
                (losses["loss"] / parts).backward()
            sums = {name: sums.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
        means = self.accelerator.reduce(torch.stack(list(sums.values())), "mean")
        return dict(zip(sums, means.tolist(), strict=True))

    def losses(self, indices: Tensor, places: range) -> dict[str, Tensor]:
        """The objective on some places of the global batch; all that is random is drawn on the CPU."""
        rng = SampleRNG(self.settings.seed, self.done, places)
        data, cond = self.data.batch(indices[places.start : places.stop], rng)
        data, cond = data.to(self.device), cond.to(self.device)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        with half, rng.of_network(self.device):
            return self.objective(self.forward, self.model, data, cond, rng, self.teacher)

    def keep(self, sheet: Sheet | None) -> None:
        """Write what is due after this step; the state last, so that a kill before it repeats the others."""
        settings = self.settings
        if self.due(settings.snapshot_every):
            for average in self.averages:
                write_snapshot(self.folder / "snapshots", self.done, average)
        if sheet is not None and self.due(settings.sheet_every):
            sheet(self.averaged(), self.done)
        if self.due(settings.save_every):
            self.save()

    def save(self) -> None:
        """The state, unless the settings want none or it is there."""
        if self.settings.save_every and self.saved != self.done:
            save_state(self.folder, self.done, self.model, self.averages, self.optimizers)
            self.saved = self.done

    def due(self, every: int) -> bool:
        return every > 0 and (self.done % every == 0 or self.done == self.settings.steps)

    def averaged(self) -> Model:
        """A copy of the model with the first average's weights, in eval mode."""
        return self.model.with_weights(self.averages[0].state, "average of the weights")


def _accelerator(folder: Path) -> Accelerator:
    """CPU or GPU, number of processes and the tracker.

    Precision and accumulation are the loop's own: accelerate would patch the model's forward and keep both in
    a state of the process, which a second run with other settings would inherit.

    Raises:
        ConfigError: the launcher asks for a way to distribute that the averages and the state do not know.
    """
    tracked = importlib.util.find_spec("tensorboard") is not None
    options: dict[str, Any] = {"log_with": "tensorboard", "project_dir": str(folder)} if tracked else {}
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), **options)
    if accelerator.distributed_type not in SUPPORTED:
        names = ", ".join(kind.value for kind in SUPPORTED)
        raise ConfigError(
            f"training: {accelerator.distributed_type.value} is not supported (choose from: {names})"
        )
    return accelerator
