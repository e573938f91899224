"""How well links are predicted: AP and AUC against three kinds of negatives, and the rank among other destinations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import DataError
from ditkit.data.events import EventSet
from ditkit.data.negatives import KINDS, Kind, Negatives
from ditkit.train.randomness import generator

Predictor = Callable[[int, Tensor], Tensor]
"""Scores [P] of pairs [P, 2], from what is strictly earlier than the event of that index."""


@dataclass(frozen=True)
class LinkScore:
    """Scores of one kind of negatives; NaN where a part has no links.

    Args:
        ap, auc: with one negative a link, over all of them at once.
        mrr: mean reciprocal rank among other destinations of the same source.
        links: positives. new_ap: AP on links of nodes never met in training, of which there are `new_links`.
    """

    ap: float
    auc: float
    mrr: float
    links: int
    new_ap: float = float("nan")
    new_links: int = 0


def link_scores(
    predict: Predictor,
    events: EventSet,
    targets: range,
    *,
    batch: int = 200,
    kinds: Sequence[Kind] = KINDS,
    known: int = 0,
    unmet: Tensor | None = None,
    rivals: int = 20,
    seed: int = 0,
) -> dict[str, LinkScore]:
    """Scores of a predictor on the links of some events, by kind of negatives; every predictor meets the same ones.

    Args:
        batch: events that share one look back: the later ones do not know the earlier. It is part of the protocol.
        known: events of training, which tell an inductive negative from a historical one.
        unmet: [n] nodes that training left out.
        rivals: other destinations that a link is ranked among.

    Raises:
        DataError: no target, or a score that is not finite.
    """
    if not targets:
        raise DataError(f"{events.name}: no links to be scored, expected some")
    new = torch.zeros(len(events), dtype=torch.bool) if unmet is None else events.touching(unmet)
    parts = [torch.tensor(targets[i : i + batch]) for i in range(0, len(targets), batch)]
    drawers = {kind: Negatives(events, kind, known) for kind in kinds}
    ranking = Negatives(events, "random")
    positive: list[Tensor] = []
    ranks: list[Tensor] = []
    negative: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for part in parts:
        start, n = int(part[0]), len(part)
        others = ranking.rivals(part, rivals, generator(seed, start, len(KINDS)))
        drawn = {
            kind: one.draw(part, generator(seed, start, KINDS.index(kind))) for kind, one in drawers.items()
        }
        versus = torch.stack([events.source[part].repeat_interleave(rivals), others.flatten()], 1)
        scores = predict(start, torch.cat([events.pairs[part], versus, *drawn.values()])).float().cpu()
        of_links, of_rivals, *of_drawn = scores.split([n, n * rivals, *(n for _ in drawn)])
        positive.append(of_links)
        ranks.append(reciprocal_ranks(of_links, of_rivals.view(n, rivals)))
        for kind, own in zip(drawn, of_drawn, strict=True):
            negative[kind].append(own)
    where = new[torch.cat(parts)]
    return {
        kind: _score(torch.cat(positive), torch.cat(negative[kind]), torch.cat(ranks), where)
        for kind in kinds
    }


def _score(positive: Tensor, negative: Tensor, ranks: Tensor, new: Tensor) -> LinkScore:
    """The links' scores, those of their negatives, their reciprocal ranks, and which are of new nodes; all [n]."""
    both = torch.cat([positive, negative]), torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
    of_new = float("nan")
    if new.any():
        own = torch.cat([positive[new], negative[new]])
        of_new = average_precision(own, torch.arange(len(own)) < len(own) // 2)
    return LinkScore(
        ap=average_precision(*both),
        auc=roc_auc(*both),
        mrr=ranks.mean().item(),
        links=len(positive),
        new_ap=of_new,
        new_links=int(new.sum()),
    )


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Area under precision over recall, in steps; equal scores are one step.

    Raises:
        DataError: a score is not finite.
    """
    from torchmetrics.functional.classification import binary_average_precision

    return binary_average_precision(_order(scores), labels.long()).item()


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """The share of pairs of a positive and a negative in the right order, ties half.

    Raises:
        DataError: a score is not finite.
    """
    from torchmetrics.functional.classification import binary_auroc

    return binary_auroc(_order(scores), labels.long()).item()


def mean_reciprocal_rank(positive: Tensor, rivals: Tensor) -> float:
    """Mean of `reciprocal_ranks`: scores of links [n] and of their rivals [n, K]."""
    return reciprocal_ranks(positive, rivals).mean().item()


def reciprocal_ranks(positive: Tensor, rivals: Tensor) -> Tensor:
    """1 / (1 + rivals above + half of the equal ones), [n]: the middle of the best and the worst rank, as TGB has it."""
    above = (rivals > positive[:, None]).sum(1)
    equal = (rivals == positive[:, None]).sum(1)
    return 1 / (1 + above + 0.5 * equal)


def _order(scores: Tensor) -> Tensor:
    """Scores as their order, evenly in [0, 1]: torchmetrics would take a sigmoid, in which far ones become equal."""
    if broken := int((~scores.isfinite()).sum()):
        raise DataError(f"{broken} of {len(scores)} scores is not finite, expected numbers")
    order = torch.unique(scores, return_inverse=True)[1]
    return order.double() / max(int(order.max()), 1)
