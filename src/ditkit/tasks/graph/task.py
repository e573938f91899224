"""A trained graph model in use: the links that come next, and how well it does on the last events."""

from __future__ import annotations

import torch

from ditkit.core.errors import ConfigError
from ditkit.data.events import EventSet
from ditkit.models.todyformer import Todyformer
from ditkit.tasks.graph.predict import answer
from ditkit.tasks.graph.recipe import hidden_nodes
from ditkit.tasks.graph.scores import node_scores, score_links


def predicted_links(
    model: Todyformer, events: EventSet, source: str, *, after: int | None = None, count: int = 10
) -> list[tuple[str, float]]:
    """Predict the likeliest next destinations of a node, with probabilities against a random one; the likeliest first.

    Args:
        source: the node's name.
        after: events that are known; all unless given.

    Raises:
        ConfigError: an unknown node, or a model of classes.
        ShapeError: events with other features than the model was trained on.
        DataError: fewer events than patches.
    """
    if model.config.classes:
        raise ConfigError(
            f"the model predicts {model.config.classes} classes of nodes, expected one of links"
        )
    node = events.node(source)
    others = events.candidates[events.candidates != node]
    pairs = torch.stack([torch.full_like(others, node), others], 1)
    odds = answer(model, events, len(events) if after is None else after, pairs).sigmoid()
    best = odds.argsort(descending=True, stable=True)[:count]
    return [(events.nodes[others[i]], odds[i].item()) for i in best.tolist()]


def evaluate(
    model: Todyformer,
    events: EventSet,
    *,
    validation: float = 0.15,
    test: float = 0.15,
    hidden: float = 0.1,
    batch: int = 200,
    seed: int = 0,
) -> list[dict[str, str | float]]:
    """Make rows on the test events: of a model of links beside EdgeBank, or of one of classes on the held-out nodes.

    Args:
        validation, test, hidden, seed: as the model was trained.
        batch: events that share one look back, as in training.

    Raises:
        ConfigError, DataError: the shares or the model do not fit the events.
    """
    parts = events.split(validation, test)
    unmet = hidden_nodes(events, parts, hidden, seed)
    if model.config.classes:
        known = node_scores(model, events, parts.test, batch=batch)
        return [
            {"nodes_are": "all", **known},
            {"nodes_are": "held out", **node_scores(model, events, parts.test, nodes=unmet, batch=batch)},
        ]
    return score_links(
        model, events, parts.test, known=parts.training.stop, unmet=unmet, batch=batch, seed=seed
    )
