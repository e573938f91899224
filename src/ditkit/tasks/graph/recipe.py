"""Training on the events of a graph: which links come next, or of which class the nodes are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.model import Model
from ditkit.data.events import EventSet, Split
from ditkit.data.loading import load_events
from ditkit.data.negatives import Negatives
from ditkit.models.todyformer import TodyformerConfig
from ditkit.nn.patches import COUNTS, Patches
from ditkit.tasks.graph.figures import write_classes, write_links
from ditkit.tasks.graph.predict import patches_before
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.train.graph_targets import GraphTargets, Targets
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG, generator

TARGETS = GraphTargets()


class EventTargets:
    """Events as training samples, in the order of time: those with enough earlier ones to fill the patches.

    Args:
        events: of training. whole: the set that they are a part of.
        window, patches, neighbours: of the model.

    Raises:
        DataError: no event has so many earlier ones.
    """

    def __init__(
        self,
        events: EventSet,
        window: int,
        patches: int,
        neighbours: int = 0,
        whole: EventSet | None = None,
    ) -> None:
        self.whole = events if whole is None else whole
        self.events, self.window, self.patches, self.neighbours = events, window, patches, neighbours
        earlier = torch.searchsorted(events.time, events.time)
        self.first = int((earlier < patches).sum())
        if self.first == len(events):
            raise DataError(
                f"{events.name}: {len(events)} events, none with {patches} earlier ones, which patches={patches} need"
            )

    def __len__(self) -> int:
        return len(self.events) - self.first

    def before(self, targets: Tensor) -> Patches:
        """Cut the patches that targets [n] share: those before the first of them."""
        return patches_before(self.events, int(targets[0]), self.window, self.patches, self.neighbours)


class LinkTargets(EventTargets):
    """The links of a batch of events, and one random negative for each."""

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Targets, Cond]:
        targets = indices + self.first
        # negatives are drawn for the batch, whose moments decide what is one
        negative = Negatives(self.events, "random").draw(targets, next(rng.of_data()))
        ids = torch.cat([self.events.pairs[targets], negative])
        labels = (torch.arange(len(ids)) < len(targets)).long()
        return Targets(self.before(targets), ids, labels), Cond()


class NodeTargets(EventTargets):
    """The classes of both ends of a batch of events; those of nodes held out count as unknown."""

    def __init__(
        self,
        events: EventSet,
        window: int,
        patches: int,
        neighbours: int = 0,
        whole: EventSet | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        super().__init__(events, window, patches, neighbours, whole)
        self.labels = events.labels if held_out is None else events.labels.index_fill(0, held_out, -1)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Targets, Cond]:
        targets = indices + self.first
        ids = self.events.pairs[targets].flatten()
        return Targets(self.before(targets), ids, self.labels[ids]), Cond()


def hidden_nodes(events: EventSet, parts: Split, share: float, seed: int) -> Tensor:
    """Draw nodes [n] that training is never to meet: `share` of all, of those that take part after training."""
    later = events.pairs[parts.validation.start :].unique()
    drawn = torch.randperm(len(later), generator=generator(seed, len(events)))[
        : int(share * len(events.nodes))
    ]
    return later[drawn].sort().values


@dataclass(frozen=True, kw_only=True)
class GraphRecipe(Recipe):
    """A model of events, trained on the first of them.

    Args:
        data: a named set of events, or an event list in CSV or Parquet.
        model: its numbers of features are taken from the data.
        validation, test: shares of the events, the last ones, that are not trained on.
        hidden: share of the nodes that are not trained on: their events are left out, or their classes.
    """

    sources: ClassVar[str] = "A named set of events (school, flights), or an event list in CSV or Parquet."
    then: ClassVar[str] = "ditkit evaluate"
    then_data: ClassVar[bool] = True
    one_forward: ClassVar[bool] = True
    task: ClassVar[str] = "graph"
    model: TodyformerConfig
    objective: Objective = TARGETS
    validation: float = 0.15
    test: float = 0.15
    hidden: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hidden < 1:
            raise ConfigError(f"hidden={self.hidden} should be a share of the nodes, 0 or more and below 1")

    def fitted(self, events: EventSet) -> TodyformerConfig:
        """Complete the config with what the events decide."""
        return replace(
            self.model, features=events.features.shape[1], node_features=events.node_features.shape[1]
        )

    def example(self, model: Model) -> tuple[Any, ...]:
        """Make a window in which every node occurs in every patch, and a batch of targets; on the meta device."""
        config = self.model
        events, count = config.window, config.patches
        nodes = max(events // count, 2)
        tokens = nodes * count
        index = torch.zeros(2 * events, dtype=torch.int64)
        patches = Patches(
            nodes=torch.arange(nodes),
            node=torch.arange(tokens) // count,
            patch=torch.arange(tokens) % count,
            receiver=index,
            sender=index,
            event=index,
            age=torch.zeros(events),
            features=torch.zeros(events, config.features),
            structure=torch.zeros(2 * events, COUNTS),
            stamp=torch.zeros(count),
            last=torch.arange(nodes) * count,
            node_features=torch.zeros(nodes, config.node_features),
        )
        targets = 2 * self.settings.batch  # links and negatives, or both ends of events
        ids = torch.zeros((targets,) if config.classes else (targets, 2), dtype=torch.int64)
        return patches.to("meta"), ids.to("meta")

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, EventTargets)
        events = samples.whole
        return f"{len(events):,} events of {len(events.nodes)} nodes, {len(samples.events):,} to train on"


@dataclass(frozen=True, kw_only=True)
class LinkRecipe(GraphRecipe):
    """The links that come next."""

    def prepared(self) -> Prepared:
        events = load_events(self.data, **self.loading)
        parts = events.split(self.validation, self.test)
        training = events.part(parts.training)
        met = ~training.touching(hidden_nodes(events, parts, self.hidden, self.settings.seed))
        if not met.any():
            raise DataError(
                f"{events.name}: hidden={self.hidden} of the nodes take part in every event of training"
            )
        model = self.fitted(events)
        samples = LinkTargets(training.part(met), model.window, model.patches, model.neighbours, events)
        return Prepared(replace(self, model=model), samples)

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, EventTargets)
        span = samples.whole.split(self.validation, self.test).validation
        return partial(write_links, folder, samples.whole, span)


@dataclass(frozen=True, kw_only=True)
class NodeRecipe(GraphRecipe):
    """The classes of nodes, from what they do; a share of the nodes is held out."""

    def prepared(self) -> Prepared:
        events = load_events(self.data, **self.loading)
        if not events.classes:
            raise ConfigError(
                f"{self.data}: nodes without classes; expected some, see source_label= or nodes="
            )
        parts = events.split(self.validation, self.test)
        held = hidden_nodes(events, parts, self.hidden, self.settings.seed)
        model = replace(self.fitted(events), classes=len(events.classes))
        training = events.part(parts.training)
        samples = NodeTargets(training, model.window, model.patches, model.neighbours, events, held)
        return Prepared(replace(self, model=model), samples)

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, EventTargets)
        span = samples.whole.split(self.validation, self.test).validation
        return partial(write_classes, folder, samples.whole, span)
