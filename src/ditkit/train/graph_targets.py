"""Learning what comes after a window of events: links, or the state of nodes, in the order of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser, Model
from ditkit.nn.patches import Patches
from ditkit.train.objective import NOTHING, Batch, Objective, Term
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import run_with_taps
from ditkit.train.teacher import Held
from ditkit.train.terms.cross_entropy import CrossEntropy


class Targets(NamedTuple):
    """Targets that share one window.

    Args:
        patches: of the window. ids: [P, 2] pairs of nodes, or [P] nodes.
        labels: [P]: 1 for a link that happens, else 0; or the class of a node.
    """

    patches: Patches
    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Self:
        return self._replace(
            patches=self.patches.to(device), ids=self.ids.to(device), labels=self.labels.to(device)
        )


@dataclass(frozen=True)
class GraphTargets(Objective):
    """A network predicts targets after a window of events; batches follow one another in time."""

    in_order: ClassVar[bool] = True
    terms: tuple[Term, ...] = (CrossEntropy(),)

    def check(self, model: Model) -> None:
        if isinstance(model, Denoiser) or model.layout(model.sample_shape):
            raise ConfigError(
                f"GraphTargets: a {type(model).__name__} has samples on a grid; expected a model of graphs, "
                "such as Todyformer"
            )
        super().check(model)

    def __call__(
        self,
        forward: Callable[..., Any],
        model: Model,
        data: Any,
        cond: Cond,
        rng: SampleRNG,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        out, taps = run_with_taps(
            forward, model, self.taps(model, held.step), model.sample_shape, data.patches, data.ids
        )
        batch = Batch(data=data.labels, prediction=out.float(), taps=taps, sites=model.sites(), rng=rng)
        return self.weigh(batch, held)
