"""What training minimises: a weighted sum of terms over one noisy batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.core.path import Path
from ditkit.core.run import DIRECT, Run, Site


@dataclass(frozen=True)
class Batch:
    """A noisy batch and what the network said of it.

    Args:
        data, noise, x: [B, ...] in float32; x = alpha data + sigma noise.
        t: [B] noise-time, or the index of a discrete path.
        prediction: the network's, in noise-time. fraction: of the learned variance, or None.
        taps: outputs of the sites that the terms read, by name.
    """

    path: Path
    convention: Convention
    data: Tensor
    noise: Tensor
    x: Tensor
    t: Tensor
    prediction: Tensor
    fraction: Tensor | None
    taps: Mapping[str, Any]


class Term(ABC):
    """One part of the loss. With weight 0 nothing of it is computed."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.train.terms",)
    weight: float

    def reads(self, sites: Sequence[Site]) -> Sequence[str]:
        """Names of the sites whose outputs the term needs."""
        return ()

    def lacks(self, convention: Convention) -> str:
        """What the term needs and a model of this convention does not give; empty for nothing."""
        return ""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The unweighted loss of each sample, [B]."""


class Tap(Run):
    """A run that keeps the outputs of some sites."""

    __slots__ = ("seen",)

    def __init__(self, names: Sequence[str]) -> None:
        self.seen: dict[str, Any] = {}
        super().__init__({name: self._keep(name) for name in names})

    def _keep(self, name: str) -> Any:
        def handler(fn: Any, *args: Any) -> Any:
            out = self.seen[name] = fn(*args)
            return out

        return handler


@dataclass(frozen=True)
class Objective:
    """Weighted terms over one forward pass."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        for term in self.terms:
            if term.weight < 0:
                raise ConfigError(f"{type(term).__name__}: weight={term.weight} should not be negative")
        names = [type(term).__name__ for term in self.terms]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"Objective: {repeated[0]} is given twice; give it once, with a weight")
        if not self.active:
            raise ConfigError("Objective: every term has weight 0, so there is nothing to learn")

    @property
    def active(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.weight)

    def check(self, model: Model) -> None:
        """Refuse a model that an active term cannot learn from, before the first step.

        Raises:
            ConfigError: the model's convention does not fit, or it lacks a site that a term reads.
        """
        sites = {site.name for site in model.sites()}
        for term in self.active:
            name = type(term).__name__
            if lacking := term.lacks(model.config.convention):
                raise ConfigError(f"{name} needs {lacking}")
            for site in term.reads(model.sites()):
                if site not in sites:
                    raise ConfigError(unknown(f"site that {name} reads:", site, sites))

    def describe(self) -> list[dict[str, Any]]:
        """Names and settings of the active terms, as JSON has them."""
        return [{"term": type(term).__name__, **vars(term)} for term in self.active]

    def __call__(
        self,
        forward: Callable[..., Tensor],
        model: Model,
        *,
        path: Path,
        data: Tensor,
        noise: Tensor,
        t: Tensor,
        cond: Cond,
    ) -> dict[str, Tensor]:
        """Mean loss of each active term, and their weighted sum under `loss`.

        Args:
            forward: what is called, `model` itself or a wrapper around it (DDP).
            data, noise: [B, ...].
            t: [B] from `Timesteps` and `path`, moved to the times at which the prediction can be trained.
        """
        convention: Convention = model.config.convention
        t = path.trainable(t, convention.prediction)
        x = path.mix(data, noise, t.to(data.dtype))
        names = sorted({name for term in self.active for name in term.reads(model.sites())})
        run = Tap(names) if names else DIRECT
        out = forward(x, convention.model_time(t).to(data.dtype), cond, run)
        prediction, fraction = convention.split(out.float())
        taps = run.seen if isinstance(run, Tap) else {}
        batch = Batch(path, convention, data, noise, x, t, prediction, fraction, taps)
        losses = {type(term).__name__: term.loss(batch).mean() for term in self.active}
        weighted = [term.weight * losses[type(term).__name__] for term in self.active]
        return losses | {"loss": torch.stack(weighted).sum()}
