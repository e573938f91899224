"""diffusers' `HunyuanVideoTransformer3DModel` (HunyuanVideo, Kong et al. 2024; also SkyReels) with sites.

B batch, L rows of the clip, S text rows, D width, N heads, K head width. In a joint sequence the clip comes first,
then text, and its padding last. A model of a first picture may modulate the rows of the first frame otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_hunyuan_video as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.grid import Grid, Segment, take_rows
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import computes_as, dispatched, flip
from ditkit.hosts.blocks import (
    as_wide,
    attention_sites,
    call_block,
    chosen,
    feed,
    modulated,
    modulation,
    rotate,
    unpatchify_channels_first,
)
from ditkit.hosts.streams import ImageRotary, Streams
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.modulation import modulate

STACKS = {
    "blocks": Stacked("transformer_blocks", "num_layers"),
    "single": Stacked("single_transformer_blocks", "num_single_layers"),
}

__all__ = ["layout", "restore", "running", "sites", "view"]


class Side(NamedTuple):
    """What is aligned with the clip's rows: their rotary table, and which of them the first picture replaced."""

    rotary: ImageRotary
    first: Tensor | None = None
    """Bool [1, L], or [B, R] of rows chosen for each sample; None where all rows are alike."""

    def rows(self, stream: str, index: Tensor) -> Side:
        if stream == "text":
            return self
        first = None if self.first is None else take_rows(self.first, index)
        return Side(self.rotary.rows(stream, index), first)


class ClipTokens(NamedTuple):
    """Embedded tokens and what is aligned with them: what the `tokens` site returns."""

    x: Streams
    side: Side

    def rows(self, stream: str, index: Tensor) -> ClipTokens:
        return ClipTokens(self.x.rows(stream, index), self.side.rows(stream, index))


@computes_as(host.HunyuanVideoAttnProcessor2_0)
def attend(
    attn: Any,
    run: Run,
    at: str,
    clip: Tensor,
    text: Tensor,
    mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Streams:
    """Joint attention of the clip [B, L, D] and text [B, S, D]; in single blocks they share their layers.

    Args:
        mask: bool of all keys, [B, 1, 1, L + S].
    """
    L = clip.shape[1]
    table: Any = ImageRotary(*image_rotary_emb)
    is_double = attn.add_q_proj is not None
    x = clip if is_double else torch.cat([clip, text], 1)
    q, k, v = (project(x).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
    kv = run.site(at + ".kv", keep, KV(flip(k[:, :L]), flip(v[:, :L]), table))
    k = torch.cat([flip(kv.k), k[:, L:]], 1)
    v = torch.cat([flip(kv.v), v[:, L:]], 1)
    q, k = (h if norm is None else norm(h) for norm, h in ((attn.norm_q, q), (attn.norm_k, k)))
    keys = kv.k.shape[2]
    q = torch.cat([rotate(q[:, :L], table), q[:, L:]], 1)
    k = torch.cat([rotate(k[:, :keys], kv.position), k[:, keys:]], 1)
    if is_double:
        projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text_q, text_k, text_v = (project(text).unflatten(2, (attn.heads, -1)) for project in projections)
        if attn.norm_added_q is not None:
            text_q = attn.norm_added_q(text_q)
        if attn.norm_added_k is not None:
            text_k = attn.norm_added_k(text_k)
        q, k, v = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
    masks = () if mask is None else (F.pad(mask, (keys - L, 0), value=True),)
    core = partial(dispatched, attn.processor)
    o = flip(run.site(at + ".core", core, flip(q), flip(k), flip(v), *masks)).flatten(2, 3).to(q.dtype)
    o_clip, o_text = o[:, :L], o[:, L:]
    if not is_double:
        return Streams(o_clip, o_text)
    return Streams(attn.to_out[1](attn.to_out[0](o_clip)), attn.to_add_out(o_text))


class DoubleBlock:
    """A block of two streams that meet in its attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: Any = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Streams:
        clip, text = hidden_states, encoder_hidden_states
        side = Side(ImageRotary(*freqs_cis), _first(num_tokens, token_replace_emb, clip))
        parts, replaced = _modulations(self.norm1, temb, token_replace_emb, 6)
        text_parts = modulation(self.norm1_context, temb, 6)
        branch = partial(self._attend, run, at + ".attn")
        by = parts[:2], replaced[:2], text_parts[:2]
        a_clip, a_text = run.site(at + ".attn", branch, Streams(clip, text), side, attention_mask, *by)
        clip = clip + a_clip * chosen(side.first, parts[2], replaced[2:3])
        text = text + a_text * text_parts[2]
        clip_feed = partial(_feed, self.norm2, self.ff)
        m_clip = run.site(at + ".mlp", clip_feed, clip, side, parts[3:5], replaced[3:5])
        clip = clip + chosen(side.first, parts[5], replaced[5:]) * m_clip
        text_feed = partial(feed, self.norm2_context, self.ff_context)
        text = text + text_parts[5] * run.site(at + ".text.mlp", text_feed, text, *text_parts[3:5])
        return Streams(clip, text)

    def _attend(
        self: Any,
        run: Run,
        at: str,
        x: Streams,
        side: Side,
        mask: Tensor | None,
        by: Sequence[Tensor],
        replaced: Sequence[Tensor],
        text_by: Sequence[Tensor],
    ) -> Streams:
        """Clip and text before their gates."""
        return self.attn(
            hidden_states=modulated(self.norm1.norm, x.image, side.first, by, replaced),
            encoder_hidden_states=modulate(self.norm1_context.norm(x.text), *text_by),
            attention_mask=mask,
            image_rotary_emb=side.rotary,
            run=run,
            at=at,
        )


class SingleBlock:
    """A block of one joint sequence, whose attention and MLP share the output layer: one branch."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: Any = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Streams:
        x = Streams(hidden_states, encoder_hidden_states)
        side = Side(ImageRotary(*image_rotary_emb), _first(num_tokens, token_replace_emb, x.image))
        parts, replaced = _modulations(self.norm, temb, token_replace_emb, 3)
        branch = partial(self._branch, run, at + ".attn")
        out = run.site(at + ".fused", branch, x, side, attention_mask, parts[:2], replaced[:2])
        gates = chosen(side.first, parts[2], replaced[2:])
        return Streams(gates * out[0] + x.image, parts[2] * out[1] + x.text)

    def _branch(
        self: Any,
        run: Run,
        at: str,
        x: Streams,
        side: Side,
        mask: Tensor | None,
        by: Sequence[Tensor],
        replaced: Sequence[Tensor],
    ) -> Streams:
        L, S = x.image.shape[1], x.text.shape[1]
        first = None if side.first is None else F.pad(side.first, (0, S))
        h = modulated(self.norm.norm, torch.cat(x, 1), first, by, replaced)
        mlp = self.act_mlp(self.proj_mlp(h))
        a = self.attn(
            hidden_states=h[:, :L],
            encoder_hidden_states=h[:, L:],
            attention_mask=mask,
            image_rotary_emb=side.rotary,
            run=run,
            at=at,
        )
        out = self.proj_out(torch.cat([torch.cat(a, 1), mlp], 2))
        return Streams(out[:, :L], out[:, L:])


@stands_for(host.HunyuanVideoTransformerBlock)
class HunyuanVideoTransformerBlock(DoubleBlock, host.HunyuanVideoTransformerBlock):
    """The double block."""


@stands_for(host.HunyuanVideoTokenReplaceTransformerBlock)
class HunyuanVideoTokenReplaceTransformerBlock(DoubleBlock, host.HunyuanVideoTokenReplaceTransformerBlock):
    """The double block of a model that replaces its first frame."""


@stands_for(host.HunyuanVideoSingleTransformerBlock)
class HunyuanVideoSingleTransformerBlock(SingleBlock, host.HunyuanVideoSingleTransformerBlock):
    """The single block."""


@stands_for(host.HunyuanVideoTokenReplaceSingleTransformerBlock)
class HunyuanVideoTokenReplaceSingleTransformerBlock(
    SingleBlock, host.HunyuanVideoTokenReplaceSingleTransformerBlock
):
    """The single block of a model that replaces its first frame."""


@stands_for(host.HunyuanVideoTransformer3DModel)
class HunyuanVideoTransformer3DModel(host.HunyuanVideoTransformer3DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
        guidance: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        run, clip, mask = current(), hidden_states, encoder_attention_mask
        temb, replaced = run.site("time", self.time_text_embed, timestep, pooled_projections, guidance)
        x, side = run.site("tokens", self._embed, clip, encoder_hidden_states, timestep, mask)
        x = run.site("blocks", partial(self._stack, run), x, side, temb, replaced, mask)
        out = run.site("head", self._head, x.image, temb)
        sample = unpatchify_channels_first(out, _grid(self, clip.shape), _patch(self)).contiguous()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, clip: Tensor, text: Tensor, timestep: Tensor, mask: Tensor) -> ClipTokens:
        first, grid = None, _grid(self, clip.shape)
        if self.config.image_condition_type == "token_replace":
            first = torch.arange(grid.length, device=clip.device)[None] < grid.height * grid.width
        side = Side(ImageRotary(*self.rope(clip)), first)
        return ClipTokens(Streams(self.x_embedder(clip), self.context_embedder(text, timestep, mask)), side)

    def _stack(
        self,
        run: Run,
        x: Streams,
        side: Side,
        temb: Tensor,
        replaced: Tensor | None,
        mask: Tensor,
        start: int = 0,
        stop: int | None = None,
    ) -> Streams:
        """Blocks `start` to `stop`, double ones first; `mask` is of the text, which is padded from some row on."""
        known = _known(mask)
        for name, block in _blocks(self)[start:stop]:
            apply = partial(self._call_block, block, run, name)
            x = run.site(name, apply, x, side, temb, replaced, known)
        return x

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        x: Streams,
        side: Side,
        temb: Tensor,
        replaced: Tensor | None,
        known: Tensor,
    ) -> Streams:
        mask = F.pad(known, (x.image.shape[1], 0), value=True)[:, None, None]
        rest = (temb, mask, tuple(side.rotary), replaced, side.first)
        return Streams(*call_block(self, block, run, name, x.image, x.text, *rest))

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(x_BLD, temb))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call; the text's refiner has none of its own."""
    named = [Site("time", "time"), Site("tokens", "tokens", "joint"), Site("blocks", "stack", "joint")]
    for at, block in _blocks(model):
        is_double = hasattr(block, "ff")
        named += [
            Site(at, "block", "joint"),
            Site(f"{at}.{'attn' if is_double else 'fused'}", "branch", "joint"),
        ]
        named += attention_sites(f"{at}.attn", block.attn, core="joint")
        if is_double:
            named += [Site(f"{at}.mlp", "branch"), Site(f"{at}.text.mlp", "branch", "text")]
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return as_wide((*named, Site("head", "head")), width)


def layout(model: Any, shape: Sequence[int], encoder_attention_mask: Tensor) -> tuple[Segment, ...]:
    """Segments of a call on latents of `shape` [B, C, T, H, W]: the clip, then text, with its padding."""
    grid = _grid(model, shape)
    S, known = encoder_attention_mask.shape[1], _known(encoder_attention_mask)
    valid = None if bool(known.all()) else known
    return Segment("image", grid, grid.length), Segment("text", Grid(S), S, valid)


def _grid(model: Any, shape: Sequence[int]) -> Grid:
    """As the patch embedding cuts: what fills no patch is left out."""
    frames, height, width = (n // p for n, p in zip(shape[2:], _patch(model), strict=True))
    return Grid(frames, height, width)


def _patch(model: Any) -> tuple[int, int, int]:
    side = model.config.patch_size
    return model.config.patch_size_t, side, side


def _blocks(model: Any) -> list[tuple[str, Any]]:
    double, single = model.transformer_blocks, model.single_transformer_blocks
    return [(f"blocks.{i}", b) for i, b in enumerate(double)] + [
        (f"single.{i}", b) for i, b in enumerate(single)
    ]


def _known(mask: Tensor) -> Tensor:
    """Build the mask of text rows that are seen, bool [B, S]: diffusers counts the ones, and sees so many rows."""
    return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, dtype=torch.int)[:, None]


def _first(rows: Any, replaced: Tensor | None, x_BLD: Tensor) -> Tensor | None:
    """Mark the rows of the first frame, given their number as diffusers has it, or the mark itself."""
    if replaced is None or rows is None or isinstance(rows, Tensor):
        return rows if replaced is not None else None
    return torch.arange(x_BLD.shape[1], device=x_BLD.device)[None] < rows


def _modulations(
    norm: nn.Module, temb: Tensor, replaced: Tensor | None, parts: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Shifts, scales and gates [B, 1, D] of the time, and of the first frame's, if that has another."""
    return modulation(norm, temb, parts), () if replaced is None else modulation(norm, replaced, parts)


def _feed(
    norm: nn.Module,
    ff: nn.Module,
    x_BLD: Tensor,
    side: Side,
    by: Sequence[Tensor],
    replaced: Sequence[Tensor],
) -> Tensor:
    """Compute the MLP branch of the clip before its gate, row by row."""
    return ff(modulated(norm, x_BLD, side.first, by, replaced))
