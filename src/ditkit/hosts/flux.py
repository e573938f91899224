"""diffusers' `FluxTransformer2DModel` (FLUX.1, Black Forest Labs 2024) with sites.

B batch, L image rows, S text rows, D width, N heads, K head width. In a joint sequence text comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_flux as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.slot import Slot
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import dispatched, flip, has_core, opens
from ditkit.hosts.blocks import as_wide, attention_sites, call_block, clip_half, feed, modulation, rotate
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.streams import Control, JointTokens, Rotary, Streams
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.modulation import modulate
from ditkit.nn.narrow import TwoStreams, text_sites

STACKS = {
    "blocks": Stacked("transformer_blocks", "num_layers"),
    "single": Stacked("single_transformer_blocks", "num_single_layers"),
}

__all__ = ["layout", "restore", "running", "sites", "view"]

opens(host.FluxAttnProcessor)


def attend(
    attn: Any,
    run: Run,
    at: str,
    image: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    table: tuple[Tensor, Tensor],
) -> Any:
    """Attention of image [B, L, D] and text [B, S, D] to the same pair, or of one sequence to one."""
    S = 0 if text is None else text.shape[1]
    *own, text_q, text_k, text_v = host._get_qkv_projections(attn, image, text)
    q, k, v = (_split(attn, x) for x in own)
    positions = _cut(table, S, None)
    kv = run.site(at + ".kv", keep, KV(flip(k), flip(v), positions))
    # both sequences are turned at once, as in diffusers; keys from elsewhere have a table of their own
    of_keys = table if kv.position is positions else _joined(_cut(table, 0, S), kv.position)
    q, k, v = attn.norm_q(q), attn.norm_k(flip(kv.k)), flip(kv.v)
    if text is not None:
        q = torch.cat([attn.norm_added_q(_split(attn, text_q)), q], 1)
        k = torch.cat([attn.norm_added_k(_split(attn, text_k)), k], 1)
        v = torch.cat([_split(attn, text_v), v], 1)
    q, k = rotate(q, table), rotate(k, of_keys)
    masks = () if mask is None else (mask,)
    o = run.site(at + ".core", partial(dispatched, attn.processor), flip(q), flip(k), flip(v), *masks)
    o = flip(o).flatten(2, 3).to(q.dtype)
    if text is None:
        return o
    o_text, o_image = o.split_with_sizes([S, o.shape[1] - S], 1)
    o_image = attn.to_out[1](attn.to_out[0](o_image.contiguous()))
    return Streams(o_image, attn.to_add_out(o_text.contiguous()))


def _split(attn: Any, x_BLD: Tensor) -> Tensor:
    return x_BLD.unflatten(-1, (-1, attn.head_dim))  # [B, L, N, K]


@stands_for(host.FluxAttention)
class FluxAttention(host.FluxAttention):
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
        """Image [B, L, D] and text [B, S, D] to the same pair, or one sequence to one."""
        text, table = encoder_hidden_states, image_rotary_emb
        if not has_core(self) or table is None:
            return super().forward(hidden_states, text, attention_mask, table, **kwargs)
        if unused := kwargs.keys() - {"ip_adapter_masks", "ip_hidden_states"}:
            host.logger.warning(f"joint_attention_kwargs {sorted(unused)} are ignored by FluxAttnProcessor.")
        return attend(self, run, at, hidden_states, text, attention_mask, table)


@stands_for(host.FluxTransformerBlock)
class FluxTransformerBlock(host.FluxTransformerBlock, TwoStreams):
    """A block of two streams that meet in its attention."""

    mlps = MappingProxyType(
        {
            "image": ("norm1.linear", "norm2", "ff"),
            "text": ("norm1_context.linear", "norm2_context", "ff_context"),
        }
    )
    of_text = ("norm1_context", "norm2_context", "ff_context")

    def normed_text(self, text: Tensor) -> Tensor:
        normed: Tensor = self.norm1_context.norm(text)
        return normed

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> tuple[Tensor, Tensor]:
        image, (text, rows) = hidden_states, self.split_text(encoder_hidden_states)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.norm1, temb, 6)
        by = modulation(self.norm1_context, temb, 6) if self.owns_text else ()
        rotary = image_rotary_emb and Rotary.of(image_rotary_emb, text.shape[1])
        attend = partial(self._attend, run, at + ".attn", joint_attention_kwargs or {})
        a_image, a_text, *ip_adapter = run.site(
            at + ".attn", attend, Streams(image, rows), rotary, shift, scale, *by[:2]
        )
        image = image + gate * a_image
        mlp = partial(feed, self.norm2, self.ff)
        image = image + mlp_gate * run.site(at + ".mlp", mlp, image, mlp_shift, mlp_scale)
        for extra in ip_adapter:
            image = image + extra
        if not self.owns_text:
            return clip_half(self.pass_text(run, at, encoder_hidden_states)), image
        text = text + by[2] * a_text
        mlp = partial(feed, self.norm2_context, self.ff_context)
        text = text + by[5] * run.site(at + ".text.mlp", mlp, text, *by[3:5])
        return clip_half(self.hand_text(text, rows, *by[:2])), image

    def _attend(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x: Streams,
        rotary: Rotary | None,
        shift: Tensor,
        scale: Tensor,
        *text_by: Tensor,
    ) -> tuple[Tensor, ...]:
        """Image and text before their gates; an IP-Adapter adds a third, which has no gate."""
        return self.attn(
            hidden_states=modulate(self.norm1.norm(x.image), shift, scale),
            encoder_hidden_states=run.site(at + ".text", self.text_rows, x.text, *text_by),
            image_rotary_emb=rotary and rotary[:2],
            run=run,
            at=at,
            **kwargs,
        )


@stands_for(host.FluxSingleTransformerBlock)
class FluxSingleTransformerBlock(host.FluxSingleTransformerBlock):
    """A block of one joint sequence, whose attention and MLP share the output layer: one branch."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> tuple[Tensor, Tensor]:
        S = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        shift, scale, gate = modulation(self.norm, temb, 3)
        rotary = image_rotary_emb and Rotary.of(image_rotary_emb)
        branch = partial(self._branch, run, at + ".attn", joint_attention_kwargs or {})
        x = clip_half(x + gate * run.site(at + ".fused", branch, x, rotary, shift, scale))
        return x[:, :S], x[:, S:]

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
        h_BLD = modulate(self.norm.norm(x_BLD), shift, scale)
        mlp = self.act_mlp(self.proj_mlp(h_BLD))
        attn = self.attn(
            hidden_states=h_BLD, image_rotary_emb=rotary and rotary[:2], run=run, at=at, **kwargs
        )
        return self.proj_out(torch.cat([attn, mlp], 2))


@stands_for(host.FluxTransformer2DModel)
class FluxTransformer2DModel(host.FluxTransformer2DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        img_ids: Any = None,
        txt_ids: Any = None,
        guidance: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Any:
        run, kwargs = current(), dict(joint_attention_kwargs or {})
        if "ip_adapter_image_embeds" in kwargs:
            kwargs["ip_hidden_states"] = self.encoder_hid_proj(kwargs.pop("ip_adapter_image_embeds"))
        ids = torch.cat((_flat(txt_ids, "txt_ids"), _flat(img_ids, "img_ids")))
        depths = (len(self.transformer_blocks), len(self.single_transformer_blocks))
        double, single = controlnet_block_samples or (), controlnet_single_block_samples or ()
        control = Control.of(double, single, depths, controlnet_blocks_repeat)
        tokens = run.site("tokens", self._embed, hidden_states, encoder_hidden_states, ids, control)
        times = [t.to(tokens.x.image.dtype) * 1000 for t in (timestep, guidance) if t is not None]
        temb = run.site("time", self.time_text_embed, *times, pooled_projections)
        x = run.site(
            "blocks", partial(self._stack, run, kwargs), tokens.x, temb, tokens.rotary, tokens.control
        )
        out = run.site("head", self._head, x.image, temb)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _embed(self, image: Tensor, text: Tensor, ids: Tensor, control: Control) -> JointTokens:
        x = Streams(self.x_embedder(image), self.context_embedder(text))
        return JointTokens(x, Rotary.of(self.pos_embed(ids), text.shape[1]), control)

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any],
        x: Streams,
        temb: Tensor,
        rotary: Rotary,
        control: Control,
        start: int = 0,
        stop: int | None = None,
    ) -> Streams:
        """Blocks `start` to `stop`, double ones first; the residual of a block follows it."""
        for i, (name, block) in list(enumerate(_blocks(self)))[start:stop]:
            apply = partial(self._call_block, block, run, name, kwargs)
            x = control.add(run.site(name, apply, x, temb, rotary), i)
        return x

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any],
        x: Streams,
        temb: Tensor,
        rotary: Rotary,
    ) -> Streams:
        text, image = call_block(
            self,
            block,
            run,
            name,
            hidden_states=x.image,
            encoder_hidden_states=x.text,
            temb=temb,
            image_rotary_emb=rotary[:2],
            joint_attention_kwargs=kwargs,
        )
        return Streams(image, text)

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(x_BLD, temb))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens", "joint"), Site("time", "time"), Site("blocks", "stack", "joint")]
    for at, block in _blocks(model):
        double = isinstance(block, host.FluxTransformerBlock)
        named += [
            Site(at, "block", "joint"),
            Site(f"{at}.{'attn' if double else 'fused'}", "branch", "joint"),
        ]
        if double:
            named.append(Site(f"{at}.attn.text", "modulated", "text"))
        named += attention_sites(f"{at}.attn", block.attn, core="joint", kv="image" if double else "joint")
        if double:
            named += [Site(f"{at}.mlp", "branch"), *text_sites(block, at)]
    return as_wide((*named, Site("head", "head")), model.inner_dim)


def layout(img_ids: Tensor, txt_ids: Tensor) -> tuple[Segment, ...]:
    """Segments of a call by position ids [L, 3] and [S, 3]: text, image, then references as context.

    The first id of a token numbers its picture, the others are row and column. A picture that does not fill a
    rectangle is a plain sequence, `Grid(L)`.
    """
    segments = [Segment("text", Grid(len(txt_ids)), len(txt_ids))] if len(txt_ids) else []
    counts = torch.unique_consecutive(img_ids[:, 0], return_counts=True)[1].tolist()
    for i, ids in enumerate(img_ids.split(counts)):
        height, width = (int(n) + 1 for n in (ids[:, 1:3].amax(0) - ids[:, 1:3].amin(0)).tolist())
        grid = Grid(1, height, width) if height * width == len(ids) else Grid(len(ids))
        segments.append(Segment("context" if i else "image", grid, len(ids)))
    return tuple(segments)


class FluxInputs(Inputs):
    """FLUX.1: T5's rows, CLIP's pooled vector, and the scale that a distilled network is told."""

    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        if model.config.out_channels not in (None, model.config.in_channels):
            raise ConfigError(
                f"FluxTransformer2DModel: in_channels={model.config.in_channels} are more than its latents (fill, "
                "depth or canny), expected a transformer of text alone"
            )
        return model.config.in_channels // 4, (2, 2)

    def slots(self, model: Any) -> Mapping[str, Slot]:
        return {
            "prompt_embeds": Slot("text", ("S", model.config.joint_attention_dim)),
            "pooled_prompt_embeds": Slot("vector", (model.config.pooled_projection_dim,)),
        }

    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        assert cond.text is not None
        grid = Grid(1, x.shape[2] // 2, x.shape[3] // 2)
        scale = {"guidance": torch.full_like(t, guidance)} if model.config.guidance_embeds else {}
        return {
            "hidden_states": F.pixel_unshuffle(x, 2).flatten(2).mT,
            "encoder_hidden_states": cond.text,
            "pooled_projections": cond.vector,
            "timestep": t,
            "img_ids": F.pad(grid.coordinates()[:, 1:], (1, 0)).to(x),
            "txt_ids": x.new_zeros(cond.text.shape[1], 3),
            **scale,
        }

    def prediction(self, model: Any, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        return F.pixel_shuffle(out.mT.unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)


INPUTS = FluxInputs()


def _blocks(model: Any) -> list[tuple[str, Any]]:
    double, single = model.transformer_blocks, model.single_transformer_blocks
    return [(f"blocks.{i}", b) for i, b in enumerate(double)] + [
        (f"single.{i}", b) for i, b in enumerate(single)
    ]


def _cut(table: tuple[Tensor, Tensor], start: int, stop: int | None) -> Any:
    return table[0][..., start:stop, :], table[1][..., start:stop, :]


def _joined(text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Join the rotary table of the text tokens with the image's, which may differ between samples."""
    parts = zip(text, image, strict=True)
    return tuple(torch.cat([a.expand(*b.shape[:-2], -1, -1), b], -2) for a, b in parts)


def _flat(ids: Tensor, name: str) -> Tensor:
    if ids.ndim == 3:
        host.logger.warning(f"Passing `{name}` 3d torch.Tensor is deprecated; remove the batch dimension.")
        return ids[0]
    return ids
