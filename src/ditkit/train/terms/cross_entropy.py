"""Cross-entropy of what a network says of each target: of a link, that it happens; of a node, its class."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight

UNKNOWN = -1
"""Class of a target that does not count."""


@dataclass(frozen=True)
class CrossEntropy(Term):
    """-log p(label): of logits [B] and labels 0 or 1, or of logits [B, classes] and classes, UNKNOWN ones left out.

    The mean over the batch is that over the targets that count.
    """

    weight: Weight = 1.0

    def loss(self, batch: Batch) -> Tensor:
        logits, labels = batch.prediction, batch.data
        if logits.ndim == 1:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        counted = (labels != UNKNOWN).sum().clamp_min(1)
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=UNKNOWN) * (
            len(labels) / counted
        )
