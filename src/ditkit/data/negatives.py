"""Links that did not happen, to tell those apart that did: random, historical and inductive (arXiv 2207.10128).

Drawn for a batch of targets, which are events that follow one another. They may know what happens at the moments of
the targets, so as not to draw it; a model never does.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.events import EventSet

Kind = Literal["random", "historical", "inductive"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRIES = 200


class Negatives:
    """One kind of negatives of a set.

    "random" keeps a target's source and draws another destination. "historical" draws links that happened before the
    batch and not during it; "inductive" those of them that had not happened in the first `known` events. Where there
    are fewer than targets, the rest is random (DyGLib's protocol).

    Raises:
        ConfigError: an unknown kind.
    """

    def __init__(self, events: EventSet, kind: Kind, known: int = 0) -> None:
        if kind not in KINDS:
            raise ConfigError(unknown("negatives", kind, KINDS))
        self.events, self.kind, self.known = events, kind, known

    def draw(self, targets: Tensor, generator: Generator) -> Tensor:
        """Draw one negative for each target, [n, 2] sources and destinations.

        Args:
            targets: [n] indices of events, ascending.

        Raises:
            DataError: a target's source meets every possible destination at that moment.
        """
        if self.kind == "random":
            return self._random(targets, generator)
        pool = self._pool(targets)
        chosen = pool[torch.randperm(len(pool), generator=generator)[: len(targets)]]
        return torch.cat([chosen, self._random(targets[len(chosen) :], generator)])

    def rivals(self, targets: Tensor, count: int, generator: Generator) -> Tensor:
        """Draw other destinations of each target's source, [n, count]: half of them met before, where so many were."""
        start = self.events.before(int(targets[0]))
        met, nodes = self._directions(torch.arange(start)).unique(), len(self.events.nodes)
        drawn = self._random(targets.repeat_interleave(count), generator)[:, 1].view(-1, count)
        for row, target in enumerate(targets.tolist()):
            source = int(self.events.source[target])
            first, stop = torch.searchsorted(
                met, torch.tensor([source * nodes, (source + 1) * nodes])
            ).tolist()
            own = met[first:stop] % nodes
            own = own[~self._happens(torch.full_like(own, source), own, self.events.moment[target])]
            chosen = own[torch.randperm(len(own), generator=generator)[: count // 2]]
            drawn[row, : len(chosen)] = chosen
        return drawn

    def _random(self, targets: Tensor, generator: Generator) -> Tensor:
        """Draw destinations, again until none is the source, or an event of the target's own moment."""
        candidates, source, moment = (
            self.events.candidates,
            self.events.source[targets],
            self.events.moment[targets],
        )
        drawn = torch.full_like(source, -1)
        left = torch.arange(len(targets))
        for _ in range(TRIES):
            drawn[left] = candidates[torch.randint(len(candidates), (len(left),), generator=generator)]
            wrong = (drawn[left] == source[left]) | self._happens(source[left], drawn[left], moment[left])
            left = left[wrong]
            if not len(left):
                return torch.stack([source, drawn], 1)
        busy = self.events.nodes[int(source[left[0]])]
        raise DataError(
            f"{self.events.name}: {busy} meets every possible destination at that moment; no negative is left"
        )

    def _pool(self, targets: Tensor) -> Tensor:
        """List the links [P, 2] that a historical or inductive negative may be."""
        events, nodes = self.events, len(self.events.nodes)
        start = events.before(int(targets[0]))
        stop = int(torch.searchsorted(events.time, events.time[targets[-1:]], right=True))
        links = events.links(events.pairs)
        pool = links[:start].unique()
        unwanted = [links[start:stop]]
        if self.kind == "inductive":
            unwanted.append(links[: self.known])
        pool = pool[~torch.isin(pool, torch.cat(unwanted))]
        return torch.stack([pool // nodes, pool % nodes], 1)

    def _happens(self, source: Tensor, destination: Tensor, moment: Tensor) -> Tensor:
        """Tell whether each link is an event of that moment."""
        key = moment * len(self.events.nodes) ** 2 + self.events.links(torch.stack([source, destination], 1))
        index = torch.searchsorted(self._moments, key).clamp_max(len(self._moments) - 1)
        return self._moments[index] == key

    @cached_property
    def _moments(self) -> Tensor:
        """Every event as one number of its moment and its link, sorted."""
        links = self.events.links(self.events.pairs)
        return (self.events.moment * len(self.events.nodes) ** 2 + links).sort().values

    def _directions(self, index: Tensor) -> Tensor:
        """Return source * nodes + destination of these events; of both directions where links have no direction."""
        pairs, nodes = self.events.pairs[index], len(self.events.nodes)
        both = [pairs] if self.events.directed else [pairs, pairs.flip(1)]
        return torch.cat([pair[:, 0] * nodes + pair[:, 1] for pair in both])
