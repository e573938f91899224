"""Distance of the network's learned variance from a teacher's (LiT, arXiv 2501.12976)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import SelfTeacher, Teacher

TEACHER = SelfTeacher()


@dataclass(frozen=True)
class VarianceDistillation(Term):
    """mean (variance - teacher's)^2, the second half of LiT's hybrid distillation, whose weight is the default.

    Beside it stands `PredictionDistillation` of weight 0.5.

    Args:
        of: the network's own output v in [-1, 1], or the logarithm of the variance that it stands for at t.
        teacher: by default the model from before this run's policies: the one that weights come from.
    """

    weight: Weight = 0.05
    of: Literal["output", "log"] = "output"
    teacher: Teacher = TEACHER

    def check(self, model: Model) -> str:
        convention = model.config.convention
        if convention.extra == "variance" and (convention.discrete or self.of == "output"):
            return ""
        given = f"path={convention.path!r} and extra={convention.extra!r}"
        return f"a learned variance, extra='variance', and for of='log' path='ddpm'; the model has {given}"

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None and batch.fraction is not None
        own, taught = batch.fraction, batch.taught.fraction
        if taught is None:
            raise ConfigError("VarianceDistillation: the teacher has no learned variance, expected one")
        if self.of == "output":
            difference = 2 * (own - taught)  # v = 2 f - 1
        else:
            path = cast(DiscretePath, batch.path)
            difference = path.log_variance(own, batch.t, batch.x) - path.log_variance(
                taught, batch.t, batch.x
            )
        return batch.counted(difference).square().flatten(1).mean(1)
