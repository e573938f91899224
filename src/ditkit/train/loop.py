"""The training loop, on accelerate: one CPU, one GPU or DDP, as the launcher decides."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.optim import Optimizer

from ditkit.core.checkpoint import write_json
from ditkit.core.cond import Cond
from ditkit.core.devices import WANTED
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.model import Model
from ditkit.core.spec import spec
from ditkit.core.transform import described
from ditkit.train.ema import Average
from ditkit.train.interrupt import noted_interrupts
from ditkit.train.log import Log, writing
from ditkit.train.objective import Objective, Term
from ditkit.train.optimizers import optimizers_of
from ditkit.train.parts import train_only
from ditkit.train.posthoc import write_snapshot
from ditkit.train.randomness import SampleRNG, batch_indices, ordered_indices
from ditkit.train.record import RECIPE, check_resume, check_start
from ditkit.train.schedules import ended
from ditkit.train.settings import Settings
from ditkit.train.state import STATE, discard_drafts, load_state, save_frozen, save_state, unchanged
from ditkit.train.teacher import Held

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class TrainingSet(Protocol):
    """Training data: a length, and batches by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Any, Cond]:
        """Return samples and their conditioning; `rng` is for what is drawn.

        Samples are [B, ...] in float32, or what else the objective takes and has a `to(device)`.
        """
        ...


Sheet = Callable[[Model, int], None]
"""Called with an average of the weights and the number of steps done."""
Finish = Callable[[Model], None]
"""Called with the averaged model when training is done, before it is saved."""
Pool = Callable[[str, Tensor], Tensor]
"""Gives a term, by its name, the mean over the global batch of its mean over a part."""


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
    start: Callable[[], Model] | None = None,
) -> Model:
    """Train `model` in place; the averaged model is returned in eval mode and saved in `folder/model`.

    Killed at any moment, it goes on with `resume=True` from the last saved state, or from the start if
    there is none; on a CPU with the same number of threads the losses are then the same to the last bit.

    Args:
        about: what identifies the run beside its model, settings, objective and number of samples, as JSON.
        sheet: called on the main process every `settings.sheet_every` steps. finish: once, by every process.
        start: gives the model as it stood before transforms and policies were put on it for this run, for terms that
            compare with it; by default a copy of `model`, without its policies.

    Raises:
        ConfigError: the folder holds another run or cannot be written, the disk is full, or the settings or
            the objective do not fit the model or the launcher.
        DitkitError: a loss or gradient is no longer finite; the last saved state is intact.
        KeyboardInterrupt: says what is saved. One process saves its state first, unless `save_every` is 0.
    """
    run = Training(model, data, objective, settings, folder, start)
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


class Training:
    """The moving parts of one training run, as cursors and teachers see them."""

    def __init__(
        self,
        model: Model,
        data: TrainingSet,
        objective: Objective,
        settings: Settings,
        folder: Path,
        start: Callable[[], Model] | None = None,
    ) -> None:
        if not len(data):
            raise ConfigError("training: there are no samples")
        objective = objective.chosen()
        objective.check(model)
        objective.check_batch(settings.batch)
        self.settings, self.data, self.objective, self.folder = settings, data, objective, folder
        self.accelerator = _accelerator(folder)
        self.device = self.accelerator.device
        self.share = settings.share(self.accelerator.num_processes)
        model.gradient_checkpointing = settings.gradient_checkpointing
        self.model = model.train().to(self.device)
        self.modules = objective.make_modules(model, settings.seed).to(self.device)
        self._start = self._copied() if start is None else start
        train_only(model, settings.trained)
        objective.check_trained(model)
        self.opponents = {
            name: term for term in objective.active if (name := _opponent(term)) in self.modules
        }
        factors = {
            n: (t.rate or settings.learning_rate) / settings.learning_rate for n, t in self.opponents.items()
        }
        self.optimizers = optimizers_of(self.model, settings, self.modules, factors)
        self.averages = [Average(self.model, decay) for decay in settings.averages]
        self.teachers: dict[str, Any] = {}
        self.cursor = objective.begin(self)
        self.marks: dict[str, tuple[int, int]] = {}
        self.done = self.saved = 0

    def start(self) -> Model:
        """Return the model from before this run's transforms and policies; if no caller knows it, as given."""
        return self._start()

    def _copied(self) -> Callable[[], Model]:
        """Return a copy of the model as it is now, if a term will ask for it: later its state is restored."""
        if not any(term.needs_teacher for term in self.objective.active):
            return _not_kept
        copy = self.model.with_weights(self.model.state_dict(), "teacher")
        copy.policies = ()
        return lambda: copy

    def open(self, about: Mapping[str, Any], resume: bool) -> None:
        """Take over the folder: check what it holds, restore the state, write the record."""
        described = self.described(about)
        if resume:
            check_resume(self.folder, described)
        else:
            check_start(self.folder)
        if (self.folder / STATE).exists():
            self.restore()
        if self.done > self.settings.steps:
            raise ConfigError(
                f"{self.folder} has done {self.done} steps, more than steps={self.settings.steps}"
            )
        self.hire()
        self.accelerator.wait_for_everyone()  # all have looked before the first writes
        if self.accelerator.is_main_process:
            write_json(self.folder / RECIPE, described)
            if self.settings.save_every:
                self.marks = save_frozen(self.folder, self.model)
            if resume:
                discard_drafts(self.folder)
        with writing(self.folder):
            self.accelerator.init_trackers(
                "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.done + 1}}
            )
        compiled: Any = torch.compile(self.model) if self.settings.compile else self.model
        self.forward = self.accelerator.prepare_model(compiled)

    def described(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return what identifies the run, as JSON."""
        model, terms = self.model, self.objective.active
        teachers = {type(t).__name__: t.teacher.identity() for t in terms if t.teacher is not None}
        return {
            **about,
            "samples": len(self.data),
            "model": dataclasses.asdict(model.config),
            "transforms": [described(transform) for transform in getattr(model, "transforms", ())],
            "policies": [spec(policy) for policy in getattr(model, "policies", ())],
            "teachers": {name: digest for name, digest in teachers.items() if digest},
            "objective": self.objective.describe(),
            "settings": dataclasses.asdict(self.settings),
        }

    def restore(self) -> None:
        """Go on from the folder's state.

        Raises:
            CheckpointError: it is damaged, or of another run. ConfigError: of other processes, and under way.
        """
        found = load_state(self.folder, self.model, self.averages, self.optimizers, self.modules)
        self.done = self.saved = found.step
        processes = self.accelerator.num_processes
        if self.cursor is None or not found.cursor:
            return
        if found.processes != processes:
            raise ConfigError(
                f"{self.folder}: its objective is under way on {found.processes} processes; resume it on as many, got "
                f"{processes}"
            )
        own = f"{self.accelerator.process_index}."
        self.cursor.restore({k.removeprefix(own): v for k, v in found.cursor.items() if k.startswith(own)})

    def hire(self) -> None:
        """Make the teachers that will be asked at this step or later; equal ones are one."""
        hired: dict[Any, Any] = {}
        for term in self.objective.active:
            if term.teacher is not None and not ended(term.weight, self.done):
                if term.teacher not in hired:
                    hired[term.teacher] = term.teacher.make(self)
                term.check_teacher(self.model, hired[term.teacher])
                self.teachers[type(term).__name__] = hired[term.teacher]

    def dismiss(self) -> None:
        """Let go of what no later step needs."""
        for term in self.objective.active:
            if ended(term.weight, self.done):
                self.teachers.pop(type(term).__name__, None)
        if not any(
            term.needs_teacher and not ended(term.weight, self.done) for term in self.objective.active
        ):
            self._start = _not_kept

    def follow(self, log: Log | None, sheet: Sheet | None) -> None:
        """Step to the end; the process that has the log also writes what is due."""
        alone = self.accelerator.num_processes == 1  # one of several that stops leaves the others waiting
        try:
            with noted_interrupts(alone) as interrupted:
                while self.done < self.settings.steps and not (interrupted.is_set() and self.rests):
                    losses = self.step()
                    late = self.is_late(self.settings.save_every)
                    remembered = self.remembered() if late else {}
                    if log is not None:
                        rate = log.step(self.done, losses)
                        with writing(self.folder):
                            self.accelerator.log(self.scalars(losses, rate), step=self.done)
                        self.keep(sheet)
                    if late:
                        self.save(remembered)
                if self.done < self.settings.steps:
                    self.save(self.remembered())
                    raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            kept = f"the state of step {self.saved}" if self.saved else "no state"
            raise KeyboardInterrupt(f"{kept} is saved in {self.folder}") from stop

    @property
    def rests(self) -> bool:
        """True if the objective can be saved now."""
        return self.cursor is None or self.cursor.rests or self.cursor.state() is not None

    def step(self) -> dict[str, float]:
        """One optimiser step over the global batch of number `done`; its mean losses and gradient norm."""
        settings = self.settings
        for name in self.opponents:
            self.modules[name].requires_grad_(False)  # the network's loss gives them no gradient
        opposed: list[Any] | None = [] if self.opponents else None
        losses = self.gradients(opposed)
        norm = torch.nn.utils.clip_grad_norm_(self.stepped(), settings.clip or math.inf)
        losses["gradient_norm"] = norm.item()
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(losses[name]):
                raise DitkitError(
                    f"training: {name} is {losses[name]} at step {self.done + 1}; "
                    "the last saved state is intact; lower learning_rate or set clip"
                )
        own = len(self.optimizers) - len(self.opponents)
        skipped = 0 < settings.skip_above < losses["gradient_norm"]
        for optimizer in self.optimizers[:own]:
            if skipped:
                optimizer.zero_grad()
            else:
                self.stride(optimizer)
        for (name, term), optimizer in zip(self.opponents.items(), self.optimizers[own:], strict=True):
            self.oppose(name, term, optimizer, opposed or [])
        self.done += 1
        for average in self.averages:
            average.update(self.model, self.done)
        self.dismiss()
        return losses

    def indices(self) -> Tensor:
        """Return the samples of the global batch of number `done`, shuffled unless the objective keeps their order."""
        size, settings = len(self.data), self.settings
        if self.objective.in_order:
            return ordered_indices(size, settings.batch, self.done)
        return batch_indices(size, settings.batch, settings.seed, self.done)

    def stride(self, optimizer: Optimizer) -> None:
        """One step of an optimiser, each group at its own rate."""
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(self.done) * group["factor"]
        optimizer.step()
        optimizer.zero_grad()

    def oppose(self, name: str, term: Any, optimizer: Optimizer, opposed: Sequence[Any]) -> None:
        """Take an adversary's own step, on what the network predicted before its step."""
        module = self.modules[name].requires_grad_(True)
        batches = [batch for other, batch in opposed if other is term]
        if not batches or self.done % term.every:
            return
        for batch in batches:
            (term.opposed(batch).mean() / len(batches)).backward()
        self.average_gradients(module.parameters())
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip or math.inf)
        self.stride(optimizer)

    def stepped(self) -> list[torch.nn.Parameter]:
        """All weights but adversaries'."""
        return [
            *self.model.parameters(),
            *(
                w
                for name, part in self.modules.items()
                if name not in self.opponents
                for w in part.parameters()
            ),
        ]

    def average_gradients(self, weights: Iterable[torch.nn.Parameter]) -> None:
        """Over processes, of what no wrapper averages: modules of terms, beside the wrapped network."""
        if self.accelerator.num_processes > 1:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad, "mean")

    def gradients(self, opposed: list[Any] | None = None) -> dict[str, float]:
        """Gradients over the global batch, this process's share of it in parts; the mean losses over all."""
        sums: dict[str, Tensor] = {}
        if self.cursor is not None:
            sums = self.cursor.losses(self.done)
            sums["loss"].backward()
            sums = {name: loss.detach() for name, loss in sums.items()}
        else:
            sums = self.batch_gradients(opposed)
        self.average_gradients(self.modules.parameters())
        means = self.accelerator.reduce(torch.stack(list(sums.values())), "mean")
        return dict(zip(sums, means.tolist(), strict=True))

    def batch_gradients(self, opposed: list[Any] | None) -> dict[str, Tensor]:
        """Compute the gradients of one batch of the samples; return its losses on this process."""
        parts, indices = self.settings.accumulate, self.indices()
        sums: dict[str, Tensor] = {}
        pool = self.pooled(indices)
        for part in range(parts):
            last = part == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.forward):
                losses = self.losses(indices, self.places(part), opposed, pool)
                (losses["loss"] / parts).backward()
            sums = {name: sums.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
        return sums

    def places(self, part: int) -> range:
        """Return the places in the global batch of a part of this process's share."""
        first = (self.accelerator.process_index * self.settings.accumulate + part) * self.share
        return range(first, first + self.share)

    def pooled(self, indices: Tensor) -> Pool | None:
        """Return the means over the global batch that terms ask for; None where one part is all of it, or none asks.

        Processes agree as they go; parts that are yet to come are computed once more, before, without gradients.
        """
        parts, processes = self.settings.accumulate, self.accelerator.num_processes
        if not any(term.pools for term in self.objective.active_at(self.done)) or parts * processes == 1:
            return None
        if parts == 1:
            return lambda _, mean: self.accelerator.reduce(mean, "mean")
        sums: dict[str, Tensor] = {}

        def noted(name: str, mean: Tensor) -> Tensor:
            sums[name] = sums.get(name, 0) + mean / parts
            return mean

        asking = dataclasses.replace(
            self.objective, terms=tuple(term for term in self.objective.terms if term.pools)
        )
        with torch.no_grad():
            for part in range(parts):
                self.losses(indices, self.places(part), None, noted, asking)
        means = {name: self.accelerator.reduce(total, "mean") for name, total in sums.items()}
        return lambda name, _: means[name]

    def losses(
        self,
        indices: Tensor,
        places: range,
        opposed: list[Any] | None,
        pool: Pool | None = None,
        objective: Objective | None = None,
    ) -> dict[str, Tensor]:
        """Compute the objective, or another, on some places of the global batch; randomness is drawn on the CPU."""
        rng = SampleRNG(self.settings.seed, self.done, places)
        data, cond = self.data.batch(indices[places.start : places.stop], rng)
        data, cond = data.to(self.device), cond.to(self.device)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        held = Held(self.done, dict(self.modules.items()), self.teachers, opposed, pool)
        with half, rng.of_network(self.device):
            return (objective or self.objective)(self.forward, self.model, data, cond, rng, held)

    def keep(self, sheet: Sheet | None) -> None:
        """Write what is due after this step but the state, which comes last: a kill before it repeats the others."""
        settings = self.settings
        if self.due(settings.snapshot_every):
            for average in self.averages:
                write_snapshot(self.folder / "snapshots", self.done, average)
        if sheet is not None and self.due(settings.sheet_every):
            sheet(self.averaged(), self.done)
            self.show()

    def scalars(self, losses: Mapping[str, float], rate: float) -> dict[str, float]:
        """Return what TensorBoard is given of a step: each loss once, the learning rate and samples a second."""
        repeated = {name for name, loss in losses.items() if name != "loss" and loss == losses["loss"]}
        shown = {name: loss for name, loss in losses.items() if name not in repeated}
        return {**shown, "learning_rate": self.settings.rate(self.done - 1), "samples_per_second": rate}

    def show(self) -> None:
        """Give TensorBoard the sheets of this step."""
        import numpy as np
        from PIL import Image

        for tracker in self.accelerator.trackers:
            for path in sorted((self.folder / "samples").glob(f"*{self.done:06d}*.png")):
                name = path.stem.replace(f"{self.done:06d}", "").strip("-_") or "samples"
                with Image.open(path) as picture, writing(self.folder):
                    pixels = np.asarray(picture.convert("RGB"))[None]
                    tracker.log_images({name: pixels}, step=self.done, dataformats="NHWC")

    def remembered(self) -> dict[str, Tensor]:
        """Gather what the objective remembers, of all processes; all of them take part."""
        if self.cursor is None:
            return {}
        own = {
            f"{self.accelerator.process_index}.{k}": v.cpu() for k, v in (self.cursor.state() or {}).items()
        }
        if self.accelerator.num_processes == 1:
            return own
        found: dict[str, Tensor] = {}
        for held in gather_object([own]):
            found |= held
        return found

    def save(self, remembered: Mapping[str, Tensor]) -> None:
        """Save the state, unless the settings want none or it is there; the main process writes it."""
        if not self.settings.save_every or self.saved == self.done:
            return
        if self.accelerator.is_main_process:
            save_state(
                self.folder,
                self.done,
                self.model,
                self.averages,
                self.optimizers,
                modules=self.modules,
                cursor=remembered,
                constant=unchanged(self.model, self.marks),
                processes=self.accelerator.num_processes,
            )
        self.saved = self.done

    def due(self, every: int) -> bool:
        return every > 0 and (self.done % every == 0 or self.done == self.settings.steps)

    def is_late(self, every: int) -> bool:
        """Return whether a state is overdue.

        It was due at this step, or at an earlier one at which the objective could not be saved.
        """
        last = (
            self.done if self.done == self.settings.steps else self.done - self.done % every if every else 0
        )
        return every > 0 and self.saved < last and self.rests

    def averaged(self) -> Model:
        """Return a copy of the model with the first average's weights, in eval mode."""
        return self.model.with_weights(self.averages[0].whole(self.model), "average of the weights")


def _opponent(term: Any) -> str:
    """Return the name of a term that is an adversary; empty for others."""
    return type(term).__name__ if type(term).opposed is not Term.opposed else ""


def _not_kept() -> Model:
    raise ConfigError("training: no term compares with the model that training goes on from")


def _accelerator(folder: Path) -> Accelerator:
    """CPU or GPU, number of processes and the tracker.

    Precision and accumulation are the loop's own: accelerate would patch the model's forward and keep both in
    a state of the process, which a second run with other settings would inherit.

    Raises:
        ConfigError: the launcher asks for a way to distribute that the averages and the state do not know.
    """
    tracked = importlib.util.find_spec("tensorboard") is not None
    options: dict[str, Any] = {"log_with": "tensorboard", "project_dir": str(folder)} if tracked else {}
    accelerator = Accelerator(mixed_precision="no", cpu=_on_cpu(), **options)
    if accelerator.distributed_type not in SUPPORTED:
        names = ", ".join(kind.value for kind in SUPPORTED)
        raise ConfigError(
            f"training: {accelerator.distributed_type.value} is not supported (choose from: {names})"
        )
    return accelerator


def _on_cpu() -> bool:
    """Return whether to train on the CPU: asked for, or for want of a GPU."""
    wanted = WANTED.get().device
    return not torch.cuda.is_available() if wanted is None else wanted.type == "cpu"
