"""diffusers' `LTXVideoTransformer3DModel` (LTX-Video, HaCohen et al. 2024) with sites.

B batch, L tokens of a clip, S text rows, D width, N heads, K head width. Text is only cross-attended. Where a first
picture is given, every token has its own time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_ltx as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.grid import Grid, Segment, take_rows
from ditkit.core.run import DIRECT, Run, Site
from ditkit.hosts.attention import dispatched, flip, has_core, opens
from ditkit.hosts.blocks import as_wide, attention_sites, call_block, merge_heads, split_heads
from ditkit.hosts.streams import Modulation
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.modulation import modulate

__all__ = ["layout", "restore", "running", "sites", "view"]

opens(host.LTXVideoAttnProcessor)


class Rotary(NamedTuple):
    """Rotary table of all heads together, [B, L, D] each."""

    cos: Tensor
    sin: Tensor

    def rows(self, stream: str, index: Tensor) -> Rotary:
        return Rotary(take_rows(self.cos, index), take_rows(self.sin, index))


class Times(NamedTuple):
    """Embedded times and their projection for the blocks, [B, 1, D] and [B, 1, 6 D]; or [B, L, ...], one a token."""

    embedded: Tensor
    projected: Tensor

    def rows(self, stream: str, index: Tensor) -> Times:
        if self.projected.shape[1] == 1:
            return self
        return Times(take_rows(self.embedded, index), take_rows(self.projected, index))


class ClipTokens(NamedTuple):
    """Embedded tokens [B, L, D] and all that is aligned with them: what the `tokens` site returns."""

    x: Tensor
    times: Times
    rotary: Rotary

    def rows(self, stream: str, index: Tensor) -> ClipTokens:
        x = take_rows(self.x, index)
        return ClipTokens(x, self.times.rows(stream, index), self.rotary.rows(stream, index))


@stands_for(host.LTXAttention)
class LTXAttention(host.LTXAttention):
    """Self-attention has `kv` and `core` sites; cross-attention, or another processor than diffusers', has none."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        run: Run = DIRECT,
        at: str = "",
        **kwargs: Any,
    ) -> Tensor:
        is_cross = encoder_hidden_states is not None or attention_mask is not None or image_rotary_emb is None
        if not has_core(self) or is_cross:
            rest = (encoder_hidden_states, attention_mask, image_rotary_emb)
            return super().forward(hidden_states, *rest, **kwargs)
        table: Any = Rotary(*image_rotary_emb)
        q, k, v = (project(hidden_states) for project in (self.to_q, self.to_k, self.to_v))
        kv = run.site(at + ".kv", keep, KV(split_heads(self, k), split_heads(self, v), table))
        # norm and rotation are of all heads together
        q = host.apply_rotary_emb(self.norm_q(q), table)
        k = host.apply_rotary_emb(self.norm_k(merge_heads(kv.k)), kv.position)
        core = partial(dispatched, self.processor)
        o = run.site(at + ".core", core, split_heads(self, q), split_heads(self, k), kv.v)
        return self.to_out[1](self.to_out[0](flip(o).flatten(2, 3).to(q.dtype)))


@stands_for(host.LTXVideoTransformerBlock)
class LTXVideoTransformerBlock(host.LTXVideoTransformerBlock):
    """Self-attention, cross-attention to text, and MLP."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Tensor:
        x, text, known = hidden_states, encoder_hidden_states, encoder_attention_mask
        table = self.scale_shift_table[None, None].to(temb.device)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (table + temb.unflatten(-1, (6, -1))).unbind(2)
        rotary = image_rotary_emb and Rotary(*image_rotary_emb)
        attend = partial(self._attend, run, at + ".attn")
        x = x + run.site(at + ".attn", attend, x, rotary, Modulation(shift, scale)) * gate
        x = x + run.site(at + ".cross_attn", self._look, x, text, known)
        return x + run.site(at + ".mlp", self._feed, x, Modulation(mlp_shift, mlp_scale)) * mlp_gate

    def _attend(self, run: Run, at: str, x_BLD: Tensor, rotary: Rotary | None, by: Modulation) -> Tensor:
        return self.attn1(
            hidden_states=modulate(self.norm1(x_BLD), *by), image_rotary_emb=rotary, run=run, at=at
        )

    def _look(self, x_BLD: Tensor, text_BSD: Tensor, known: Tensor | None) -> Tensor:
        return self.attn2(x_BLD, encoder_hidden_states=text_BSD, attention_mask=known)

    def _feed(self, x_BLD: Tensor, by: Modulation) -> Tensor:
        return self.ff(modulate(self.norm2(x_BLD), *by))


@stands_for(host.LTXVideoTransformer3DModel)
class LTXVideoTransformer3DModel(host.LTXVideoTransformer3DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: Any = None,
        video_coords: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        run, clip, known = current(), hidden_states, encoder_attention_mask
        if known is not None and known.ndim == 2:
            known = ((1 - known.to(clip.dtype)) * -10000.0).unsqueeze(1)
        times = run.site("time", partial(self._condition, clip), timestep)
        where = (num_frames, height, width, rope_interpolation_scale, video_coords)
        tokens = run.site("tokens", partial(self._embed, where), clip, times)
        text = self.caption_projection(encoder_hidden_states).view(len(clip), -1, tokens.x.shape[-1])
        stack = partial(self._stack, run)
        x = run.site("blocks", stack, tokens.x, tokens.times, tokens.rotary, text, known)
        out = run.site("head", self._head, x, tokens.times)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _condition(self, clip: Tensor, timestep: Tensor) -> Times:
        # the layer of the tokens decides the type, as in diffusers
        dtype = self.proj_in(clip[:, :1]).dtype
        projected, embedded = self.time_embed(timestep.flatten(), batch_size=len(clip), hidden_dtype=dtype)
        return Times(*(part.view(len(clip), -1, part.shape[-1]) for part in (embedded, projected)))

    def _embed(self, where: tuple[Any, ...], clip: Tensor, times: Times) -> ClipTokens:
        return ClipTokens(self.proj_in(clip), times, Rotary(*self.rope(clip, *where)))

    def _stack(
        self,
        run: Run,
        x_BLD: Tensor,
        times: Times,
        rotary: Rotary,
        text: Tensor,
        known: Tensor | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks `start` to `stop`; `known` is a bias of text, [B, 1, S]."""
        for i, block in list(enumerate(self.transformer_blocks))[start:stop]:
            apply = partial(self._call_block, block, run, f"blocks.{i}")
            x_BLD = run.site(f"blocks.{i}", apply, x_BLD, times, rotary, text, known)
        return x_BLD

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        x_BLD: Tensor,
        times: Times,
        rotary: Rotary,
        text: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        return call_block(
            self,
            block,
            run,
            name,
            hidden_states=x_BLD,
            encoder_hidden_states=text,
            temb=times.projected,
            image_rotary_emb=tuple(rotary),
            encoder_attention_mask=known,
        )

    def _head(self, x_BLD: Tensor, times: Times) -> Tensor:
        table = self.scale_shift_table[None, None] + times.embedded[:, :, None]
        return self.proj_out(modulate(self.norm_out(x_BLD), table[:, :, 0], table[:, :, 1]))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("time", "time"), Site("tokens", "tokens"), Site("blocks", "stack")]
    for i, block in enumerate(model.transformer_blocks):
        at = f"blocks.{i}"
        named += [Site(at, "block"), Site(f"{at}.attn", "branch")]
        named += attention_sites(f"{at}.attn", block.attn1)
        named += [Site(f"{at}.cross_attn", "branch"), Site(f"{at}.mlp", "branch")]
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return as_wide((*named, Site("head", "head")), width)


def layout(
    shape: Sequence[int],
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[Segment, ...]:
    """Build the layout of a call on latents of `shape` [B, L, C]: one segment.

    Tokens whose coordinates are given, not their number along each axis, are a plain sequence, `Grid(L)`.
    """
    sides = (num_frames, height, width)
    grid = Grid(shape[1]) if None in sides else Grid(*map(int, sides))  # type: ignore[arg-type]
    return (Segment("image", grid if grid.length == shape[1] else Grid(shape[1]), shape[1]),)
