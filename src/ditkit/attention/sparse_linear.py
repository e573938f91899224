"""SLA: softmax attention over the most important key blocks, linear attention over the rest (arXiv 2509.24006).

B batch, N heads, K head width, r query blocks, n key blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.dynamic import Dynamic, Selecting
from ditkit.attention.grouped import group_order
from ditkit.attention.pattern import Layout, SequencePlan, append_dense_rows, sparse_sites
from ditkit.core.config import Count, Fraction, Share
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.policy import site_key
from ditkit.core.run import Call, Handler, Site
from ditkit.ops.block_sparse_attention import BlockPlan, attend_mapped, build_plan, choose
from ditkit.ops.linear_attention import FeatureMap, block_linear_attention, divide, feature_map

Variant = Literal["paper", "sla1", "main"]
CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1
EPSILON = 1e-5
"""Added to the denominator of the variant "main"."""


class Router(NamedTuple):
    """The numbers of key blocks of each class that a row of the map has."""

    critical: int
    negligible: int


@dataclass(frozen=True)
class SparseLinear(Dynamic):
    """SLA. A model is fine-tuned under it (`ditkit train sla`), a map W, b of each attention with it.

    The softmax of the products of mean queries and mean keys says which key blocks are critical for a block of
    queries, and which are negligible; the rest is marginal. The output is O^s + O^l W + b: softmax attention over the
    critical blocks alone, with a normaliser of its own, and linear attention phi(Q) H / phi(Q) Z with the sums H of
    phi(K)^T V and Z of phi(K) over the marginal ones. W and b begin at 0, so that a model that was not fine-tuned has
    the first part alone. Queries and keys come to phi with their rotation, as in the published code.

    Text that stands in the sequence has blocks of its own, behind the image's, and is routed like them. Rows that are
    padding count in no mean and no sum.

    Args:
        variant: "paper"; "sla1", its published code, where no block is negligible; or "main", the later code, whose
            linear branch runs over all keys and adds 1e-5 to its denominator.
        critical: k_h: floor(k_h n) of n key blocks, at least one.
        negligible: k_l of the variant "paper".
        feature: phi, "softmax" over the width, "elu" + 1, or "relu".
        protect: key blocks of text are critical beside the others.
        tile: frames, rows and columns of the tiles whose tokens are neighbours in memory; 1+1+1 is the paper's raster
            order. Tiles of a block, as 1+8+8, hold pixels that belong together.
    """

    inherent: ClassVar[bool] = True
    variant: Variant = "paper"
    critical: Fraction = 0.05
    negligible: Share = 0.1
    feature: FeatureMap = "softmax"
    protect: bool = False
    tile: tuple[Count, Count, Count] = (1, 1, 1)
    block: Literal[8, 16, 32, 64, 128, 256] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "paper" and self.critical + self.negligible > 1:
            raise ConfigError(
                f"SparseLinear: critical={self.critical:g} and negligible={self.negligible:g}, expected at most 1 "
                "together"
            )
        if self.variant != "paper" and self.negligible not in (0, type(self).negligible):
            raise ConfigError(
                f"SparseLinear: negligible={self.negligible:g}, expected none: variant={self.variant} knows no such "
                "blocks"
            )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(critical=0.5, block=8, kernel="cpu")

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict | None:
        widths = {site.name: site.width // max(site.heads, 1) for site in sites}
        return nn.ModuleDict({site_key(name): OutputMap(widths[name]) for name in sparse_sites(sites)})

    def check_model(self, model: Any) -> None:
        for own in getattr(model, "policies", ()):
            if isinstance(own, SparseLinear) and self.kernel != "none" and own.method != self.method:
                raise ConfigError(
                    f"SparseLinear: variant={self.variant},feature={self.feature} for a model that was fine-tuned "
                    f"under variant={own.variant},feature={own.feature}"
                )

    @property
    def method(self) -> tuple[Variant, FeatureMap]:
        """Variant and feature map, to which learned maps belong."""
        return self.variant, self.feature

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Mixing:
        self._check(sites, total)
        own = self.modules(sites)
        assert own is not None
        if modules is None:
            return Mixing(self, sites, own)
        held, wanted = ({k: list(v.shape) for k, v in m.state_dict().items()} for m in (modules, own))
        if held != wanted:
            key = next(key for key in {**wanted, **held} if held.get(key) != wanted.get(key))
            raise ConfigError(
                f"SparseLinear: the map {key!r} is {held.get(key)}, expected {wanted.get(key)}: it was fine-tuned with "
                "another model"
            )
        return Mixing(self, sites, modules)

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        slots = self.slots(grid)
        blocks = len(slots) // self.block
        every = torch.ones(blocks, blocks, dtype=torch.bool)
        order, kept = append_dense_rows(slots, every, others, self.block)
        return build_plan(len(slots) + others, block=self.block, order=order, kept=kept)

    def slots(self, grid: Grid) -> Tensor:
        """Return the token in each slot, -1 for padding: int64, whole blocks."""
        order = torch.arange(grid.length) if self.tile == (1, 1, 1) else group_order(grid, self.tile)
        return F.pad(order, (0, -len(order) % self.block), value=-1)

    def router(self, columns: int) -> Router:
        """Return how many of `columns` key blocks are critical, and negligible."""
        critical = max(1, int(self.critical * columns))
        rest = int(self.negligible * columns) if self.variant == "paper" else 0
        return Router(critical, min(rest, columns - critical))

    def classes(self, image: int, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        """Return the class of every pair of blocks, int8 [B, N, r, n]; no gradient runs through it.

        Args:
            image: slots of the image, which come first and fill whole blocks.
            q, k: [B, N, slots, K]. real: bool [B or 1, slots], false for padding; None for none.
        """
        with torch.no_grad():
            scores, visible = block_scores(q, k, self.block, real)
            counts = self.router(scores.shape[-1])
            best = scores.masked_fill(~visible, -torch.inf).topk(counts.critical, -1).indices
            found = torch.full_like(scores, MARGINAL, dtype=torch.int8)
            if counts.negligible:
                worst = scores.masked_fill(~visible, torch.inf).topk(counts.negligible, -1, largest=False)
                found = found.scatter(-1, worst.indices, NEGLIGIBLE)
            found = found.scatter(-1, best, CRITICAL)
            if self.protect:
                text = torch.arange(scores.shape[-1], device=found.device) >= image // self.block
                found = found.masked_fill(text, CRITICAL)
            return found.masked_fill(~visible, NEGLIGIBLE)

    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        return self.classes(image, q, k, real_slots(plan, None, q)) == CRITICAL

    def share(self, plan: BlockPlan, image: int) -> float:
        columns = plan.blocks[1]
        critical = self.router(columns).critical
        if self.protect:
            text = columns - image // self.block
            critical += round(text * (1 - critical / columns))
        return critical / columns * plan.rows_ratio * (plan.keys / plan.tokens)

    def choosing_macs(self, image: int, q: Tensor) -> int:
        return prod(q.shape[:2]) * (-(-q.shape[2] // self.block)) ** 2 * q.shape[-1]


class OutputMap(nn.Linear):
    """W [K, K] and b [K] of one attention, shared by its heads and tokens; 0 until they are trained."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, linear: Tensor) -> Tensor:
        """O^l W + b of O^l [B, N, slots, K], in its type."""
        return F.linear(linear, self.weight.to(linear), self.bias.to(linear))


class Mixing(Selecting):
    """Attention by both branches; the number of tokens is the same in all calls of a trajectory."""

    policy: SparseLinear

    def __init__(self, policy: SparseLinear, sites: Sequence[Site], maps: nn.Module) -> None:
        super().__init__(policy, sites)
        self.maps: Any = maps
        self.grids: dict[str, tuple[int, int, int]] = {}

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.kernel != "none":
            self._check_call(call)
        return super().enter(call)

    def off(self, layout: Layout) -> str:
        """Never: a model that was fine-tuned so needs it, whether or not it pays."""
        return ""

    def attending(self, call: Call, name: str, placed: SequencePlan) -> Callable[..., Tensor]:
        return partial(self.mix, placed.plan, placed.slots, self.maps[site_key(name)])

    def mix(
        self,
        plan: BlockPlan,
        image: int,
        output: OutputMap,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """O^s + O^l W + b of rows in the plan's order."""
        if not torch.compiler.is_compiling():
            self.remarks["kernel"] = choose(q, plan, self.kernel).kernel
        policy = self.policy
        real = real_slots(plan, valid, q)
        classes = policy.classes(image, q, k, real)
        sparse = attend_mapped(q, k, v, plan, classes == CRITICAL, valid=valid, kernel=self.kernel).out
        a, b = (feature_map(x, policy.feature) for x in (q, k))
        if real is not None:
            b = b * real[:, None, :, None]
        if policy.variant == "main":
            linear = attend_linear(a, b, v)
        else:
            linear = self.marginal(a, b, v, classes == MARGINAL, plan.block)
        return sparse + output(linear).to(sparse.dtype)

    def marginal(self, q: Tensor, k: Tensor, v: Tensor, taken: Tensor, block: tuple[int, int]) -> Tensor:
        """Linear attention over the marginal blocks; features of relu may all be 0, so nothing is subtracted."""
        how: Any = "product" if self.policy.feature == "relu" else "auto"
        kernel: Any = self.kernel if self.kernel in ("triton", "reference") else "cpu"
        return divide(block_linear_attention(q, k, v, taken, block, how=how, kernel=kernel))

    def _check_call(self, call: Call) -> None:
        """Refuse a clip of another size than those before, and prompts that leave nothing to see.

        Raises:
            ShapeError: either.
        """
        layout = self.layout(call)
        grid = layout.image.grid.shape
        if self.grids.setdefault(call.net, grid) != grid:
            given, before = (" x ".join(map(str, shape)) for shape in (grid, self.grids[call.net]))
            raise ShapeError(
                f"SparseLinear: {given} tokens after {before}, expected the same frames and size in a trajectory"
            )
        if layout.image.valid is not None and not bool(layout.image.valid.any(1).all()):
            raise ShapeError("SparseLinear: a mask leaves none of a sample's tokens, expected some")


def attend_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """phi(Q) (phi(K)^T V) / (phi(Q) . sum phi(K) + 1e-5) over all keys, at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    with torch.autocast(_kind(q), enabled=False):  # sums of states cancel, which bf16 does not survive
        denominator = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return q @ (k.mT @ v) / (denominator + EPSILON)


def _kind(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # shapes alone have no autocast


def real_slots(plan: BlockPlan, valid: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the slots that hold a token which is no padding, bool [B or 1, slots]; None for all.

    Args:
        valid: bool [B, M'], of the first M' tokens in the model's order; those after them are all real.
        like: on the device of which they are asked.
    """
    if plan.order is None and valid is None:
        return None
    device = like.device
    order = torch.arange(plan.queries, device=device) if plan.order is None else plan.order.to(device)
    held = (order >= 0)[None]
    if valid is None:
        return held
    every = F.pad(valid.to(device), (0, plan.tokens - valid.shape[1]), value=True)
    return every[:, order.clamp(min=0)] & held


def block_scores(q: Tensor, k: Tensor, block: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products of mean queries and mean keys [B, N, r, n], at least float32, and the blocks that hold a key.

    Of keys their mean over all tokens is taken away first, a constant in each row, for the rounding ("smooth k").
    The softmax and its scale leave the order as it is.
    """
    if real is None:
        real = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    weight = real[:, None, :, None].to(wide)
    whole = (k.to(wide) * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    means = [pool_blocks(x, weight, block) for x in (q.to(wide), k.to(wide) - whole)]
    held = F.pad(real, (0, -real.shape[1] % block)).unflatten(1, (-1, block)).any(2)
    with torch.autocast(_kind(q), enabled=False):
        scores = means[0] @ means[1].mT
    return scores, held[:, None, None].expand_as(scores)


def pool_blocks(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """Mean of each block of x [B, N, slots, K] over its real rows: [B, N, blocks, K].

    Args:
        weight: [B or 1, 1, slots, 1], 1 for a real row and 0 for padding.
    """
    spare = -x.shape[2] % block
    cut = [F.pad(y, (0, 0, 0, spare)).unflatten(2, (-1, block)).sum(3) for y in (x * weight, weight)]
    return cut[0] / cut[1].clamp(min=1)
