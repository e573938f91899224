"""DyDiT++ (arXiv 2504.06803): heads and channels that a noise level needs, and tokens whose MLP is worth its cost.

B batch, L tokens, D width, H heads, r rank, Q low-rank updates.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from ditkit.compress.learned_depth import gumbel
from ditkit.core.config import Count, Finite, Natural
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.grid import Grid
from ditkit.core.policy import Claim, Policy, Session, site_key
from ditkit.core.run import Call, Handler, Site, named
from ditkit.nn.routes import Route, Routed, Update, is_plain, routed_blocks
from ditkit.nn.time_lora import TimeLoRA

Routes = Literal["learned", "static", "random"]


@dataclass(frozen=True)
class DyDiT(Policy):
    """Each block computes the heads and MLP channels of its time, and the MLP of the tokens that are worth it.

    Timestep-wise dynamic width: routers on e(t), the embedding of the time alone, choose among the H heads of an
    attention and the H equal groups of an MLP's channels. Spatial-wise dynamic tokens: a router on a token, before the
    norm, chooses whether its MLP is computed, else it is 0. In training and for samples of several times, masks
    multiply. In sampling all samples have one time, so weights are sliced and tokens gathered: what is off is not
    computed. The share of the blocks' work that a run learns is that of the term `Budget`.

    Args:
        width: heads and channels are chosen. tokens: tokens are.
        keeps_first: the first head and group are always on (the second release); without it a block may lose all.
        tau: of the Gumbel sigmoid in training.
        ratio: D over the hidden width of a token's router.
        width_bias, token_bias: of fresh routers, so that everything is on at first.
        rank: of TD-LoRA, (alpha / rank) sum_q w_q(t) B_q A on the four layers of a block, w a softmax of a router on
            e(t); 0 for none. updates: how many B_q. alpha: its scale, times rank.
        seed: of fresh weights.
        complete: compute all heads, channels and tokens, with TD-LoRA's updates. Without a rank that is the neutral
            setting: the network as it is, whatever it has learned.
        routes: learned, or a control without routers: "static", the first heads and groups at all times; "random", the
            MLP of random tokens. share: of them that a control computes.
    """

    inherent: ClassVar[bool] = True
    width: bool = True
    tokens: bool = True
    keeps_first: bool = True
    tau: Annotated[float, Gt(0)] = 5.0
    ratio: Count = 16
    width_bias: Finite = 15.0
    token_bias: Finite = 35.0
    rank: Natural = 0
    updates: Count = 4
    alpha: Annotated[float, Gt(0)] = 16.0
    seed: Natural = 0
    complete: bool = False
    routes: Routes = "learned"
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.width or self.tokens or self.rank or self.complete):
            raise ConfigError(
                "DyDiT: width=False, tokens=False and rank=0 leave nothing, expected one of them"
            )

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        self.blocks(sites)
        return {
            **dict.fromkeys(named(sites, "timestep"), "see"),
            **dict.fromkeys(named(sites, "choice"), "own"),
        }

    def blocks(self, sites: Sequence[Site]) -> list[Routed]:
        """List the blocks that have routes, in order.

        Raises:
            ConfigError: there is none, no embedding of the time alone, rows that are not just the image's, or heads
                that do not divide an MLP.
        """
        found = routed_blocks(sites)
        if not found or not named(sites, "timestep"):
            raise ConfigError(
                "DyDiT: the model has no 'choice' sites that follow a 'timestep' site, expected both, as a DiT has"
            )
        for block in found:
            if block.mlp.stream != "image":
                raise ConfigError(
                    f"DyDiT: {block.mlp.name!r} is of stream {block.mlp.stream!r}, expected rows of the image alone"
                )
            if block.hidden % block.heads or block.width < self.ratio:
                raise ConfigError(
                    f"DyDiT: {block.mlp.name!r} has {block.hidden} hidden channels of width {block.width}, expected "
                    f"some that divide into {block.heads} groups, and a width of at least ratio={self.ratio}"
                )
        return found

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict | None:
        if self.routes != "learned":
            return None
        found: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            for block in self.blocks(sites):
                D = block.width
                found[site_key(block.attn.name)] = Routers(self, block, (D, 3 * D), (D, D))
                found[site_key(block.mlp.name)] = Routers(
                    self, block, (D, block.hidden), (block.hidden, D), self.tokens
                )
        return nn.ModuleDict(found)

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        known: Any = self.modules(sites) if modules is None else modules
        if modules is None and known is not None:
            known.eval()  # routers that nobody trains
        return Dynamic(self, sites, known, fresh=modules is None)

    def exact(self) -> DyDiT:
        return replace(self, complete=True, rank=0)

    def whole(self) -> DyDiT:
        return replace(self, complete=True)

    @classmethod
    def small(cls, grid: Grid) -> DyDiT:
        return cls(width_bias=0.0, token_bias=0.0)


class Routers(nn.Module):
    """The routers of a branch: of its groups, of its tokens, and of the updates of its two layers.

    Weights are Xavier's and biases constant, as the published code leaves them.
    """

    def __init__(
        self,
        policy: DyDiT,
        block: Routed,
        first: tuple[int, int],
        second: tuple[int, int],
        tokens: bool = False,
    ) -> None:
        super().__init__()
        D, p = block.width, policy
        self.tau, self.keeps_first = p.tau, p.keeps_first
        self.width = _linear(D, block.heads - p.keeps_first, p.width_bias) if p.width else None
        self.tokens = _token_router(D, p.ratio, p.token_bias) if tokens else None
        lora = partial(TimeLoRA, D, rank=p.rank, updates=p.updates, alpha=p.alpha)
        self.first = lora(*first) if p.rank else None
        self.second = lora(*second) if p.rank else None

    def groups(self, e_BD: Tensor) -> Tensor | None:
        """Return the mask [B, H] of heads or channel groups at times of embeddings e."""
        if self.width is None:
            return None
        mask = gate(self.width(e_BD), self.tau, self.training)
        return torch.cat([mask.new_ones(len(mask), 1), mask], -1) if self.keeps_first else mask

    def rows(self, x_BLD: Tensor) -> Tensor | None:
        """Return the mask [B, L, 1] of tokens."""
        return None if self.tokens is None else gate(self.tokens(x_BLD), self.tau, self.training)

    def updates(self, e_BD: Tensor) -> tuple[Update | None, Update | None]:
        """Return the updates of the two layers at times of embeddings e."""
        both = self.first, self.second
        return tuple(None if layer is None else layer(e_BD) for layer in both)  # type: ignore[return-value]


def _linear(ins: int, outs: int, bias: float) -> nn.Linear:
    layer = nn.Linear(ins, outs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return layer


def _token_router(width: int, ratio: int, bias: float) -> nn.Sequential:
    return nn.Sequential(_linear(width, width // ratio, 0.0), nn.ReLU(), _linear(width // ratio, 1, bias))


def gate(logits: Tensor, tau: float, training: bool) -> Tensor:
    """Decide by logits: zeros and ones, with the gradient of the probability.

    In training that is sigmoid((z + g1 - g2) / tau) with Gumbel noise g, else sigmoid(z); 1 above a half.
    """
    if training:
        logits = (logits + gumbel(logits) - gumbel(logits)) / tau
    soft = logits.sigmoid()
    hard = (soft > 0.5).to(soft.dtype)
    return hard - soft.detach() + soft if soft.requires_grad else hard


ORIGINAL_NAMES = {
    r"blocks\.(\d+)\.attn_rate\.router\.": r"blocks/\1/attn/route.width.",
    r"blocks\.(\d+)\.mlp_rate\.router\.": r"blocks/\1/mlp/route.width.",
    r"blocks\.(\d+)\.token_selection\.mlp_head\.": r"blocks/\1/mlp/route.tokens.",
}
"""Names of the routers in the published state dict, and here."""


def split_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part a published state dict into the network's and the routers', these renamed as `load_routers` takes them."""
    network, routers = dict(state), {}
    for name in state:
        for pattern, ours in ORIGINAL_NAMES.items():
            if re.match(pattern, name):
                routers[re.sub("^" + pattern, ours, name)] = network.pop(name)
    return network, routers


def load_routers(model: Any, routers: Mapping[str, Tensor]) -> None:
    """Fill the routers of a model that is under DyDiT, in place.

    Raises:
        ConfigError: it is not. CheckpointError: they are of another model, or of a setting of other routers.
    """
    if DyDiT.__name__ not in model.learned:
        raise ConfigError(f"load_routers: this {type(model).__name__} is not under DyDiT; adopt it first")
    own = model.learned[DyDiT.__name__]
    shapes, given = ({k: tuple(v.shape) for k, v in s.items()} for s in (own.state_dict(), routers))
    if shapes != given:
        name = next(n for n in {**shapes, **given} if shapes.get(n) != given.get(n))
        raise CheckpointError(f"load_routers: {name!r} is {given.get(name)}, expected {shapes.get(name)}")
    own.load_state_dict(routers)


class Dynamic(Session):
    """The routes of each call."""

    verb: ClassVar[str] = "routed"

    def __init__(
        self, policy: DyDiT, sites: Sequence[Site], modules: nn.Module | None, fresh: bool = False
    ) -> None:
        super().__init__()
        self.policy, self.modules, self.fresh = policy, cast(Any, modules), fresh
        self.timesteps, self.blocks = named(sites, "timestep"), policy.blocks(sites)
        self.shares: list[float] = []
        """The share of the blocks' work that each evaluation of one time did."""
        self._under_way: Work | None = None

    def enter(self, call: Call) -> Mapping[str, Handler]:
        policy = self.policy
        if policy.complete and not (policy.rank and self.modules is not None):
            return {}
        routing: Routing | Fixed
        if self.modules is None:
            routing = Fixed(policy, self.blocks, call)
        else:
            training = any(module.training for module in self.modules.values())
            routing = Routing(
                self.blocks,
                self.modules,
                sliced=not training and not isnan(call.t),
                complete=policy.complete,
                fresh=self.fresh,
            )
        self._under_way = routing.work
        return {
            **dict.fromkeys(self.timesteps, routing.note),
            **{block.attn.name: partial(routing.attention, block) for block in self.blocks},
            **{block.mlp.name: partial(routing.mlp, block) for block in self.blocks},
        }

    def commit(self) -> None:
        super().commit()
        work, self._under_way = self._under_way, None
        if work is None or not work.whole:
            return
        self.computed |= work.full
        self.shares.append(work.done / work.whole)
        self.remarks = {
            "work": round(sum(self.shares) / len(self.shares), 4),
            "least": round(min(self.shares), 4),
            "most": round(max(self.shares), 4),
        }


class Work:
    """MACs that the branches of one call do, and all that they have; `full` are the routes that left out nothing."""

    def __init__(self) -> None:
        self.done = self.whole = 0.0
        self.full: set[str] = set()

    def count(
        self, block: Routed, x: Tensor, branch: int, route: Route, layers: tuple[nn.Module, nn.Module]
    ) -> None:
        """Add those of a block's branch 0 or 1 of x [B, L, D]: a layer that cannot be cut computes all groups."""
        if torch.compiler.is_compiling():
            return
        groups = 1.0 if route.groups is None else len(route.groups) / block.heads
        rows = 1.0 if route.rows is None else len(route.rows) / (x.numel() // x.shape[-1])
        ends = [groups if is_plain(layer) else 1.0 for layer in layers]
        parts = block.parts(x.shape[1])[branch]
        done = rows * sum(s * macs for s, macs in zip((ends[0], groups, ends[1]), parts, strict=True))
        self.done, self.whole = self.done + done, self.whole + sum(parts)
        if done == sum(parts):
            self.full.add(block[branch].name)  # type: ignore[union-attr]


class Fixed:
    """The routes of a control in one call."""

    def __init__(self, policy: DyDiT, blocks: Sequence[Routed], call: Call) -> None:
        self.policy, self.work = policy, Work()
        self.key = policy.seed, call.index if call.step is None else call.step

    def note(self, fn: Handler, *args: Any) -> Any:
        """Let the embedding of the time pass."""
        return fn(*args)

    def attention(self, block: Routed, fn: Handler, x: Tensor, *layers: nn.Module) -> Route | None:
        """Return the route of an attention."""
        route = self._first(block, x) if self.policy.routes == "static" else None
        return self._counted(block, fn, x, layers, 0, route)

    def mlp(self, block: Routed, fn: Handler, x: Tensor, *layers: nn.Module) -> Route | None:
        """Return the route of an MLP."""
        if self.policy.routes == "static":
            return self._counted(block, fn, x, layers, 1, self._first(block, x))
        B, L, kept = *x.shape[:2], max(1, round(self.policy.share * x.shape[1]))
        g = torch.Generator().manual_seed(zlib.crc32(f"{self.key} {block.mlp.name}".encode()))
        at = torch.rand(B, L, generator=g, device="cpu").topk(kept).indices.sort().values
        rows = (at + L * torch.arange(B)[:, None]).flatten().to(x.device)
        return self._counted(block, fn, x, layers, 1, Route(block.heads, rows=rows) if kept < L else None)

    def _first(self, block: Routed, x: Tensor) -> Route | None:
        kept = max(1, round(self.policy.share * block.heads))
        return Route(block.heads, torch.arange(kept, device=x.device)) if kept < block.heads else None

    def _counted(
        self, block: Routed, fn: Handler, x: Tensor, layers: Any, branch: int, route: Route | None
    ) -> Route | None:
        self.work.count(block, x, branch, route or Route(), layers)
        return fn(x, *layers) if route is None else route


class Routing:
    """The routes of one call: sliced where all samples have one time, else by masks.

    It lives as long as the call's handlers, and blocks that are computed again find the same.

    Args:
        complete: nothing is left out; updates are added all the same. fresh: nobody holds the routers, so they go where
            the model is.
    """

    def __init__(
        self,
        blocks: Sequence[Routed],
        modules: Any,
        sliced: bool,
        complete: bool = False,
        fresh: bool = False,
    ) -> None:
        self.blocks, self.modules, self.sliced, self.work = blocks, modules, sliced, Work()
        self.complete, self.fresh = complete, fresh
        self.e_BD: Tensor | None = None
        self.dtype = next((p.dtype for p in modules.parameters()), None) if modules is not None else None
        self.chosen: dict[str, Tensor | None] = {}

    def note(self, fn: Handler, *args: Any) -> Tensor:
        """Keep e(t); of one time, choose the groups of all blocks at once."""
        out: Tensor = fn(*args)
        if self.fresh:
            self.modules.to(out.device)
        self.e_BD = out.to(self.dtype or out.dtype)
        if self.sliced:
            self.e_BD = self.e_BD[:1]
        if self.sliced and not self.complete:
            with torch.no_grad():
                masks = {site.name: self._of(site).groups(self.e_BD) for b in self.blocks for site in b[:2]}
            self.chosen = indices({name: mask for name, mask in masks.items() if mask is not None})
        return out

    def attention(self, block: Routed, fn: Handler, x: Tensor, *layers: Any) -> Route | None:
        """Return the route of an attention of x [B, L, D]; None where all of it is computed as it is."""
        route = self._groups(block, block.attn)
        if self.sliced:
            self.work.count(block, x, 0, route, layers)
        return fn(x, *layers) if route.is_whole else route

    def mlp(self, block: Routed, fn: Handler, x: Tensor, *layers: Any) -> Route | None:
        """Return the route of an MLP of x [B, L, D], before its norm."""
        with torch.autocast(x.device.type, enabled=False):
            mask = None if self.complete else self._of(block.mlp).rows(x.to(self.dtype or x.dtype))
        route = self._groups(block, block.mlp)
        apart = route.first is not None and len(route.first.up) > 1
        if mask is not None and self.sliced and not apart:
            rows = places(mask.squeeze(-1) > 0)
            # a compiler knows no length to compare
            is_all = not torch.compiler.is_compiling() and len(rows) == mask.numel()
            route = route._replace(rows=None if is_all else rows)
        elif mask is not None:
            route = route._replace(row_mask=mask)
        if self.sliced:
            self.work.count(block, x, 1, route, layers)
        return fn(x, *layers) if route.is_whole else route

    def _groups(self, block: Routed, site: Site) -> Route:
        routers = self._of(site)
        assert self.e_BD is not None, "the time is embedded before the first block"
        with torch.autocast(self.e_BD.device.type, enabled=False):
            first, second = routers.updates(self.e_BD)
            if self.sliced:
                return Route(block.heads, groups=self.chosen.get(site.name), first=first, second=second)
            mask = None if self.complete else routers.groups(self.e_BD)
        return Route(block.heads, group_mask=mask, first=first, second=second)

    def _of(self, site: Site) -> Any:
        return self.modules[site_key(site.name)]


def indices(masks: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return what each mask [1, H] has, int64 [n]; None where that is all. One copy from the device serves them."""
    if not masks:
        return {}
    rows = torch.cat([mask > 0 for mask in masks.values()]).tolist()
    device = next(iter(masks.values())).device
    found = {name: [i for i, on in enumerate(row) if on] for name, row in zip(masks, rows, strict=True)}
    return {
        name: None if len(at) == len(row) else torch.tensor(at, dtype=torch.long, device=device)
        for (name, at), row in zip(found.items(), rows, strict=True)
    }


@torch.library.custom_op("ditkit::places", mutates_args=())
def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


@_places.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.long)


def places(mask: Tensor) -> Tensor:
    """Return where a mask is true, in the flattened mask, int64; one operation of unknown length to the compiler."""
    found: Tensor = _places(mask) if torch.compiler.is_compiling() else mask.flatten().nonzero().squeeze(1)
    return found
