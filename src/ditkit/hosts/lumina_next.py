"""diffusers' `LuminaNextDiT2DModel` (Lumina-Next, Zhuo et al. 2024) with sites.

B batch, L image rows, S text rows, D width, N heads, K head width. Text is only cross-attended.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusers.models.attention_processor import LuminaAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import lumina_nextdit2d as host
from torch import Tensor, nn

from ditkit.core.grid import Segment, unpatchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import computes_as, flip
from ditkit.hosts.blocks import as_wide, attention_sites, modulation
from ditkit.hosts.lumina_blocks import (
    Place,
    PlacedTokens,
    added,
    attention,
    feed,
    grid_of,
    grouped,
    heads,
    masks,
    rotate,
    scaled,
    stack,
)
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep

STACKS = {"blocks": Stacked("layers", "num_layers")}

__all__ = ["layout", "restore", "running", "sites", "view"]


@computes_as(LuminaAttnProcessor2_0)
def image_attention(
    attn: Any,
    run: Run,
    at: str,
    x_BLD: Tensor,
    context: Tensor,
    mask: Tensor | None = None,
    query_rotary_emb: Any = None,
    key_rotary_emb: Any = None,
    base_sequence_length: int | None = None,
    **unknown: Any,
) -> Tensor:
    """Self-attention of Lumina-Next, [B, L, N, K] before any output layer; norms are over all heads together.

    Args:
        unknown: dropped; the call of cross-attention, which gets the same, warns of them.
    """
    q, k, v = heads(attn, x_BLD, context)
    kv = run.site(at + ".kv", keep, KV(flip(k), flip(v), key_rotary_emb))
    k = flip(kv.k)
    q, k = (
        x if norm is None else norm(x.flatten(2)).view_as(x)
        for norm, x in ((attn.norm_q, q), (attn.norm_k, k))
    )
    q, k = rotate(q, query_rotary_emb), rotate(k, kv.position)
    core = partial(attention, attn.scale, base_sequence_length)
    return flip(run.site(at + ".core", core, flip(q), *grouped(q, k, kv.v), *masks(mask))).to(q.dtype)


@stands_for(host.LuminaNextDiTBlock)
class LuminaNextDiTBlock(host.LuminaNextDiTBlock):
    """Self- and cross-attention share their output layer and norm: one branch."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        temb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Tensor:
        x, place = hidden_states, Place(image_rotary_emb, attention_mask)
        scale, gate, mlp_scale, mlp_gate = modulation(self.norm1, temb, 4)
        attend = partial(self._attend, run, at + ".attn", cross_attention_kwargs or {})
        a = run.site(at + ".attn", attend, x, place, scale, encoder_hidden_states, encoder_mask)
        x = added(x, gate, a)
        return added(x, mlp_gate, run.site(at + ".mlp", partial(feed, self), x, mlp_scale))

    def _attend(
        self,
        run: Run,
        at: str,
        kwargs: dict[str, Any],
        x_BLD: Tensor,
        place: Place,
        scale: Tensor,
        text: Tensor,
        known: Tensor,
    ) -> Tensor:
        h_BLD = scaled(self.norm1.norm(x_BLD), scale)
        own = self.attn1(
            hidden_states=h_BLD,
            encoder_hidden_states=h_BLD,
            attention_mask=place.visible,
            query_rotary_emb=place.phases,
            key_rotary_emb=place.phases,
            run=run,
            at=at,
            **kwargs,
        )
        looked = self.attn2(
            hidden_states=h_BLD,
            encoder_hidden_states=self.norm1_context(text),
            attention_mask=known,
            query_rotary_emb=place.phases,
            key_rotary_emb=None,
            **kwargs,
        )
        o = own + looked * self.gate.tanh().view(1, 1, -1, 1)
        return self.norm2(self.attn2.to_out[0](o.flatten(-2)))


@stands_for(host.LuminaNextDiT2DModel)
class LuminaNextDiT2DModel(host.LuminaNextDiT2DModel):
    """Lumina-Next: its forward takes and returns what diffusers' does."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        image_rotary_emb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        run, text, known = current(), encoder_hidden_states, encoder_mask
        temb = run.site("time", self.time_caption_embed, timestep, text, known)
        x, place = run.site("tokens", self._embed, hidden_states, image_rotary_emb)
        blocks = partial(stack, run, self.layers, partial(self._call_block, cross_attention_kwargs))
        x = run.site("blocks", blocks, x, place, (temb, text, known.bool()))
        out = run.site("head", self.norm_out, x, temb)
        sample = unpatchify(out, grid_of(self, hidden_states.shape), self.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, image: Tensor, table: Tensor) -> PlacedTokens:
        x_BLD, visible, _, phases = self.patch_embedder(image, table)
        return PlacedTokens(x_BLD, Place(phases.to(x_BLD.device), visible))

    def _call_block(
        self,
        kwargs: dict[str, Any] | None,
        block: nn.Module,
        run: Run,
        name: str,
        x_BLD: Tensor,
        place: Place,
        temb: Tensor,
        text: Tensor,
        known: Tensor,
    ) -> Tensor:
        """One block, called as diffusers does; this class has no gradient checkpointing."""
        args = (x_BLD, place.visible, place.phases, text, known)
        return block(*args, temb=temb, cross_attention_kwargs=kwargs, run=run, at=name if run.named else "")


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("time", "time"), Site("tokens", "tokens"), Site("blocks", "stack")]
    for i, block in enumerate(model.layers):
        at = f"blocks.{i}"
        named += [Site(at, "block"), Site(f"{at}.attn", "branch")]
        named += [
            *attention_sites(f"{at}.attn", block.attn1, attention="scaled"),
            Site(f"{at}.mlp", "branch"),
        ]
    return as_wide((*named, Site("head", "head")), model.config.hidden_size)


def layout(model: Any, shape: Sequence[int]) -> tuple[Segment, ...]:
    """Build the layout of a call on latents of `shape` [B, C, H, W]: one segment."""
    grid = grid_of(model, shape)
    return (Segment("image", grid, grid.length),)
