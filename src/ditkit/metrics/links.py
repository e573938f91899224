"""Measures of predicted links: average precision, area under the ROC curve, reciprocal rank; all with ties."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.core.errors import DataError


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Measure the area under precision over recall, in steps; equal scores are one step.

    Raises:
        DataError: a score is not finite.
    """
    from torchmetrics.functional.classification import binary_average_precision

    return binary_average_precision(_order(scores), labels.long()).item()


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Measure the share of pairs of a positive and a negative in the right order, ties half.

    Raises:
        DataError: a score is not finite.
    """
    from torchmetrics.functional.classification import binary_auroc

    return binary_auroc(_order(scores), labels.long()).item()


def mean_reciprocal_rank(positive: Tensor, rivals: Tensor) -> float:
    """Average `reciprocal_ranks` of the scores of links [n] and of their rivals [n, K]."""
    return reciprocal_ranks(positive, rivals).mean().item()


def reciprocal_ranks(positive: Tensor, rivals: Tensor) -> Tensor:
    """Compute 1 / (1 + rivals above + half of the equal ones), [n]: the middle of the best and the worst rank (TGB)."""
    above = (rivals > positive[:, None]).sum(1)
    equal = (rivals == positive[:, None]).sum(1)
    return 1 / (1 + above + 0.5 * equal)


def _order(scores: Tensor) -> Tensor:
    """Put scores evenly in [0, 1] by their order: torchmetrics would take a sigmoid, in which far ones become equal."""
    if broken := int((~scores.isfinite()).sum()):
        raise DataError(f"{broken} of {len(scores)} scores is not finite, expected numbers")
    order = torch.unique(scores, return_inverse=True)[1]
    return order.double() / max(int(order.max()), 1)
