"""Events of a graph in the order of time: who met whom, when, and the windows of them that a prediction may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, unknown


class Window(NamedTuple):
    """Events in the order of time, as a prediction after the last of them may read them.

    Args:
        source, destination: [E] node ids. age: [E] float32, seconds before the last event of the window.
        features: [E, F]. node_features: [all nodes, F].
    """

    source: Tensor
    destination: Tensor
    age: Tensor
    features: Tensor
    node_features: Tensor


class Split(NamedTuple):
    """Parts of a set by time, as ranges of event indices; events at one time stamp are in one part."""

    training: range
    validation: range
    test: range


@dataclass(frozen=True, eq=False)
class EventSet:
    """All events of a graph in memory, in the order of time.

    Args:
        source, destination: int64 [E] indices of `nodes`. time: float64 [E] seconds, never falling.
        features: float32 [E, F] of the events; none unless given.
        nodes: names. node_features: float32 [N, F]; none unless given.
        labels: int64 [N] indices of `classes`, -1 where unknown.
        directed: whether (u, v) is another link than (v, u).

    Raises:
        DataError: lengths differ, times fall or are not finite, or a node does not exist.
    """

    name: str
    source: Tensor
    destination: Tensor
    time: Tensor
    nodes: tuple[str, ...]
    features: Tensor = field(default_factory=lambda: torch.zeros(0))
    node_features: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    classes: tuple[str, ...] = ()
    directed: bool = True

    def __post_init__(self) -> None:
        events, nodes = len(self.source), len(self.nodes)
        for name, nothing in (
            ("features", torch.zeros(events, 0)),
            ("node_features", torch.zeros(nodes, 0)),
            ("labels", torch.full((nodes,), -1, dtype=torch.int64)),
        ):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, nothing)
        for name, expected in (
            *((name, events) for name in ("destination", "time", "features")),
            *((name, nodes) for name in ("node_features", "labels")),
        ):
            if len(getattr(self, name)) != expected:
                raise DataError(f"{self.name}: {len(getattr(self, name))} of {name}, expected {expected}")
        if not events:
            raise DataError(f"{self.name}: no events, expected some")
        for name in ("source", "destination"):
            if wrong := _outside(getattr(self, name), nodes):
                raise DataError(
                    f"{self.name}: event {wrong[0]} has {name}={wrong[1]}, expected 0..{nodes - 1}"
                )
        if not self.time.isfinite().all():
            raise DataError(
                f"{self.name}: event {int((~self.time.isfinite()).nonzero()[0])} has no finite time"
            )
        if (falls := (self.time.diff() < 0).nonzero()).numel():
            i = int(falls[0]) + 1
            raise DataError(
                f"{self.name}: event {i} is at {self.time[i]:.15g} s, before event {i - 1} at "
                f"{self.time[i - 1]:.15g} s; expected the order of time"
            )

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def bipartite(self) -> bool:
        """True if no node is both a source and a destination."""
        return not torch.isin(self.source, self.destination).any()

    @cached_property
    def candidates(self) -> Tensor:
        """Nodes that a link may lead to: the destinations; all that occur where links have no direction."""
        if self.directed or self.bipartite:
            return self.destination.unique()
        return torch.cat([self.source, self.destination]).unique()

    def links(self, pairs: Tensor) -> Tensor:
        """Return a number for each pair of nodes [P, 2], the same for both directions where links have none: [P]."""
        if not self.directed:
            pairs = pairs.sort(-1).values
        return pairs[:, 0] * len(self.nodes) + pairs[:, 1]

    @cached_property
    def pairs(self) -> Tensor:
        """Source and destination of every event, [E, 2]."""
        return torch.stack([self.source, self.destination], 1)

    @cached_property
    def moment(self) -> Tensor:
        """Numbers of the time stamps, [E]: equal where two events are at the same time."""
        return torch.unique_consecutive(self.time, return_inverse=True)[1]

    def before(self, i: int) -> int:
        """Count the events strictly earlier than event `i`: simultaneous ones may be the target's own twins."""
        return int(torch.searchsorted(self.time, self.time[i : i + 1])) if i < len(self) else len(self)

    def window(self, i: int, size: int) -> Window:
        """Take the last `size` events, or fewer at the beginning, that are strictly earlier than event `i`.

        For `i` = number of events, the last of all: what is known before whatever comes next.

        Raises:
            DataError: nothing is earlier.
        """
        stop = self.before(i)
        if not stop:
            raise DataError(
                f"{self.name}: nothing happened before event {i}, expected an event to look back at"
            )
        part = slice(max(0, stop - size), stop)
        # differences in float64: a float32 holds seconds since 1970 to 128 s
        age = (self.time[stop - 1] - self.time[part]).float()
        return Window(self.source[part], self.destination[part], age, self.features[part], self.node_features)

    def split(self, validation: float = 0.15, test: float = 0.15) -> Split:
        """Keep the last share of the events for test and, before it, one for validation.

        Raises:
            ConfigError: a share outside (0, 1), or a part without events.
        """
        if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
            raise ConfigError(
                f"{self.name}: validation={validation} and test={test}, expected shares that leave some to train on"
            )
        first = self.before(int(len(self) * (1 - validation - test)))
        second = self.before(int(len(self) * (1 - test)))
        parts = Split(range(first), range(first, second), range(second, len(self)))
        for name, part in parts._asdict().items():
            if not part:
                raise ConfigError(
                    f"{self.name}: no {name} events of {len(self)}; expected some, give another share"
                )
        return parts

    def part(self, which: range | Tensor) -> EventSet:
        """Take these events only, of the same nodes; `which` is a range or a mask [E]."""
        index = torch.tensor(which) if isinstance(which, range) else which
        own = {name: getattr(self, name)[index] for name in ("source", "destination", "time", "features")}
        return replace(self, **own)

    def touching(self, nodes: Tensor) -> Tensor:
        """Mark the events in which one of these nodes takes part, bool [E]."""
        return torch.isin(self.source, nodes) | torch.isin(self.destination, nodes)

    def node(self, name: str) -> int:
        """Find a node's index by its name. Raises `ConfigError` for an unknown one."""
        if name not in self.nodes:
            raise ConfigError(unknown(f"node of {self.name}", name, self.nodes))
        return self.nodes.index(name)


def numbered(names: Sequence[str], known: Sequence[str]) -> tuple[Tensor, int | None]:
    """Find the indices of `names` in `known`, int64, and the position of the first that is not there, if any."""
    index = {name: i for i, name in enumerate(known)}
    found = torch.tensor([index.get(name, -1) for name in names], dtype=torch.int64)
    return found, next(iter((found < 0).nonzero().flatten().tolist()), None)


def _outside(index: Tensor, count: int) -> tuple[int, int] | None:
    """Find the first position and value of `index` outside 0..count-1."""
    wrong = ((index < 0) | (index >= count)).nonzero()
    return (int(wrong[0]), int(index[wrong[0]])) if wrong.numel() else None
