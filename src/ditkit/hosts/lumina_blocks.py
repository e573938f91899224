"""Parts shared by Lumina 2 and Lumina-Next: token side data, attention, the stack of blocks.

B batch, L image rows, M rows of the sequence, D width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ditkit.core.grid import Grid, take_rows
from ditkit.core.run import Run
from ditkit.hosts.attention import flip


class Place(NamedTuple):
    """Side data aligned with a sequence of M tokens, the first `text` of which are text.

    Args:
        phases: complex rotary table, [B, M, K / 2] or [1, M, K / 2].
        seen: rows that are not padding, [B, M]; None where all are seen.
    """

    phases: Tensor
    visible: Tensor | None = None
    text: int = 0

    def at(self, stream: str, index: Tensor) -> Tensor:
        """Places of some rows of one stream and all of the other; without text there is one stream."""
        every = torch.arange(self.phases.shape[1], device=index.device).expand(*index.shape[:-1], -1)
        if stream == "text":
            return torch.cat([index, every[..., self.text :]], -1)
        return torch.cat([every[..., : self.text], self.text + index], -1)

    def rows(self, stream: str, index: Tensor) -> Place:
        at = self.at(stream, index)
        text = index.shape[-1] if stream == "text" else self.text
        visible = None if self.visible is None else take_rows(self.visible, at)
        return Place(take_rows(self.phases, at), visible, text)


class PlacedTokens(NamedTuple):
    """Embedded tokens [B, M, D] and where they are: what a `tokens` site returns."""

    x: Tensor
    place: Place

    def rows(self, stream: str, index: Tensor) -> PlacedTokens:
        at = self.place.at(stream, index)
        return PlacedTokens(take_rows(self.x, at), self.place.rows(stream, index))


def stack(
    run: Run,
    blocks: nn.ModuleList,
    apply: Any,
    x: Tensor,
    place: Place,
    conditions: tuple[Tensor, ...],
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Blocks `start` to `stop`; `told`: the embedded time, and what else has no rows of the sequence."""
    for i, block in list(enumerate(blocks))[start:stop]:
        x = run.site(f"blocks.{i}", partial(apply, block, run, f"blocks.{i}"), x, place, *conditions)
    return x


def feed(block: Any, x: Tensor, scale: Tensor | None) -> Tensor:
    """Compute the MLP branch before its gate, row by row."""
    return block.ffn_norm2(block.feed_forward(scaled(block.ffn_norm1(x), scale)))


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * (1 + scale)


def added(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    return x + branch if gate is None else x + gate.tanh() * branch


def heads(attn: Any, x: Tensor, context: Tensor) -> list[Tensor]:
    """Split queries [B, L, N, K] from keys and values, which may have fewer heads."""
    q = attn.to_q(x).unflatten(-1, (attn.heads, -1))
    return [q, *(project(context).unflatten(-1, (-1, q.shape[-1])) for project in (attn.to_k, attn.to_v))]


def rotate(x_BLNK: Tensor, phases: Tensor | None) -> Tensor:
    return x_BLNK if phases is None else apply_rotary_emb(x_BLNK, phases, use_real=False)


def grouped(q_BLNK: Tensor, k_BLNK: Tensor, v_BNLK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, N, L, K] with as many heads as queries."""
    times = q_BLNK.shape[2] // k_BLNK.shape[2]
    return flip(k_BLNK).repeat_interleave(times, 1), v_BNLK.repeat_interleave(times, 1)


def masks(visible: Tensor | None) -> tuple[Tensor, ...]:
    """Build the mask of a `core` site, if any: bool, [B, 1, 1, M]."""
    return () if visible is None else (visible.bool()[:, None, None],)


def attention(
    scale: float, base: int | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """All [B, N, L, K]; keys after those that the mask knows are seen.

    Args:
        base: with it the logits grow with the number of keys beyond `base` (Lumina-Next, proportional attention).
    """
    if base is not None:
        scale = sqrt(log(k.shape[2], base)) * scale
    if mask is not None:
        mask = of_all(mask, k)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def of_all(mask: Tensor, k_BNLK: Tensor) -> Tensor:
    """Extend the mask to a column for every key; keys that it does not know are attended to."""
    return F.pad(mask, (0, k_BNLK.shape[2] - mask.shape[-1]), value=True)


def grid_of(model: Any, shape: Sequence[int]) -> Grid:
    """As the patch embedding cuts latents of `shape` [B, C, H, W]."""
    height, width = (n // model.config.patch_size for n in shape[2:])
    return Grid(1, height, width)
