"""Blocks of a decoder that reads from left to right: GPT-2's and Llama's, with their sites.

B batch, L tokens, D width, N heads, M heads of keys and values, K head width.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import KV, RMSNorm, keep
from ditkit.nn.mlp import SwiGLU
from ditkit.nn.rotary import Rotary, axial_angles, rotary_table, rotate

Shape = Literal["gpt2", "llama"]
"""gpt2: layer norms, learned positions, two layers with GELU, biases. llama: RMS norms, rotary positions, SwiGLU, fewer
heads of keys and values than of queries, no biases."""
EPS = 1e-5


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Each query [B, N, L, K] attends to the keys [B, M, L, K] up to its own row; M divides N."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class CausalAttention(nn.Module):
    """Self-attention to the past, its queries, keys and values from one layer, in this order."""

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool, dropout: float = 0.0) -> None:
        if width % heads or heads % kv_heads:
            raise ShapeError(
                f"CausalAttention: width={width} should divide into heads={heads}, and these into kv_heads={kv_heads}"
            )
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * (width // heads), bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x_BLD: Tensor, run: Run, at: str, rotary: Rotary | None = None) -> Tensor:
        head_width = self.out.in_features // self.heads
        heads_BNLK = self.qkv(x_BLD).unflatten(-1, (-1, head_width)).transpose(1, 2)
        q, k, v = heads_BNLK.split([self.heads, self.kv_heads, self.kv_heads], 1)
        kv = run.site(at + ".kv", keep, KV(k, v, rotary))
        k = kv.k
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, kv.position)
        dropout = self.dropout if self.training else 0.0
        o_BNLK = run.site(at + ".core", partial(causal_attention, dropout=dropout), q, k, kv.v)
        return self.out(o_BNLK.transpose(1, 2).flatten(2))


class GELUMLP(nn.Module):
    """Two layers with GELU in its tanh form (GPT-2)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, run: Run = DIRECT, at: str = "") -> Tensor:
        out: Tensor = self.out(run.site(at + ".inner", self.hidden, x))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the values between the two layers, row by row."""
        return F.gelu(self.inner(x), approximate="tanh")


class PlainSwiGLU(SwiGLU):
    """W2 (SiLU(Wg u) * Wx u) without biases (Llama)."""

    def __init__(self, width: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.dropout = 0.0
        self.gate = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)


def norm_of(shape: Shape, width: int) -> nn.Module:
    """Return a norm of the shape's kind."""
    return nn.LayerNorm(width, eps=EPS) if shape == "gpt2" else RMSNorm(width, eps=EPS)


class CausalBlock(nn.Module):
    """x + drop(Attn(norm x)), then x + drop(MLP(norm x)), each row from those up to it."""

    def __init__(
        self, shape: Shape, width: int, heads: int, kv_heads: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width, self.dropout = width, dropout
        self.attn_norm, self.mlp_norm = norm_of(shape, width), norm_of(shape, width)
        self.attn = CausalAttention(width, heads, kv_heads, bias=shape == "gpt2", dropout=dropout)
        self.mlp = GELUMLP(width, hidden) if shape == "gpt2" else PlainSwiGLU(width, hidden)

    def attend(self, run: Run, at: str, x_BLD: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Compute the attention branch."""
        return F.dropout(self.attn(self.attn_norm(x_BLD), run, at, rotary), self.dropout, self.training)

    def feed(self, run: Run, at: str, x_BLD: Tensor) -> Tensor:
        """Compute the feed-forward branch, row by row."""
        return F.dropout(self.mlp(self.mlp_norm(x_BLD), run, at), self.dropout, self.training)

    def forward(
        self, x_BLD: Tensor, rotary: Rotary | None = None, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        attn, mlp = at + ".attn", at + ".mlp"
        aligned = () if rotary is None else (rotary,)
        x_BLD = x_BLD + run.site(attn, partial(self.attend, run, attn), x_BLD, *aligned)
        return x_BLD + run.site(mlp, partial(self.feed, run, mlp), x_BLD)

    def sites(self, at: str, stream: str = "series") -> list[Site]:
        """Its sites in the order of the call, as wide as its layers are."""
        place = partial(Site, stream=stream, width=self.width)
        return [
            place(at, "block"),
            place(f"{at}.attn", "branch"),
            place(f"{at}.attn.kv", "kv", heads=self.attn.heads),
            place(f"{at}.attn.core", "core", heads=self.attn.heads, attention="causal"),
            place(f"{at}.mlp", "branch"),
            Site(f"{at}.mlp.inner", "inner", stream, self.mlp.out.in_features),
        ]


def line_rotary(length: int, head_width: int, base: float, device: torch.device | str) -> Rotary:
    """Return the rotary table of `length` places in a line."""
    return rotary_table(axial_angles(Grid(length), (head_width, 0, 0), base, device))
