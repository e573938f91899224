"""What training minimises: a weighted sum of terms over what a network said of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.config import Checked
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.core.run import Site
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import Output, check_policies


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch and what the network said of it.

    Args:
        data: [B, ...] in float32, what is to be said. prediction: [B, ...].
        mask: 1 where content counts, broadcast to the data; None where all does.
        taps: outputs of the sites that the terms read, by name.
        sites: of the network.
        teacher: what a teacher said of the same, where a term compares with it.
    """

    data: Tensor
    prediction: Tensor
    mask: Tensor | None = None
    taps: Mapping[str, Any]
    sites: Sequence[Site] = ()
    teacher: Output | None = None

    def residual(self) -> Tensor:
        """What a perfect network would make zero, [B, ...]."""
        return self.data - self.prediction

    def counted(self, error: Tensor) -> Tensor:
        """`error` [B, ...] where content counts, and 0 elsewhere."""
        return error if self.mask is None else error * self.mask


class Term(Checked, ABC):
    """One part of the loss. With weight 0 nothing of it is computed."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.train.terms",)
    needs_teacher: ClassVar[bool] = False
    """Whether it needs a teacher: the model as it was before the first step, without its policies."""
    on_given: bool = False
    """Whether its mean is over given content, too, where others count 0."""
    weight: float

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        """Names of the sites whose outputs the term needs."""
        return ()

    def check(self, model: Model) -> str:
        """What the term needs and the model does not give; empty for nothing."""
        return ""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The unweighted loss of each sample of a `Batch`, [B]."""


@dataclass(frozen=True)
class Objective(ABC):
    """Weighted terms over one forward pass; a subclass says what the network is asked."""

    supports_teacher: ClassVar[bool] = False
    """Whether a teacher can be asked the same."""
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        for term in self.terms:
            if term.weight < 0:
                raise ConfigError(f"{type(term).__name__}: weight={term.weight} should not be negative")
        names = [type(term).__name__ for term in self.terms]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"Objective: {repeated[0]} is given twice; give it once, with a weight")
        if comparing := [
            type(term).__name__ for term in self.active if term.needs_teacher and not self.supports_teacher
        ]:
            raise ConfigError(f"{type(self).__name__} has no teacher, which {comparing[0]} compares with")
        if not self.active:
            raise ConfigError("Objective: every term has weight 0, so there is nothing to learn")

    @abstractmethod
    def __call__(
        self,
        forward: Callable[..., Any],
        model: Model,
        data: Tensor,
        cond: Cond,
        rng: SampleRNG,
        teacher: Model | None = None,
    ) -> dict[str, Tensor]:
        """Mean loss of each active term, and their weighted sum under `loss`.

        Args:
            forward: what is called, `model` itself or a wrapper around it (DDP).
            data: [B, ...] float32, with `cond`, on the model's device.
            chance: all that is random about these samples.
            teacher: of `teacher`, on the same device.
        """

    @property
    def active(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.weight)

    def check(self, model: Model) -> None:
        """Refuse a model that an active term cannot learn from, before the first step.

        Raises:
            ConfigError: the model is not of the kind that a term needs, or lacks a site that it reads; or those of
                `check_policies`.
        """
        sites = {site.name for site in model.sites()}
        for term in self.active:
            name = type(term).__name__
            if missing := term.check(model):
                raise ConfigError(f"{name} needs {missing}")
            for site in term.taps(model.sites()):
                if site not in sites:
                    raise ConfigError(unknown(f"site that {name} reads:", site, sites))
        check_policies(model, self.taps(model))

    def describe(self) -> dict[str, Any]:
        """What is minimised, as JSON has it."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "terms"}
        return {"kind": type(self).__name__, **own, "terms": [_plain(term) for term in self.active]}

    def taps(self, model: Model) -> list[str]:
        """The sites that active terms read."""
        return sorted({name for term in self.active for name in term.taps(model.sites())})

    def teacher(self, model: Model) -> Model | None:
        """The model as it is now, frozen and without its policies; None where no active term compares with it."""
        if not any(term.needs_teacher for term in self.active):
            return None
        teacher = model.with_weights(model.state_dict(), "teacher").requires_grad_(False)
        teacher.policies = ()
        return teacher

    def weigh(self, batch: Batch) -> dict[str, Tensor]:
        """Mean loss of each active term, and their weighted sum under `loss`."""
        losses = {type(term).__name__: term.loss(batch).mean() for term in self.active}
        weighted = [term.weight * losses[type(term).__name__] for term in self.active]
        return losses | {"loss": torch.stack(weighted).sum()}


def _plain(value: Any) -> Any:
    """A dataclass as its name and fields, as JSON has them; anything else as it is."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return {"is": type(value).__name__, **asdict(value)}
