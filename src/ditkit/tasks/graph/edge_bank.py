"""EdgeBank (arXiv 2207.10128): a link is predicted if it has happened before. It learns nothing and is hard to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.data.events import EventSet


class EdgeBank:
    """Memory of the links of a set.

    Args:
        seconds: how long a link is remembered; None for always.
    """

    def __init__(self, events: EventSet, seconds: float | None = None) -> None:
        self.events, self.seconds = events, seconds
        self.known = events.links(events.pairs)

    def scores(self, start: int, pairs: Tensor) -> Tensor:
        """Score pairs [P, 2] at the moment of event `start`, before it happens: 1 if remembered, else 0."""
        stop, first = self.events.before(start), 0
        if self.seconds is not None:
            now = self.events.time[min(start, len(self.events) - 1)]
            first = int(torch.searchsorted(self.events.time, now - self.seconds))
        return torch.isin(self.events.links(pairs), self.known[first:stop]).float()
