"""The use of experts over noise-time: shares of tasks, and how many two tasks have in common, against the prior.

T tasks, N blocks, M experts a block, k active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.run import named
from ditkit.core.terminal import Table
from ditkit.nn.experts import choices
from ditkit.nn.task_windows import TASKS, prior, tasks_of

SHARED = 0.95
"""An expert that more than this share of all tasks choose is shared."""


@dataclass(frozen=True)
class ExpertUse:
    """The experts that each task chooses.

    Args:
        p: [T, N, M], probabilities; task 0 is the cleanest. active: k.
        wanted: bool [T, N M], the prior's window of each task.
    """

    p: Tensor
    active: int
    wanted: Tensor

    @property
    def chosen(self) -> Tensor:
        """Q, bool [T, N, M]."""
        return choices(self.p, self.active)

    @property
    def shares(self) -> Tensor:
        """Shares of the tasks that choose an expert, [N, M]."""
        return self.chosen.double().mean(0)

    @property
    def shared(self) -> int:
        """Blocks with an expert that more than `SHARED` of the tasks choose."""
        return int((self.shares.amax(1) > SHARED).sum())

    @property
    def near(self) -> float:
        """The share of their experts that a task and the next have in common, on average."""
        q = self.chosen.flatten(1)
        return (q[1:] & q[:-1]).sum(1).double().mean().item() / int(q[0].sum())

    @property
    def overlap(self) -> Tensor:
        """Q Q^T, [T, T]: how many experts two tasks have in common."""
        return _in_common(self.chosen.flatten(1))

    @property
    def wanted_overlap(self) -> Tensor:
        """Pi Pi^T of the prior, [T, T]."""
        return _in_common(self.wanted)

    @property
    def likeness(self) -> float:
        """The correlation of the entries of Q Q^T with those of Pi Pi^T; 0 where all tasks choose alike."""
        pairs = torch.stack([self.overlap.flatten(), self.wanted_overlap.flatten()])
        return torch.corrcoef(pairs)[0, 1].nan_to_num().item()

    def table(self) -> Table:
        """Return a row a block: the share of noise-times that choose each expert, and the gate when chosen."""
        experts = self.p.shape[2]
        shown = Table(
            "block", *(f"expert {m + 1}" for m in range(experts)), title="share of noise-times, mean gate"
        )
        gates = (self.p * self.chosen).sum(0) / self.chosen.sum(0).clamp_min(1)
        for i, (shares, own) in enumerate(zip(self.shares, gates, strict=True)):
            cells = (f"{s:.0%}  {g:.2f}" if s else "never" for s, g in zip(shares, own, strict=True))
            shown.add_row(str(i), *cells)
        return shown

    def remarks(self) -> list[str]:
        """Say in lines what the table does not."""
        return [
            f"a noise-time and the next share {self.near:.1%} of their experts",
            f"{self.shared} of {len(self.shares)} blocks have an expert that over {SHARED:.0%} of noise-times choose",
            f"correlation of the overlaps of noise-times with the prior's: {self.likeness:.3f}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            "shares": self.shares.tolist(),
            "near": self.near,
            "shared_blocks": self.shared,
            "likeness": self.likeness,
        }


def use_of(model: Model, alpha: float = 4.0) -> ExpertUse:
    """Ask a model which experts all noise-times choose.

    Args:
        alpha: of the prior that it is compared with.

    Raises:
        ConfigError: its blocks have no experts that are routed by noise-time.
    """
    given: Any = model
    if not named(model.sites(), "route") or not hasattr(model, "task_probabilities"):
        raise ConfigError(
            f"a {type(model).__name__} has no experts, expected a model with experts that are routed by noise-time: a "
            "SwitchDiT"
        )
    p = given.task_probabilities()
    active, (_, depth, experts) = given.config.active, p.shape
    tasks = tasks_of(given.config.convention.path, torch.arange(1, TASKS + 1) / TASKS)
    return ExpertUse(p.cpu(), active, prior(tasks, depth, experts, active, alpha))


def _in_common(rows: Tensor) -> Tensor:
    """Count for each two rows of bool [T, S] what both have, [T, T]."""
    numbers = rows.float()
    return numbers @ numbers.mT
