"""Re-ttention: a static mask keeps what it would lose by statistics of a few dense evaluations (arXiv 2505.22918).

B batch, N heads, S rows in the order of a plan, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditkit.attention.band import Band
from ditkit.attention.grouped import Grouped
from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.attention.pattern import Pattern, SequencePlan, Sparse
from ditkit.core.config import Count, Finite, Natural
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid
from ditkit.core.policy import Key
from ditkit.core.run import Call, Site
from ditkit.ops.block_sparse_attention import BlockPlan, dense_plan
from ditkit.ops.block_sparse_attention.reference import finite

Residual = Literal["model", "bfloat16", "none"]
Mode = Literal["dense", "cache", "sparse"]


@dataclass(frozen=True, kw_only=True)
class Reshape(Pattern):
    """The correction, for any static mask M. Training-free.

    A cache evaluation is dense and keeps of each row rho = sum_M e^s / sum e^s, and R = O - rho O_M, what the masked
    keys gave. The k-th sparse one after it is (rho + (k - 1) ramp) O_M + R.

    Args:
        warmup: evaluations at the start that are dense and keep nothing; the first after them is a cache evaluation.
        every: steps from one cache evaluation to the next.
        ramp: lambda, added to rho after each sparse evaluation.
        clamp: keep rho + (k - 1) ramp from rising above 1, which is not the paper's.
        residual: type in which R is kept, the model's or "bfloat16"; "none" leaves R out, an ablation.
        stages: evaluations of a step of the solver (Heun: 2), which are all in the same mode.
    """

    warmup: Natural = 5
    every: Annotated[int, Ge(2)] = 5
    ramp: Finite = 0.04
    clamp: bool = False
    residual: Residual = "model"
    stages: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup % self.stages:
            raise ConfigError(
                f"{type(self).__name__}: warmup={self.warmup}, expected whole steps of stages={self.stages} "
                "evaluations"
            )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return replace(super().small(grid), warmup=1, every=4)

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Reshaping:
        self._check(sites, total)
        if self.kernel != "none" and "sparse" not in self.modes(total):
            raise ConfigError(
                f"{type(self).__name__}: warmup={self.warmup} and a cache step leave none of total={total} evaluations "
                "sparse"
            )
        return Reshaping(self, sites)

    def due(self, index: int) -> int:
        """Return the evaluation at or before `index` with which the latest scheduled cache step begins."""
        return index - (index - self.warmup) % (self.every * self.stages)

    def step(self, index: int) -> int:
        """Return the step of the solver that evaluation `index` is of."""
        return index // self.stages

    def modes(self, total: int) -> list[Mode]:
        """Schedule each evaluation of an attention that is never skipped."""
        return [self._mode(index) for index in range(total)]

    def _mode(self, index: int) -> Mode:
        if index < self.warmup:
            return "dense"
        return "cache" if self.step(index) == self.step(self.due(index)) else "sparse"


@dataclass(frozen=True)
class Reshaped(Reshape, Band):
    """Re-ttention: the correction on a diagonal band.

    The defaults are the paper's for PixArt in 20 steps; for Hunyuan-DiT in 50 they are `warmup=10`, for CogVideoX
    in 50 `warmup=15`.
    """


@dataclass(frozen=True)
class ReshapedGrouped(Reshape, Grouped):
    """The correction on GRAT's groups, which is neither paper's."""


@dataclass(frozen=True)
class ReshapedNeighbourhood(Reshape, Neighbourhood):  # type: ignore[misc]  # another session: Near adds keys
    """The correction on CLEAR's circle, of a model that was not fine-tuned for it; neither paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pooled", "scaled_from"):
            if given := getattr(self, name):
                raise ConfigError(
                    f"{type(self).__name__}: {name}={given}, expected 0: what is kept is a part of dense attention"
                )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(radius=2, span=0 if grid.frames == 1 else 2, block=8, kernel="cpu", warmup=1, every=4)


class Kept(NamedTuple):
    """Statistics of one attention of one lane."""

    place: int
    """The cache evaluation."""
    plan: int
    """Handle of the plan whose mask is M."""
    uses: tuple[int, ...]
    """The sparse evaluations since."""
    ratio: Tensor
    """rho, [B, N, S], float32 or float64."""
    residual: Tensor | None
    """R, [B, N, S, K]."""


class Reshaping(Sparse):
    """Statistics by (net, lane, site).

    An attention that is new, has another shape or plan, or was skipped when it was to be cached, is cached first.
    """

    policy: Reshape

    def attending(self, call: Call, name: str, seat: SequencePlan) -> Callable[..., Tensor]:
        key, index, plan = (call.net, call.lane, name), call.index, seat.plan
        cache = partial(self.cache, key, index, plan)
        kept: Kept | None = self.state.get(key)
        if kept is None or kept.plan != plan.handle or not self._holds(kept, index):
            return cache
        uses = tuple(use for use in kept.uses if use < index)
        # a tensor, as a graph would take a number for a constant
        ramp = torch.tensor(len(uses) * self.policy.ramp, dtype=torch.float64)
        return partial(self.reuse, key, kept._replace(uses=(*uses, index)), ramp, cache, plan)

    def cache(
        self, key: Key, index: int, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None
    ) -> Tensor:
        """Dense attention; keeps what the plan's mask loses of it."""
        sparse, whole = (self.execute(p, q, k, v, valid) for p in (plan, dense_plan(plan)))
        ratio = (sparse.lse - finite(whole.lse)).exp().detach()
        residual = None
        if self.policy.residual != "none":
            lost = torch.addcmul(whole.out.detach(), ratio[..., None], sparse.out.detach(), value=-1)
            residual = lost.to(q.dtype if self.policy.residual == "model" else torch.bfloat16)
        self.put(key, Kept(index, plan.handle, (), ratio, residual))
        self.computed.add(key[-1])
        return whole.out

    def reuse(
        self,
        key: Key,
        kept: Kept,
        ramp: Tensor,
        cache: Callable[..., Tensor],
        plan: BlockPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """(rho + ramp) O_M + R."""
        if kept.ratio.shape != q.shape[:3]:
            return cache(q, k, v, valid)
        ratio = kept.ratio + ramp
        if self.policy.clamp:
            ratio = ratio.clamp(max=1)
        scale, out = ratio[..., None], self.execute(plan, q, k, v, valid).out
        out = scale * out if kept.residual is None else torch.addcmul(kept.residual, scale, out)
        self.put(key, kept)
        return out.to(q.dtype)

    def foreseen_bytes(self, call: Call, tokens: Any) -> int:
        """With the residuals of a new lane, of its tokens' width and type; ratios, a few per cent, are not known."""
        has_lane = any(key[:2] == (call.net, call.lane) for key in self.state)
        if has_lane or self.policy.kernel == "none" or self.off(layout := self.layout(call)):
            return self.projected_bytes()
        cores = [
            stream for name, stream in self.streams.items() if self.places[name] not in self.policy.dense
        ]
        row = tree_leaves(tokens.x)[0][:, 0]
        size = {"model": row.element_size(), "bfloat16": 2, "none": 0}[self.policy.residual]
        rows = sum(layout.seats[stream].plan.queries for stream in cores)
        return self.projected_bytes() + rows * row.numel() * size

    def fitting(self, need: int, allowed: int) -> str:
        """Without residuals only the ratios are left."""
        ratios = sum(kept.ratio.nbytes for kept in self.state.values())
        if self.policy.residual == "none" or not ratios:
            return ""
        return f"residual='none' would {'fit' if ratios <= allowed else f'hold {ratios:,}'}"

    def _holds(self, kept: Kept, index: int) -> bool:
        """Return whether statistics are as fresh as is scheduled, and of an earlier step."""
        step = self.policy.step
        return self.policy.due(index) <= kept.place and step(kept.place) < step(index)
