"""The transformer block that DiT introduced, with its sites.

B batch, L tokens, D width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditkit.core.errors import ShapeError
from ditkit.core.run import DIRECT, AttentionKind, Run, Site
from ditkit.nn.compiled import run_block
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate
from ditkit.nn.rotary import Rotary, rotate
from ditkit.nn.routes import Route, everything, into_groups, masked, out_of_groups

PLAIN_KEYS = 1024
"""Up to so many keys two products are faster than torch's fused bf16 kernel on a CPU, forward and backward: 12 times
at 16 keys and at 64, twice at 1024 (torch 2.13, one core with AVX512-bf16)."""
CACHED_SCORES = 2**22
"""Scores that are made at a time, 8 MB in bf16. A training step of 8 clips of 1024 tokens takes 0.84 s so, 1.4 s
with all of them at once."""


class KV(NamedTuple):
    """Keys and values before norm and rotation, [B, N, L, K], with the positions of the keys.

    Args:
        position: a rotary table, `Rotary` or a host's own; tokens can be selected from it.
    """

    k: Tensor
    v: Tensor
    position: Any = None


def keep(kv: KV) -> KV:
    """Return keys and values as the model made them: the function of a `kv` site."""
    return kv


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v, all [B, N, L, K]: the function of a `core` site.

    Args:
        mask: bool, broadcast to [B, N, L, M], true where a query sees a key, for the first M keys; those after
            them are all seen. So a prefix's padding is said the same however many rows follow it.
    """
    if mask is not None and mask.shape[-1] < k.shape[2]:
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=True)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_KEYS:
        return _plain(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by two products, a few samples at a time: softmax itself works in float32."""
    few = max(1, CACHED_SCORES // (max(1, q.shape[1]) * q.shape[2] * k.shape[2]))  # a route may leave no head
    if few < len(q):
        masks = repeat(None) if mask is None else mask.expand(len(q), -1, -1, -1).split(few)
        parts = zip(q.split(few), k.split(few), v.split(few), masks, strict=False)
        return torch.cat([_plain(*part) for part in parts])
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


class RMSNorm(nn.Module):
    """x / rms(x) with a learned scale, taken in the type of x: torch's own leaves its fused kernel in autocast."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention with fused qkv and bias (DiT).

    Args:
        qk_norm: RMS norm of queries and keys in each head, with a learned scale (SD3, section 5.3.2).
        qkv_bias: of queries, keys and values.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, qkv_bias: bool = True) -> None:
        if width % heads:
            raise ShapeError(
                f"Attention: width={width} does not divide into heads={heads} (remainder {width % heads})"
            )
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)
        self.norm_q = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(
        self,
        x_BLD: Tensor,
        run: Run,
        at: str,
        rotary: Rotary | None = None,
        mask: tuple[Tensor, ...] = (),
        route: Route | None = None,
    ) -> Tensor:
        """Positions that are not already in `x_BLD` come as a rotary table of its rows, which has its own mask."""
        if route is None:
            qkv = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1))
        else:
            qkv = into_groups(self.qkv, x_BLD, route, 3, self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, N, L, K]
        kv = run.site(at + ".kv", keep, KV(k, v, rotary))
        q, k = self.norm_q(q), self.norm_k(kv.k)
        if rotary is not None:
            q, k, mask = rotate(q, rotary), rotate(k, kv.position), kv.position.mask()
        o_BNLK = run.site(at + ".core", attention, q, k, kv.v, *mask)
        if route is None:
            return self.out(o_BNLK.transpose(1, 2).flatten(2))
        o_BLNK = masked(o_BNLK.transpose(1, 2), route.group_mask)
        return out_of_groups(self.out, o_BLNK.flatten(2), route, self.heads)

    def sites(
        self, at: str, stream: str = "image", stage: int = 0, attention: AttentionKind = "full"
    ) -> list[Site]:
        """Its sites in the branch `at`."""
        kv = Site(f"{at}.kv", "kv", stream, self.out.in_features, self.heads, stage)
        return [kv, kv._replace(name=f"{at}.core", kind="core", attention=attention)]


class Mlp(nn.Module):
    """Two layers with GELU in its tanh form (DiT).

    GELU(0) = 0, so that a group of hidden channels that is multiplied by 0 before it is one that is not there.
    """

    def __init__(self, width: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.inner = nn.Linear(width, int(width * ratio))
        self.outer = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor, run: Run = DIRECT, at: str = "", route: Route | None = None) -> Tensor:
        if route is not None:
            return self._routed(x, run, at, route)
        out: Tensor = self.outer(run.site(at + ".inner", self.hidden, x))
        return out

    def _routed(self, x: Tensor, run: Run, at: str, route: Route) -> Tensor:
        """Compute the rows of a route, and 0 for the others."""
        some = x if route.rows is None else x.flatten(0, -2).index_select(0, route.rows)
        h = run.site(at + ".inner", partial(self.hidden, route=route), some)
        out = out_of_groups(self.outer, h, route, route.of)
        if route.rows is not None:
            out = out.new_zeros(x.numel() // x.shape[-1], out.shape[-1]).index_copy(0, route.rows, out)
            out = out.view(*x.shape[:-1], -1)
        return out if route.row_mask is None else out * route.row_mask.to(out.dtype)

    def hidden(self, x: Tensor, route: Route | None = None) -> Tensor:
        """Compute the values between the two layers, row by row; of the groups of a route."""
        if route is None:
            return F.gelu(self.inner(x), approximate="tanh")
        groups = into_groups(self.inner, x, route, 1, route.of)
        return F.gelu(masked(groups, route.group_mask), approximate="tanh").flatten(-3)

    def site(self, at: str, stream: str = "image", stage: int = 0) -> Site:
        """Its site in the branch `at`."""
        return Site(f"{at}.inner", "inner", stream, self.outer.in_features, 0, stage)


def sites_of(blocks: nn.ModuleList, *place: Any) -> list[Site]:
    """List the sites of blocks named blocks.0, blocks.1 and so on, in the order of the call.

    Args:
        place: further arguments of each block's `sites`, such as its stream.
    """
    listed: list[Any] = list(blocks)
    return [site for i, block in enumerate(listed) for site in block.sites(f"blocks.{i}", *place)]


class Block(nn.Module):
    """adaLN-Zero block (DiT, section 3.2): x + a1 Attn(mod(LN x)), then x + a2 Mlp(mod(LN x)), all from c."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def attend(
        self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, rotary: Rotary | None = None
    ) -> Tensor:
        """Compute the attention branch before its gate."""
        route = run.site(at + ".route", everything, x_BLD, self.attn.qkv, self.attn.out)
        h_BLD = modulate(self.norm(x_BLD), *affine(parts, 0))
        return self.attn(h_BLD, run, at, rotary, route=route)

    def feed(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor) -> Tensor:
        """Compute the MLP branch before its gate, row by row."""
        route = run.site(at + ".route", everything, x_BLD, self.mlp.inner, self.mlp.outer)
        return self.mlp(modulate(self.norm(x_BLD), *affine(parts, 1)), run, at, route)

    def forward(
        self,
        x_BLD: Tensor,
        c_BD: Tensor,
        rotary: Rotary | None = None,
        run: Run = DIRECT,
        at: str = "blocks.0",
    ) -> Tensor:
        aligned = () if rotary is None else (rotary,)
        attn, mlp = at + ".attn", at + ".mlp"
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), activated(c_BD))
        branch = run.site(attn, partial(self.attend, run, attn), x_BLD, parts, *aligned)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0), branch)  # one pass over memory
        branch = run.site(mlp, partial(self.feed, run, mlp), x_BLD, parts)
        return torch.addcmul(x_BLD, gate(parts, 1), branch)

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call, as wide as its layers are."""
        width = self.norm.normalized_shape[0]
        site = partial(Site, stream=stream, width=width, stage=stage)
        return [
            site(at, "block"),
            site(f"{at}.modulation", "modulation"),
            site(f"{at}.attn", "branch"),
            site(f"{at}.attn.route", "choice", heads=self.attn.heads),
            *self.attn.sites(f"{at}.attn", stream, stage),
            site(f"{at}.mlp", "branch"),
            site(f"{at}.mlp.route", "choice"),
            self.mlp.site(f"{at}.mlp", stream, stage),
        ]


class Stack:
    """Ordered blocks as one callable: `stack(x, c)` runs all, `stack(x, c, 0, 1)` the first.

    A gate that decides after block 1, a pipeline stage, a pruned span and checkpointing are the same cut.
    """

    def __init__(
        self,
        blocks: nn.ModuleList | Sequence[Callable[..., Tensor]],
        run: Run,
        prefix: str = "blocks",
        checkpointing: bool = False,
    ) -> None:
        self.blocks, self.run, self.prefix, self.checkpointing = blocks, run, prefix, checkpointing

    def __len__(self) -> int:
        return len(self.blocks)

    def __call__(self, x: Tensor, c: Any, start: int = 0, stop: int | None = None) -> Tensor:
        return self._through((c,), x, start, stop)

    def beside(self, x: Tensor, c: Any, side: Any, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks that take, beside c, what is aligned with their rows."""
        return self._through((c, side), x, start, stop)

    def _through(self, args: tuple[Any, ...], x: Tensor, start: int, stop: int | None) -> Tensor:
        for i in range(start, len(self.blocks) if stop is None else stop):
            at = f"{self.prefix}.{i}"
            block = partial(run_block, self.blocks[i], self.run, at)
            if self.checkpointing:
                block = partial(checkpoint, block, use_reentrant=False)
            x = self.run.site(at, block, x, *self.of_block(i, args))
        return x

    def of_block(self, i: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what block i is given beside x, of what the stack was given."""
        return args


class Head(nn.Module):
    """Final layer (DiT): adaptive layer norm, then one layer to p p C channels a token."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)

    def forward(self, x_BLD: Tensor, c_BD: Tensor, run: Run = DIRECT, at: str = "head") -> Tensor:
        shift, scale = run.site(at + ".modulation", self.modulation, activated(c_BD)).chunk(2, -1)
        return self.out(modulate(self.norm(x_BLD), shift, scale))

    def sites(self, at: str = "head", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call."""
        width = self.norm.normalized_shape[0]
        return [
            Site(at, "head", "image", width, 0, stage),
            Site(f"{at}.modulation", "modulation", "image", width, 0, stage),
        ]
