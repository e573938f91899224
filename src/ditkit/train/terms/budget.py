"""The budget of a model whose routes are learned (DyDiT++, arXiv 2504.06803)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from ditkit.core.config import Count, Natural
from ditkit.core.model import Model
from ditkit.core.run import Site, named
from ditkit.nn.routes import Route, routed_blocks
from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class Budget(Term):
    """(rho - target)^2, of rho the mean over the whole batch of the share of the blocks' MACs that is computed.

    rho_b = sum over blocks of mean(heads) attn + mean(groups) mean(tokens) mlp, over the sum of attn + mlp, with
    attn = 4 L D^2 + 2 L^2 D and mlp = 8 L D^2. Times are to be stratified over the batch, which then stands for a
    trajectory.

    Args:
        weight: the paper's lambda.
        target: of rho at last.
        warmup: steps in which the target falls from 1 in a straight line.
        hold: steps at first whose target is 1 all the same, as in the published script: then it jumps onto the line.
    """

    pools: ClassVar[bool] = True
    weight: Weight = 2.0
    target: Annotated[float, Interval(gt=0, le=1)] = 0.5
    warmup: Count = 1000
    hold: Natural = 100

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [name for route in named(sites, "choice") for name in (route, route + ":in")]

    def check(self, model: Model) -> str:
        sites = model.sites()
        routes = set(named(sites, "choice"))
        owned = any(
            routes & {n for n, how in p.claims(sites).items() if how == "own"}
            and p.modules(sites) is not None
            for p in model.policies
        )
        return "" if routes and owned else "a policy that learns routes, such as DyDiT"

    def target_at(self, step: int) -> float:
        """Return the target at a step of the optimiser, from 0."""
        if step < self.hold:
            return 1.0
        return 1.0 + (self.target - 1.0) * min(step / self.warmup, 1.0)

    def loss(self, batch: Batch) -> Tensor:
        share = batch.pooled(work_share(batch))
        return (share - self.target_at(batch.step)).square().expand(len(batch.data))


def work_share(batch: Batch) -> Tensor:
    """Return rho of each sample [B], from what the `choice` sites said."""
    done: list[Tensor] = []
    whole = 0
    for block in routed_blocks(batch.sites):
        attn, mlp = block.work(batch.taps[block.attn.name + ":in"].shape[1])
        done += [
            attn * kept(batch, batch.taps[block.attn.name]),
            mlp * kept(batch, batch.taps[block.mlp.name]),
        ]
        whole += attn + mlp
    return torch.stack(done).sum(0) / whole


def kept(batch: Batch, route: Route | None) -> Tensor:
    """Return the share of a branch that its route leaves, of each sample [B]."""
    share = batch.data.new_ones(len(batch.data))
    masks = () if route is None else (route.group_mask, route.row_mask)
    for mask in masks:
        share = share if mask is None else share * mask.to(share.dtype).flatten(1).mean(1)
    return share
