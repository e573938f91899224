"""Scores of predicted links: AP and AUC against three kinds of negatives, and the rank among destinations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.events import EventSet
from ditkit.data.negatives import KINDS, Kind, Negatives
from ditkit.metrics.links import average_precision, reciprocal_ranks, roc_auc
from ditkit.models.todyformer import Todyformer
from ditkit.tasks.graph.edge_bank import EdgeBank
from ditkit.tasks.graph.predict import answer
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


@dataclass(frozen=True)
class Drawn:
    """A predictor's scores of links and of their negatives, each [n] in the order of time.

    Args:
        positive: of the links. negative: of one negative each, by kind.
        ranks: reciprocal ranks among other destinations of the same source.
        new: whether a node that training left out takes part.
        batch: number of the look back that each link was scored after.
    """

    positive: Tensor
    negative: dict[Kind, Tensor]
    ranks: Tensor
    new: Tensor
    batch: Tensor


def drawn_scores(
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
) -> Drawn:
    """Score a predictor on the links of some events; with the same seed every predictor meets the same negatives.

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
    parts = [torch.tensor(targets[i : i + batch]) for i in range(0, len(targets), batch)]
    drawers = {kind: Negatives(events, kind, known) for kind in kinds}
    ranking = Negatives(events, "random")
    positive: list[Tensor] = []
    ranks: list[Tensor] = []
    negative: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    for part in parts:
        start, n = int(part[0]), len(part)
        others = ranking.rivals(part, rivals, generator(seed, start, len(KINDS)))
        drawn = [one.draw(part, generator(seed, start, KINDS.index(kind))) for kind, one in drawers.items()]
        versus = torch.stack([events.source[part].repeat_interleave(rivals), others.flatten()], 1)
        scores = predict(start, torch.cat([events.pairs[part], versus, *drawn])).float().cpu()
        of_links, of_rivals, *of_drawn = scores.split([n, n * rivals, *(n for _ in drawn)])
        positive.append(of_links)
        ranks.append(reciprocal_ranks(of_links, of_rivals.view(n, rivals)))
        for kind, own in zip(kinds, of_drawn, strict=True):
            negative[kind].append(own)
    index = torch.cat(parts)
    return Drawn(
        positive=torch.cat(positive),
        negative={kind: torch.cat(own) for kind, own in negative.items()},
        ranks=torch.cat(ranks),
        new=torch.zeros_like(index).bool() if unmet is None else events.touching(unmet)[index],
        batch=(index - targets.start) // batch,
    )


def link_scores(
    predict: Predictor, events: EventSet, targets: range, **protocol: Any
) -> dict[Kind, LinkScore]:
    """Summarise `drawn_scores`, whose arguments these are, by kind of negatives."""
    drawn = drawn_scores(predict, events, targets, **protocol)
    return {kind: _score(drawn, own) for kind, own in drawn.negative.items()}


def _score(drawn: Drawn, negative: Tensor) -> LinkScore:
    def measured(measure: Callable[[Tensor, Tensor], float], part: Tensor) -> float:
        both = torch.cat([drawn.positive[part], negative[part]])
        return measure(both, torch.arange(len(both)) < len(both) // 2)

    every = torch.ones_like(drawn.new)
    return LinkScore(
        ap=measured(average_precision, every),
        auc=measured(roc_auc, every),
        mrr=drawn.ranks.mean().item(),
        links=len(drawn.positive),
        new_ap=measured(average_precision, drawn.new) if drawn.new.any() else float("nan"),
        new_links=int(drawn.new.sum()),
    )


def score_links(
    model: Todyformer,
    events: EventSet,
    targets: range,
    *,
    known: int = 0,
    unmet: Tensor | None = None,
    batch: int = 200,
    rivals: int = 20,
    seed: int = 0,
) -> list[dict[str, str | float]]:
    """Make a row for the model and for EdgeBank on each kind of negatives, of the same links and negatives.

    Args:
        known, unmet, batch, rivals, seed: as of `link_scores`.

    Raises:
        ConfigError: the model predicts classes.
        DataError: those of `link_scores`.
    """
    if model.config.classes:
        raise ConfigError(
            f"the model predicts {model.config.classes} classes of nodes, expected one of links"
        )
    predictors: dict[str, Predictor] = {
        type(model).__name__: partial(answer, model, events),
        "EdgeBank": EdgeBank(events).scores,
    }
    protocol = {"batch": batch, "known": known, "unmet": unmet, "rivals": rivals, "seed": seed}
    return [
        {"predictor": name, "negatives": kind, **asdict(score)}
        for name, predict in predictors.items()
        for kind, score in link_scores(predict, events, targets, **protocol).items()
    ]


def node_scores(
    model: Todyformer, events: EventSet, targets: range, *, nodes: Tensor | None = None, batch: int = 200
) -> dict[str, float]:
    """Measure how often a model of classes is right about the nodes of some events, and about each by majority.

    Args:
        nodes: that count, such as those held out of training; all unless given.

    Raises:
        ConfigError: the model predicts links, or other classes.
        DataError: no node that counts takes part.
    """
    if model.config.classes != len(events.classes) or not model.config.classes:
        predicted = f"{model.config.classes} classes" if model.config.classes else "links"
        raise ConfigError(
            f"the model predicts {predicted}, expected a model of classes, {len(events.classes)} of them"
        )
    votes = torch.zeros(len(events.nodes), model.config.classes)
    for first in range(targets.start, targets.stop, batch):
        part = events.pairs[first : min(first + batch, targets.stop)].flatten()
        part = part[events.labels[part] >= 0]
        if nodes is not None:
            part = part[torch.isin(part, nodes)]
        if len(part):
            found = answer(model, events, first, part).argmax(-1)
            votes.index_put_((part, found), torch.ones(len(part)), accumulate=True)
    met = votes.sum(1) > 0
    if not met.any():
        raise DataError(
            f"{events.name}: no node with a class takes part in events {targets.start}..{targets.stop - 1}"
        )
    right = votes[met].gather(1, events.labels[met][:, None])
    return {
        "accuracy": (right.sum() / votes.sum()).item(),
        "accuracy_by_node": (votes[met].argmax(1) == events.labels[met]).float().mean().item(),
        "nodes": int(met.sum()),
        "answers": int(votes.sum()),
    }
