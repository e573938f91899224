"""diffusers' `CogVideoXTransformer3DModel` (CogVideoX 1.0 and 1.5, Yang et al. 2024) with sites.

B batch, L rows of the clip, S text rows, D width, N heads, K head width. In a joint sequence text comes first.
Clips are [B, T, C, H, W]: their channels follow their frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import cogvideox_transformer_3d as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import computes_as
from ditkit.hosts.blocks import (
    as_wide,
    attention_sites,
    call_block,
    merge_heads,
    modulation,
    split_heads,
    unpatchify_channels_first,
)
from ditkit.hosts.streams import ImageRotary, Streams
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.modulation import modulate

STACKS = {"blocks": Stacked("transformer_blocks", "num_layers")}

__all__ = ["CHANNEL_AXIS", "layout", "restore", "running", "sites", "view"]

CHANNEL_AXIS = 2
"""The channel axis of latents and of predictions."""


class ClipTokens(NamedTuple):
    """Embedded tokens and what is aligned with them: what the `tokens` site returns."""

    x: Streams
    rotary: ImageRotary | None
    """None in CogVideoX-2B, where positions are already added to `x`."""

    def rows(self, stream: str, index: Tensor) -> ClipTokens:
        return ClipTokens(self.x.rows(stream, index), self.rotary and self.rotary.rows(stream, index))


@computes_as(CogVideoXAttnProcessor2_0)
def attend(
    attn: Any,
    run: Run,
    at: str,
    clip: Tensor,
    text: Tensor,
    mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **unknown: Any,
) -> Streams:
    """Joint attention of the clip [B, L, D] and text [B, S, D], which share their layers.

    Args:
        mask: bias or bool of all keys, [B, 1, S + L].
    """
    if unknown:
        host.logger.warning(
            f"attention_kwargs {sorted(unknown)} are ignored by {type(attn.processor).__name__}."
        )
    S, x = text.shape[1], torch.cat([text, clip], 1)
    q, k, v = (split_heads(attn, project(x)) for project in (attn.to_q, attn.to_k, attn.to_v))
    kv = run.site(at + ".kv", keep, KV(k[:, :, S:], v[:, :, S:], image_rotary_emb))
    k, v = torch.cat([k[:, :, :S], kv.k], 2), torch.cat([v[:, :, :S], kv.v], 2)
    q, k = (h if norm is None else norm(h) for norm, h in ((attn.norm_q, q), (attn.norm_k, k)))
    q, k = _rotate(q, S, image_rotary_emb), _rotate(k, S, kv.position)
    masks = () if mask is None else (_of_heads(attn, mask, x),)
    o = run.site(at + ".core", F.scaled_dot_product_attention, q, k, v, *masks)
    o = attn.to_out[1](attn.to_out[0](merge_heads(o)))
    return Streams(o[:, S:], o[:, :S])


@stands_for(host.CogVideoXBlock)
class CogVideoXBlock(host.CogVideoXBlock):
    """A block of two streams that share all layers but their modulation, and meet in the attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Streams:
        x = Streams(hidden_states, encoder_hidden_states)
        rotary = image_rotary_emb and ImageRotary(*image_rotary_emb)
        by, gates = _modulation(self.norm1, temb)
        attend = partial(self._attend, run, at + ".attn", attention_kwargs or {})
        x = _added(x, gates, run.site(at + ".attn", attend, x, rotary, *by))
        by, gates = _modulation(self.norm2, temb)
        return _added(x, gates, run.site(at + ".mlp", self._feed, x, *by))

    def _attend(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x: Streams,
        rotary: ImageRotary | None,
        *by: Tensor,
    ) -> Streams:
        """Clip and text before their gates."""
        clip, text = _modulated(self.norm1.norm, x, *by)
        return self.attn1(
            hidden_states=clip,
            encoder_hidden_states=text,
            image_rotary_emb=rotary,
            run=run,
            at=at,
            **kwargs,
        )

    def _feed(self, x: Streams, *by: Tensor) -> Streams:
        """Compute the MLP branch before its gates, row by row."""
        clip, text = _modulated(self.norm2.norm, x, *by)
        out = self.ff(torch.cat([text, clip], 1))
        S = text.shape[1]
        return Streams(out[:, S:], out[:, :S])


@stands_for(host.CogVideoXTransformer3DModel)
class CogVideoXTransformer3DModel(host.CogVideoXTransformer3DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Any,
        timestep_cond: Tensor | None = None,
        ofs: Any = None,
        image_rotary_emb: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        run, clip = current(), hidden_states
        temb = run.site("time", partial(self._condition, clip.dtype), timestep, timestep_cond, ofs)
        rotary = image_rotary_emb and ImageRotary(*image_rotary_emb)
        tokens = run.site("tokens", self._embed, clip, encoder_hidden_states, rotary)
        stack = partial(self._stack, run, attention_kwargs)
        x = run.site("blocks", stack, tokens.x, temb, tokens.rotary)
        out = run.site("head", self._head, x.image, temb)
        sample = _unpatched(out, _grid(self, clip.shape), _patch(self))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _condition(self, dtype: torch.dtype, timestep: Any, more: Tensor | None, ofs: Any) -> Tensor:
        """Embed the time, and in the image-to-video model of 1.5 the offset: [B, E]."""
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), more)
        if self.ofs_embedding is None:
            return temb
        return temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))

    def _embed(self, clip: Tensor, text: Tensor, rotary: ImageRotary | None) -> ClipTokens:
        S = text.shape[1]
        x = self.embedding_dropout(self.patch_embed(text, clip))
        return ClipTokens(Streams(x[:, S:], x[:, :S]), rotary)

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any] | None,
        x: Streams,
        temb: Tensor,
        rotary: ImageRotary | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Streams:
        """Blocks `start` to `stop`."""
        for i, block in list(enumerate(self.transformer_blocks))[start:stop]:
            apply = partial(self._call_block, block, run, f"blocks.{i}", kwargs)
            x = run.site(f"blocks.{i}", apply, x, temb, rotary)
        return x

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any] | None,
        x: Streams,
        temb: Tensor,
        rotary: ImageRotary | None,
    ) -> Streams:
        out = call_block(
            self,
            block,
            run,
            name,
            hidden_states=x.image,
            encoder_hidden_states=x.text,
            temb=temb,
            image_rotary_emb=rotary and tuple(rotary),
            attention_kwargs=kwargs,
        )
        return Streams(*out)

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(self.norm_final(x_BLD), temb=temb))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("time", "time"), Site("tokens", "tokens", "joint"), Site("blocks", "stack", "joint")]
    for i, block in enumerate(model.transformer_blocks):
        at = f"blocks.{i}"
        named += [Site(at, "block", "joint"), Site(f"{at}.attn", "branch", "joint")]
        named += attention_sites(f"{at}.attn", block.attn1, core="joint")
        named.append(Site(f"{at}.mlp", "branch", "joint"))
    return as_wide(
        (*named, Site("head", "head")), model.config.num_attention_heads * model.config.attention_head_dim
    )


def layout(model: Any, shape: Sequence[int], text: int) -> tuple[Segment, ...]:
    """Segments of a call on latents of `shape` [B, T, C, H, W] and `text` rows of text: text, then the clip."""
    grid = _grid(model, shape)
    return Segment("text", Grid(text), text), Segment("image", grid, grid.length)


def _grid(model: Any, shape: Sequence[int]) -> Grid:
    """As the patch embedding cuts: what fills no patch is left out."""
    frames, _, height, width = shape[1:]
    of_frames, side, _ = _patch(model)
    return Grid(frames // of_frames, height // side, width // side)


def _patch(model: Any) -> tuple[int, int, int]:
    """Its sides along frames, height and width; CogVideoX 1.0 cuts each frame by itself."""
    side = model.config.patch_size
    return model.config.patch_size_t or 1, side, side


def _unpatched(out: Tensor, grid: Grid, patch: tuple[int, int, int]) -> Tensor:
    """Rows [B, L, C P], channels slowest, to a clip [B, T, C, H, W]."""
    return unpatchify_channels_first(out, grid, patch).transpose(1, CHANNEL_AXIS).contiguous()


def _modulation(norm: Any, temb: Tensor) -> tuple[tuple[Tensor, ...], Streams]:
    """Shift and scale of the clip and of the text, and the gates of both, [B, 1, D] each."""
    shift, scale, gate, text_shift, text_scale, text_gate = modulation(norm, temb, 6)
    return (shift, scale, text_shift, text_scale), Streams(gate, text_gate)


def _modulated(
    norm: nn.Module, x: Streams, shift: Tensor, scale: Tensor, text_shift: Tensor, text_scale: Tensor
) -> Streams:
    return Streams(modulate(norm(x.image), shift, scale), modulate(norm(x.text), text_shift, text_scale))


def _added(x: Streams, gates: Streams, branch: tuple[Tensor, Tensor]) -> Streams:
    clip, text = branch
    return Streams(x.image + gates.image * clip, x.text + gates.text * text)


def _rotate(x_BNLK: Tensor, text: int, table: ImageRotary | None) -> Tensor:
    """Rows after the first `text`, by the table of the clip."""
    if table is None:
        return x_BNLK
    x = x_BNLK[:, :, text:]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    cos, sin = (part.to(x.device).unsqueeze(-3) for part in table)
    return torch.cat([x_BNLK[:, :, :text], (x.float() * cos + turned.float() * sin).to(x.dtype)], 2)


def _of_heads(attn: Any, mask: Tensor, x_BLD: Tensor) -> Tensor:
    """Expand a mask of keys to each head, [B, N, 1, L].

    Raises:
        ShapeError: it is of other rows than the sequence, of which a policy may have taken some.
    """
    B, L, _ = x_BLD.shape
    if mask.shape[-1] != L:
        raise ShapeError(
            f"CogVideoX: attention_mask of {mask.shape[-1]} keys, expected {L} as in the sequence"
        )
    return attn.prepare_attention_mask(mask, L, B).unflatten(0, (B, attn.heads))
