"""Who a term compares the network with: itself before, its running average, a trained model, or a frozen encoder.

A teacher is made once a run, after the state was restored, and kept until its term's weight is 0 for good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ditkit.core.codec import fingerprint
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Segment
from ditkit.core.loading import load
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.nn.encoders import Facts, check_grid, facts_of, picture_encoder
from ditkit.train.ema import Average


class Run(Protocol):
    """The source of a teacher: the model in training and its averages."""

    model: Model
    device: torch.device

    @property
    def averages(self) -> Sequence[Average]:
        """The averages of the model's weights."""
        ...

    def start(self) -> Model:
        """Return the model from before this run's transforms and policies."""
        ...


class Teacher(ABC):
    """A frozen dataclass that says who it is."""

    @abstractmethod
    def make(self, run: Run) -> nn.Module:
        """Make the frozen network, in eval mode, on the run's device."""

    def identity(self) -> str:
        """Return a digest of weights from outside of the run, which a resume must find again; or nothing."""
        return ""

    def check(self, model: Model) -> None:  # noqa: B027
        """Refuse a model that it cannot teach, before the first step.

        Raises:
            ConfigError, CheckpointError: names what was given and expected.
        """


@dataclass(frozen=True)
class SelfTeacher(Teacher):
    """The model as it stood before this run's transforms and policies, under those inherent ones that it had."""

    def make(self, run: Run) -> nn.Module:
        return frozen(run.start()).to(run.device)


@dataclass(frozen=True)
class EmaTeacher(Teacher):
    """A running average of the weights, as it is at each step: it shares the average's memory.

    Args:
        which: of the run's averages.
    """

    which: int = 0

    def make(self, run: Run) -> nn.Module:
        if self.which >= len(run.averages):
            raise ConfigError(f"EmaTeacher: which={self.which}, expected one of {len(run.averages)} averages")
        return frozen(run.model.sharing(run.averages[self.which].whole(run.model)))


@dataclass(frozen=True)
class LiveTeacher(Teacher):
    """The model in training itself, as it is at each step: it shares the weights' memory, in eval mode."""

    def make(self, run: Run) -> nn.Module:
        return frozen(run.model.sharing(run.model.state_dict()))


@dataclass(frozen=True)
class GivenTeacher(Teacher):
    """A trained model, as `ditkit.load` takes it.

    Args:
        folder: its name or folder.
    """

    folder: str

    def make(self, run: Run) -> nn.Module:
        return frozen(run.model.as_teacher(load(self.folder))).to(run.device)

    def identity(self) -> str:
        return fingerprint(load(self.folder).state_dict())

    def check(self, model: Model) -> None:
        given = model.as_teacher(load(self.folder))
        if given.sample_shape != model.sample_shape:
            raise ConfigError(
                f"GivenTeacher: {self.folder} is of samples {list(given.sample_shape)}, expected "
                f"{list(model.sample_shape)}, as the model that it teaches"
            )


@dataclass(frozen=True)
class EncoderTeacher(Teacher):
    """A frozen network that is no model of ours, asked with what its term's `asks` gives as x alone.

    Args:
        build: makes it, the same at each call. name: what the record calls it.
    """

    build: Callable[[], nn.Module] = field(compare=False)
    name: str = "encoder"

    def make(self, run: Run) -> nn.Module:
        return self._built().to(run.device)

    def identity(self) -> str:
        return fingerprint(self._built().state_dict())

    def _built(self) -> nn.Module:
        with torch.random.fork_rng(devices=()):
            return self.build().eval().requires_grad_(False)


@dataclass(frozen=True)
class PictureTeacher(Teacher):
    """A frozen encoder of pictures by its name, as `ditkit.nn.encoders.picture_encoder` takes it.

    Args:
        source: efficientnet-lite0, vit:FOLDER, or a vision model of the transformers library, by folder or id.
    """

    source: str

    def facts(self) -> Facts:
        """Return its numbers, without its weights."""
        return facts_of(self.source)

    def make(self, run: Run) -> nn.Module:
        return picture_encoder(self.source).to(run.device)

    def identity(self) -> str:
        return fingerprint(picture_encoder(self.source).state_dict())

    def check(self, model: Model) -> None:
        check_grid(self.source, self.facts(), picture_grid(model.layout(model.sample_shape)))


def picture_grid(layout: Sequence[Segment], stage: int = 0) -> tuple[int, int]:
    """Return rows and columns of a picture's tokens.

    Raises:
        ConfigError: there is no picture in the layout, or a clip.
    """
    grids = [part.grid for part in layout if part.stream == "image" and part.stage == stage]
    if len(grids) != 1 or grids[0].frames != 1:
        shapes = [grid.shape for grid in grids]
        raise ConfigError(
            f"an encoder of pictures teaches tokens of one picture, the model has image grids {shapes}"
        )
    return grids[0].height, grids[0].width


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A term's question, beside what the student predicts of its own inputs.

    Args:
        x: another input; None for the student's. t: other times, of the student's path; None for the student's.
        cond: other conditioning; None for the student's.
        taps: sites whose outputs, or inputs, are kept.
        stop: the site after which nothing more is computed; of a teacher only.
        student: ask the network in training once more, with gradients, instead of the teacher.
        policies: in the place of those that it is under; `ditkit.train.taps.WHOLE` is those, leaving nothing out.
        grid, maps: of an encoder of pictures, the rows and columns of its tokens, and of how many last blocks it gives
            the attention.
    """

    x: Tensor | None = None
    t: Tensor | None = None
    cond: Cond | None = None
    taps: tuple[str, ...] = ()
    stop: str = ""
    student: bool = False
    policies: tuple[Policy, ...] | None = None
    grid: tuple[int, int] = (0, 0)
    maps: int = 0


class Answer(NamedTuple):
    """A network's prediction in noise-time, sites' outputs by name, and the fraction of a learned variance.

    Of an encoder of pictures, the first is its `Encoded`.
    """

    out: Any
    taps: Mapping[str, Any]
    fraction: Tensor | None = None


class Held(NamedTuple):
    """The teachers, modules and memory of the objective's terms at a step, by their names."""

    step: int = 0
    modules: Any = {}  # noqa: RUF012
    teachers: Any = {}  # noqa: RUF012
    opponents: list[Any] | None = None
    """The list to which batches of adversaries are added, with their terms."""
    pool: Callable[[str, Tensor], Tensor] | None = None
    """The mean over all parts of the batch, in all processes, of a term's own mean; None where one part is all."""


def frozen(model: Model) -> Model:
    """`model` in eval mode, without gradients, under its inherent policies only."""
    model.policies = tuple(policy for policy in model.policies if policy.inherent)
    model.eval().requires_grad_(False)
    return model
