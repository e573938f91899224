"""The diffusion prior of Switch-DiT (arXiv 2403.09176): near noise-times share experts, far ones less.

B batch, T tasks, N blocks, M experts a block, k active, S = N M slots.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from zlib import crc32

import torch
from annotated_types import Gt
from torch import Tensor

from ditkit.core.model import Model
from ditkit.core.run import Site, named
from ditkit.nn.experts import choices
from ditkit.nn.task_windows import TASKS, prior, tasks_of
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.randomness import TERMS, generator
from ditkit.train.schedules import Weight

EPSILON = 1e-6
"""Added inside logarithms; so two distributions that are disjoint are 0.693146 apart, not ln 2."""


@dataclass(frozen=True)
class DiffusionPrior(Term):
    """mean over the batch of JSD(P(t) || Pi(t) in the order of the matching) (section 3.3).

    P(t) is the mean of the blocks' probabilities over S slots. Row t of the prior Pi has N k ones, a window that slides
    over the slots as (t / 999)^alpha. Which slot of the prior is which of the network's is decided anew at each step:
    the assignment of least sum over all tasks of |Q - Pi|, Q the experts that are chosen. It carries no gradient.
    """

    weight: Weight = 1.0
    alpha: Annotated[float, Gt(0)] = 4.0

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return named(sites, "route")

    def check(self, model: Model) -> str:
        experts = getattr(model.config, "experts", 0)
        if len(self.taps(model.sites())) != 1 or not experts:
            return f"experts that are routed by noise-time, as a SwitchDiT has; got a {type(model).__name__}"
        depth = len(named(model.sites(), "block"))
        if (slots := depth * experts) > TASKS:
            return f"no more slots than the {TASKS} tasks, got {depth} blocks x experts={experts} = {slots}"
        if importlib.util.find_spec("scipy") is None:
            return "the package scipy: pip install 'ditkit[train]'"
        return ""

    def loss(self, batch: NoisyBatch) -> Tensor:
        (routes,) = batch.taps.values()
        _, N, M = routes.p.shape
        path = batch.convention.path
        chosen = choices(routes.tasks(), routes.active).flatten(1)
        every = torch.arange(1, TASKS + 1, device=chosen.device) / TASKS
        table = prior(tasks_of(path, every), N, M, routes.active, self.alpha)
        order = matched(chosen, table, *self.orders(batch, N * M))
        own = tasks_of(path, batch.path.noise_time(batch.t))
        wanted = prior(own, N, M, routes.active, self.alpha)[:, order]
        return divergence(routes.p.flatten(1) / N, wanted / wanted.sum(1, keepdim=True))

    def orders(self, batch: NoisyBatch, slots: int) -> tuple[Tensor, Tensor]:
        """Draw two orders of the slots, [S] each, which break ties of the matching; the same on all processes."""
        key = (batch.rng.seed, TERMS + crc32(b"DiffusionPrior"), batch.rng.step) if batch.rng else (0,)
        g = generator(*key)
        first, second = (torch.randperm(slots, generator=g) for _ in range(2))
        return first, second


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of distributions [B, S], in nats, [B].

    It is (KL(a || m) + KL(b || m)) / 2, m = (a + b) / 2.
    """
    middle = ((a + b) / 2 + EPSILON).log()
    own, other = a * ((a + EPSILON).log() - middle), b * ((b + EPSILON).log() - middle)
    return (own + other).sum(1) / 2


def matched(chosen: Tensor, table: Tensor, *orders: Tensor) -> Tensor:
    """Return the prior's slot for each of the network's, [S], by the assignment of least cost over the tasks.

    Args:
        chosen, table: bool [T, S]. orders: in which the slots of each are given to the solver.
    """
    from scipy.optimize import linear_sum_assignment

    cost = costs(chosen, table)
    rows, columns = orders or (torch.arange(len(cost)),) * 2
    _, found = linear_sum_assignment(cost[rows][:, columns].numpy())
    order = torch.empty_like(rows)
    order[rows] = columns[torch.from_numpy(found)]
    return order.to(chosen.device)


def costs(chosen: Tensor, table: Tensor) -> Tensor:
    """Count the tasks in which two slots differ, [S, S] on the CPU: sum_t |Q_ti - Pi_tj|."""
    q, pi = (
        chosen.double().cpu(),
        table.double().cpu(),
    )  # float64, which autocast leaves alone: counts are exact
    return q.sum(0)[:, None] + pi.sum(0) - 2 * q.mT @ pi
