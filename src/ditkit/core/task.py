"""Tasks: what the samples of a model are, and how they are measured, shown and judged; one subclass a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.codec import Codec
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


class Evaluation(ABC):
    """The figures of a trained model on data, and the files that show them."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Return every figure as JSON."""

    @abstractmethod
    def table(self) -> Any:
        """Return the main figures as a table of rich, for a terminal of 80 columns; None where there are none."""

    def remarks(self) -> Iterable[str]:
        """Say in lines what the table does not."""
        return ()

    @abstractmethod
    def save(self, folder: Path) -> list[list[str]]:
        """Write the pictures and films into a folder that exists; the names of the files, those of one sample together.

        Raises:
            ConfigError: a file cannot be written.
        """


class Task(ABC):
    """A task; a subclass stands in `ditkit.tasks.NAME.task` and is imported by that package.

    Samples are [n, *axes] and lie nominally in [-1, 1].
    """

    homes: ClassVar[tuple[str, ...]] = ("ditkit.tasks",)
    name: ClassVar[str]
    """Text in config.json."""
    noun: ClassVar[str]
    """One sample, for a person."""
    data: ClassVar[str]
    """Kind of the dataset: images, clips, or fields."""
    axes: ClassVar[tuple[str, ...]]
    """The axes of one sample: C channels, T frames, H height and W width."""
    has_frames: ClassVar[bool] = False
    """True if a sample is a sequence of pictures."""
    command: ClassVar[str] = "ditkit generate"
    """The command that takes a trained model."""
    settings: ClassVar[tuple[str, ...]] = ("count",)
    """Words that `evaluate` takes beside those of sampling."""
    generates: ClassVar[bool] = True
    """True if samples are drawn from noise, without data."""

    @property
    @abstractmethod
    def recipe(self) -> type:
        """The class of recipes that train a model of the task."""

    @abstractmethod
    def evaluate(
        self, model: Any, data: str, *, sampling: Any, progress: Progress | None, **settings: Any
    ) -> Evaluation:
        """Measure a trained model on data.

        Args:
            sampling: a `ditkit.Sampling`, or None for the task's default.
            settings: `options` of the data's loader, `count` of samples, and words of the task's own.

        Raises:
            ConfigError: data that do not fit the model, or a number out of range. DataError: as the loader does.
        """

    def error(self, x: Tensor, ref: Tensor, generated: Tensor | None = None) -> Mapping[str, Any]:
        """Measure how far samples are from a reference of the same shape: the error fields of a comparison's row.

        Args:
            generated: [n, 1, ...] bool, false where content was given; None where nothing was.
        """
        raise ConfigError(f"{self.name}: {self.noun}s are not compared")

    def draw(self, samples: Tensor) -> Tensor:
        """Return samples as pictures, uint8 [n, 1 or 3, H, W], or [n, T, 1 or 3, H, W] of samples with frames."""
        raise ConfigError(f"{self.name}: {self.noun}s are not shown as pictures")

    def write(self, folder: Path, samples: Sequence[Tensor], names: Sequence[str], columns: int) -> list[str]:
        """Write each sample under its name, and sheet.png with `columns` in a row; a file name a sample.

        Raises:
            ConfigError: a file cannot be written.
        """
        raise ConfigError(f"{self.name}: {self.noun}s are not written as files")

    def judge(self, real: Tensor, count: int, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
        """Return what measures the distance of `count` samples of `shape` to the distribution of real ones.

        Raises:
            ConfigError: the task has no such distance, or too few samples.
        """
        raise ConfigError(f"real: no distance of distributions for {self.noun}s, expected none")

    def reference(
        self, model: Any, data: str | None, mask: Any, seeds: Sequence[int], **options: Any
    ) -> tuple[Tensor | None, Cond]:
        """Load what a comparison holds samples against: real samples, or the conditioning on given content.

        Args:
            mask: the kind of masks that given content has, None for the task's default.
            options: of the data's loader.

        Raises:
            ConfigError: they contradict each other or the model. Those of the loaders.
        """
        if data is not None or mask is not None:
            raise ConfigError(f"{self.noun}s are compared without data, got data={data}")
        return None, Cond()

    def settle(self, sampling: Any) -> Any:
        """Return the settings for samples of which nothing is given."""
        return sampling


def tasks() -> dict[str, Task]:
    """Every task by its name."""
    return {kind.name: kind() for kind in every(Task)}  # type: ignore[type-abstract]


def task_named(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ConfigError: there is none; the message quotes the nearest.
    """
    known = tasks()
    if name not in known:
        raise ConfigError(unknown("task", name, known))
    return known[name]


def task_of(model: Model | Codec) -> Task:
    """Return the task of a model or of a codec.

    Raises:
        ConfigError: the model names none, or one that does not exist.
    """
    if not model.task:
        raise ConfigError(f"a {type(model).__name__} names no task, expected one of {', '.join(tasks())}")
    return task_named(model.task)


def generating(model: Model, verb: str, source: object = None) -> Task:
    """Return the task of a model whose samples can be drawn without data.

    Args:
        verb: that needs it. source: the model's name, for errors.

    Raises:
        ConfigError: it is a model of another task; the message names the command for that.
    """
    task = task_of(model)
    if not task.generates:
        name = type(model).__name__ if source is None else source
        raise ConfigError(
            f"{verb}: {name} makes {task.noun}s of data, expected a model that draws from noise; "
            f"try: {task.command} {name} --data DATA"
        )
    return task
