"""Learning to say what follows from what was seen, in one pass and without noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser, Model
from ditkit.train.objective import NOTHING, Batch, Objective, Term
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import run_with_taps
from ditkit.train.teacher import Held
from ditkit.train.terms.regression import Regression


@dataclass(frozen=True)
class Forecasting(Objective):
    """The network is shown `Cond.context` and says the data. Cells where `Cond.mask` is 0 do not count."""

    terms: tuple[Term, ...] = (Regression(),)

    def check(self, model: Model) -> None:
        if isinstance(model, Denoiser):
            raise ConfigError(f"Forecasting: a {type(model).__name__} needs noise; train it by Denoising")
        super().check(model)

    def __call__(
        self,
        forward: Callable[..., Any],
        model: Model,
        data: Tensor,
        cond: Cond,
        rng: SampleRNG,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        assert cond.context is not None
        out, taps = run_with_taps(
            forward, model, self.taps(model, held.step), tuple(cond.context.shape[1:]), cond.context
        )
        batch = Batch(
            data=data,
            prediction=out.float(),
            mask=cond.mask,
            taps=taps,
            sites=model.sites(),
            cond=cond,
            rng=rng,
        )
        return self.weigh(batch, held)
