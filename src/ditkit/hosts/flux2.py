"""diffusers' `Flux2Transformer2DModel` (FLUX.2 and FLUX.2 klein, Black Forest Labs 2025) with sites.

B batch, L image rows, S text rows, D width, N heads, K head width. In a joint sequence text comes first, pictures
that are referred to last. All blocks of a kind share their modulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers import transformer_flux2 as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.grid import Segment
from ditkit.core.run import DIRECT, Run, Site
from ditkit.hosts import flux
from ditkit.hosts.attention import dispatched, flip, has_core, opens
from ditkit.hosts.blocks import as_wide, attention_sites, call_block, clip_half, feed, rotate, warn_of_unknown
from ditkit.hosts.streams import Control, JointTokens, Rotary, Streams
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.modulation import modulate

__all__ = ["layout", "restore", "running", "sites", "view"]

opens(host.Flux2AttnProcessor)
opens(host.Flux2ParallelSelfAttnProcessor)


class Times(NamedTuple):
    """The embedded time [B, D], and from it what modulates image and text of double blocks, and single blocks."""

    embedded: Tensor
    image: Tensor
    text: Tensor
    single: Tensor


@stands_for(host.Flux2Attention)
class Flux2Attention(host.Flux2Attention):
    """Attention with `kv` and `core` sites; with a processor other than diffusers' own, without."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        run: Run = DIRECT,
        at: str = "",
        **kwargs: Any,
    ) -> Any:
        text, table = encoder_hidden_states, image_rotary_emb
        if not has_core(self) or table is None or text is None:
            return super().forward(hidden_states, text, attention_mask, table, **kwargs)
        warn_of_unknown(self.processor, kwargs)
        return flux.attend(self, run, at, hidden_states, text, attention_mask, table)


@stands_for(host.Flux2ParallelSelfAttention)
class Flux2ParallelSelfAttention(host.Flux2ParallelSelfAttention):
    """Attention and MLP that share their layers, with `kv` and `core` sites in diffusers' own processor."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        run: Run = DIRECT,
        at: str = "",
        **kwargs: Any,
    ) -> Tensor:
        table = image_rotary_emb
        if not has_core(self) or table is None:
            return super().forward(hidden_states, attention_mask, table, **kwargs)
        warn_of_unknown(self.processor, kwargs)
        both = self.to_qkv_mlp_proj(hidden_states)
        q, k, v, mlp = both.split([*[self.inner_dim] * 3, both.shape[-1] - 3 * self.inner_dim], -1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        position: Any = tuple(table)
        kv = run.site(at + ".kv", keep, KV(flip(k), flip(v), position))
        q, k = rotate(self.norm_q(q), table), rotate(self.norm_k(flip(kv.k)), kv.position)
        masks = () if attention_mask is None else (attention_mask,)
        o = run.site(at + ".core", partial(dispatched, self.processor), flip(q), flip(k), kv.v, *masks)
        o = flip(o).flatten(2, 3).to(q.dtype)
        return self.to_out(torch.cat([o, self.mlp_act_fn(mlp)], -1))


@stands_for(host.Flux2TransformerBlock)
class Flux2TransformerBlock(host.Flux2TransformerBlock):
    """A block of two streams that meet in its attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states
        shift, scale, gate, *mlp_by = _parts(temb_mod_img, 6)
        text_shift, text_scale, text_gate, *text_by = _parts(temb_mod_txt, 6)
        rotary = image_rotary_emb and Rotary.of(image_rotary_emb, text.shape[1])
        attend = partial(self._attend, run, at + ".attn", joint_attention_kwargs or {})
        by = (shift, scale, text_shift, text_scale)
        a_image, a_text = run.site(at + ".attn", attend, Streams(image, text), rotary, *by)
        image = image + gate * a_image
        mlp = partial(feed, self.norm2, self.ff)
        image = image + mlp_by[2] * run.site(at + ".mlp", mlp, image, *mlp_by[:2])
        text = text + text_gate * a_text
        mlp = partial(feed, self.norm2_context, self.ff_context)
        text = text + text_by[2] * run.site(at + ".text.mlp", mlp, text, *text_by[:2])
        return clip_half(text), image

    def _attend(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x: Streams,
        rotary: Rotary | None,
        shift: Tensor,
        scale: Tensor,
        text_shift: Tensor,
        text_scale: Tensor,
    ) -> Streams:
        """Image and text before their gates."""
        return self.attn(
            hidden_states=modulate(self.norm1(x.image), shift, scale),
            encoder_hidden_states=modulate(self.norm1_context(x.text), text_shift, text_scale),
            image_rotary_emb=rotary and rotary[:2],
            run=run,
            at=at,
            **kwargs,
        )


@stands_for(host.Flux2SingleTransformerBlock)
class Flux2SingleTransformerBlock(host.Flux2SingleTransformerBlock):
    """A block of one joint sequence, whose attention and MLP share their layers: one branch."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Any:
        x, S = hidden_states, text_seq_len
        if encoder_hidden_states is not None:
            S, x = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, x], 1)
        shift, scale, gate = _parts(temb_mod, 3)
        rotary = image_rotary_emb and Rotary.of(image_rotary_emb)
        branch = partial(self._branch, run, at + ".attn", joint_attention_kwargs or {})
        x = clip_half(x + gate * run.site(at + ".fused", branch, x, rotary, shift, scale))
        return (x[:, :S], x[:, S:]) if split_hidden_states else x

    def _branch(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x_BLD: Tensor,
        rotary: Rotary | None,
        shift: Tensor,
        scale: Tensor,
    ) -> Tensor:
        h_BLD = modulate(self.norm(x_BLD), shift, scale)
        return self.attn(
            hidden_states=h_BLD, image_rotary_emb=rotary and rotary[:2], run=run, at=at, **kwargs
        )


@stands_for(host.Flux2Transformer2DModel)
class Flux2Transformer2DModel(host.Flux2Transformer2DModel):
    """The transformer: its forward takes and returns what diffusers' does.

    A call that keeps or uses diffusers' own cache of the keys of pictures has no sites.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        timestep: Any = None,
        img_ids: Any = None,
        txt_ids: Any = None,
        guidance: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
        ref_fixed_timestep: float = 0.0,
    ) -> Any:
        inputs = (hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance)
        if kv_cache_mode is not None:
            cached = (kv_cache, kv_cache_mode, num_ref_tokens, ref_fixed_timestep)
            return super().forward(*inputs, joint_attention_kwargs, return_dict, *cached)
        out = self._predict(*inputs, joint_attention_kwargs=joint_attention_kwargs)
        return host.Flux2Transformer2DModelOutput(sample=out) if return_dict else (out,)

    @apply_lora_scale("joint_attention_kwargs")
    def _predict(
        self,
        image: Tensor,
        text: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        run = current()
        times = [t.to(image.dtype) * 1000 for t in (timestep, guidance) if t is not None]
        ids = (_flat(txt_ids), _flat(img_ids))
        by = run.site("time", self._condition, *times)
        tokens = run.site("tokens", self._embed, image, text, *ids)
        stack = partial(self._stack, run, joint_attention_kwargs)
        x = run.site("blocks", stack, tokens.x, by, tokens.rotary)
        out: Tensor = run.site("head", self._head, x.image, by.embedded)
        return out

    def _condition(self, timestep: Tensor, guidance: Tensor | None = None) -> Times:
        temb = self.time_guidance_embed(timestep, guidance)
        layers = (self.double_stream_modulation_img, self.double_stream_modulation_txt)
        return Times(temb, *(layer(temb) for layer in (*layers, self.single_stream_modulation)))

    def _embed(self, image: Tensor, text: Tensor, txt_ids: Tensor, img_ids: Tensor) -> JointTokens:
        x = Streams(self.x_embedder(image), self.context_embedder(text))
        of_image, of_text = self.pos_embed(img_ids), self.pos_embed(txt_ids)
        table = (torch.cat([of_text[0], of_image[0]]), torch.cat([of_text[1], of_image[1]]))
        depths = (len(self.transformer_blocks), len(self.single_transformer_blocks))
        return JointTokens(x, Rotary.of(table, text.shape[1]), Control.of((), (), depths, False))

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any] | None,
        x: Streams,
        by: Times,
        rotary: Rotary,
        start: int = 0,
        stop: int | None = None,
    ) -> Streams:
        """Blocks `start` to `stop`, double ones first."""
        for name, block in _blocks(self)[start:stop]:
            call = self._call_double if name.startswith("blocks") else self._call_single
            x = run.site(name, partial(call, block, run, name, kwargs), x, by, rotary)
        return x

    def _call_double(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any] | None,
        x: Streams,
        by: Times,
        rotary: Rotary,
    ) -> Streams:
        text, image = call_block(
            self,
            block,
            run,
            name,
            hidden_states=x.image,
            encoder_hidden_states=x.text,
            temb_mod_img=by.image,
            temb_mod_txt=by.text,
            image_rotary_emb=rotary[:2],
            joint_attention_kwargs=kwargs,
        )
        return Streams(image, text)

    def _call_single(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any] | None,
        x: Streams,
        by: Times,
        rotary: Rotary,
    ) -> Streams:
        S = x.text.shape[1]
        out = call_block(
            self,
            block,
            run,
            name,
            hidden_states=torch.cat([x.text, x.image], 1),
            encoder_hidden_states=None,
            temb_mod=by.single,
            image_rotary_emb=rotary[:2],
            joint_attention_kwargs=kwargs,
            split_hidden_states=False,
            text_seq_len=None,
        )
        return Streams(out[:, S:], out[:, :S])

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(x_BLD, temb))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("time", "time"), Site("tokens", "tokens", "joint"), Site("blocks", "stack", "joint")]
    for at, block in _blocks(model):
        named.append(Site(at, "block", "joint"))
        if isinstance(block, host.Flux2TransformerBlock):
            named += [Site(f"{at}.attn", "branch", "joint")]
            named += attention_sites(f"{at}.attn", block.attn, core="joint")
            named += [Site(f"{at}.mlp", "branch"), Site(f"{at}.text.mlp", "branch", "text")]
            continue
        named.append(Site(f"{at}.fused", "branch", "joint"))
        if has_core(block.attn):
            inside = (("kv", "kv"), ("core", "core"))
            heads = block.attn.heads
            named += [Site(f"{at}.attn.{name}", kind, "joint", heads=heads) for name, kind in inside]  # type: ignore[arg-type]
    return as_wide((*named, Site("head", "head")), model.inner_dim)


def layout(img_ids: Tensor, txt_ids: Tensor) -> tuple[Segment, ...]:
    """Segments of a call by position ids [L, 4] and [S, 4], or those of each sample: as those of FLUX.1."""
    return flux.layout(_flat(img_ids), _flat(txt_ids))


def _flat(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids


def _blocks(model: Any) -> list[tuple[str, Any]]:
    double, single = model.transformer_blocks, model.single_transformer_blocks
    return [(f"blocks.{i}", b) for i, b in enumerate(double)] + [
        (f"single.{i}", b) for i, b in enumerate(single)
    ]


def _parts(by: Tensor, count: int) -> Sequence[Tensor]:
    """Shifts, scales and gates, [B, 1, D] each."""
    return (by.unsqueeze(1) if by.ndim == 2 else by).chunk(count, -1)
