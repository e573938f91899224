"""diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, Esser et al. 2024) with sites.

B batch, L image rows, S text rows, D width. In a joint sequence the image comes first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_sd3 as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.grid import Grid, Segment, unpatchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.slot import Slot
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import computes_as
from ditkit.hosts.blocks import (
    as_wide,
    attend,
    attention_sites,
    call_block,
    feed_in_chunks,
    merge_heads,
    modulation,
    split_heads,
)
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.streams import Control, JointTokens, Streams
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV
from ditkit.nn.modulation import modulate
from ditkit.nn.narrow import TwoStreams, text_sites

STACKS = {"blocks": Stacked("transformer_blocks", "num_layers", (-1,), ("dual_attention_layers",))}
"""The last block has no text to hand on."""

__all__ = ["layout", "restore", "running", "sites", "view"]


@computes_as(SD3IPAdapterJointAttnProcessor2_0, beyond=True)
def attend_to_pictures(
    attn: Any,
    run: Run,
    at: str,
    image: Tensor,
    text: Tensor | None = None,
    mask: Tensor | None = None,
    ip_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Joint attention, beside which the image attends to itself and to the pictures of an IP-Adapter."""
    adapter = attn.processor
    if adapter.scale == 0 or ip_hidden_states is None:
        return attend(attn, run, at, image, text, **kwargs)
    pictures = adapter.norm_ip(ip_hidden_states, temb=temb)
    k_ip, v_ip = (split_heads(attn, project(pictures)) for project in (adapter.to_k_ip, adapter.to_v_ip))

    def beside(q: Tensor, kv: KV) -> Tensor:
        q, k = adapter.norm_q(q), torch.cat([adapter.norm_k(kv.k), adapter.norm_ip_k(k_ip)], 2)
        v = torch.cat([kv.v, v_ip], 2)
        o = run.site(at + ".ip.core", F.scaled_dot_product_attention, q, k, v)
        return merge_heads(o).to(q.dtype) * adapter.scale

    return attend(attn, run, at, image, text, beside=beside, **kwargs)


@stands_for(host.JointTransformerBlock)
class JointTransformerBlock(host.JointTransformerBlock, TwoStreams):
    """A block of two streams that meet in its attention; in 3.5 medium the image then attends to itself too."""

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
        joint_attention_kwargs: dict[str, Any] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> tuple[Tensor | None, Tensor]:
        image, (text, rows) = hidden_states, self.split_text(encoder_hidden_states)
        kwargs = joint_attention_kwargs or {}
        parts = modulation(self.norm1, temb, 9 if self.use_dual_attention else 6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual = parts
        by = self._text_modulation(temb, text) if self.owns_text else ()
        attend = partial(self._attend, run, at + ".attn", kwargs)
        a_image, *a_text = run.site(at + ".attn", attend, Streams(image, rows), shift, scale, *by[:2])
        image = image + gate * a_image
        if dual:
            again = partial(self._attend_again, run, at + ".attn2", kwargs)
            image = image + dual[2] * run.site(at + ".attn2", again, hidden_states, *dual[:2])
        feed = partial(feed_in_chunks, self, self.norm2, self.ff)
        image = image + mlp_gate * run.site(at + ".mlp", feed, image, mlp_shift, mlp_scale)
        if self.context_pre_only:
            return None, image
        if not self.owns_text:
            return self.pass_text(run, at, encoder_hidden_states), image
        text = text + by[2] * a_text[0]
        feed = partial(feed_in_chunks, self, self.norm2_context, self.ff_context)
        text = text + by[5] * run.site(at + ".text.mlp", feed, text, *by[3:5])
        return self.hand_text(text, rows, *by[:2]), image

    def _text_modulation(self, temb: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Six parts; in the last block, whose text ends with its attention, shift and scale."""
        norm = self.norm1_context
        if not self.context_pre_only:
            return modulation(norm, temb, 6)
        scale, shift = norm.linear(norm.silu(temb).to(text.dtype)).unsqueeze(1).chunk(2, -1)
        return shift, scale

    def _attend(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x: Streams,
        shift: Tensor,
        scale: Tensor,
        *text_by: Tensor,
    ) -> tuple[Tensor, ...]:
        """Image and text before their gates; in the last block the image alone."""
        out = self.attn(
            hidden_states=modulate(self.norm1.norm(x.image), shift, scale),
            encoder_hidden_states=run.site(at + ".text", self.text_rows, x.text, *text_by),
            run=run,
            at=at,
            **kwargs,
        )
        return out[:1] if self.context_pre_only else out

    def _attend_again(
        self, run: Run, at: str, kwargs: Mapping[str, Any], x_BLD: Tensor, shift: Tensor, scale: Tensor
    ) -> Tensor:
        h_BLD = modulate(self.norm1.norm(x_BLD), shift, scale)
        return self.attn2(hidden_states=h_BLD, run=run, at=at, **kwargs)


@stands_for(host.SD3Transformer2DModel)
class SD3Transformer2DModel(host.SD3Transformer2DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: Collection[int] | None = None,
    ) -> Any:
        run, kwargs = current(), dict(joint_attention_kwargs or {})
        control = _control(block_controlnet_hidden_states or (), self.transformer_blocks)
        tokens = run.site("tokens", self._embed, hidden_states, encoder_hidden_states, control)
        temb = run.site("time", self.time_text_embed, timestep, pooled_projections)
        if "ip_adapter_image_embeds" in kwargs:
            pictures = self.image_proj(kwargs.pop("ip_adapter_image_embeds"), timestep)
            kwargs["ip_hidden_states"], kwargs["temb"] = pictures
        stack = partial(self._stack, run, kwargs, skip_layers or ())
        x = run.site("blocks", stack, tokens.x, temb, tokens.control)
        out = run.site("head", self._head, x.image, temb)
        sample = unpatchify(out, _grid(self, hidden_states.shape), self.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, image: Tensor, text: Tensor, control: Control) -> JointTokens:
        x = Streams(self.pos_embed(image).contiguous(), self.context_embedder(text))
        return JointTokens(x, None, control)

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any],
        skipped: Collection[int],
        x: Streams,
        temb: Tensor,
        control: Control,
        start: int = 0,
        stop: int | None = None,
    ) -> Streams:
        """Blocks `start` to `stop`; the residual of a block follows it even if the block is skipped."""
        for i, (name, block) in list(enumerate(_blocks(self)))[start:stop]:
            if i not in skipped:
                x = run.site(name, partial(self._call_block, block, run, name, kwargs), x, temb)
            x = control.add(x, i)
        return x

    def _call_block(
        self, block: nn.Module, run: Run, name: str, kwargs: dict[str, Any], x: Streams, temb: Tensor
    ) -> Streams:
        """One block; the last one hands the text on as it was."""
        text, image = call_block(
            self,
            block,
            run,
            name,
            hidden_states=x.image,
            encoder_hidden_states=x.text,
            temb=temb,
            joint_attention_kwargs=kwargs,
        )
        return Streams(image, x.text if text is None else text)

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(x_BLD, temb))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens", "joint"), Site("time", "time"), Site("blocks", "stack", "joint")]
    for at, block in _blocks(model):
        returned = "image" if block.context_pre_only else "joint"
        named += [Site(at, "block", "joint"), Site(at + ".attn", "branch", returned)]
        named.append(Site(at + ".attn.text", "modulated", "text"))
        named += attention_sites(at + ".attn", block.attn, core="joint")
        if type(block.attn.processor) is SD3IPAdapterJointAttnProcessor2_0:
            named.append(Site(at + ".attn.ip.core", "core", heads=block.attn.heads, over=("image", "prompt")))
        if block.use_dual_attention:
            named += [Site(at + ".attn2", "branch"), *attention_sites(at + ".attn2", block.attn2)]
        named.append(Site(at + ".mlp", "branch"))
        if not block.context_pre_only:
            named += text_sites(block, at)
    return as_wide((*named, Site("head", "head")), model.inner_dim)


def layout(model: nn.Module, shape: Sequence[int], text: int) -> tuple[Segment, ...]:
    """Segments of a call on latents of `shape` [B, C, H, W] and `text` rows of text: image, then text."""
    grid = _grid(model, shape)
    return Segment("image", grid, grid.length), Segment("text", Grid(text), text)


class SD3Inputs(Inputs):
    """Stable Diffusion 3: rows and pooled vectors of its encoders, side by side as the pipeline has them."""

    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        return model.config.in_channels, (model.config.patch_size,) * 2

    def slots(self, model: Any) -> Mapping[str, Slot]:
        return {
            "prompt_embeds": Slot("text", ("S", model.config.joint_attention_dim)),
            "pooled_prompt_embeds": Slot("vector", (model.config.pooled_projection_dim,)),
        }

    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": cond.text,
            "pooled_projections": cond.vector,
            "timestep": 1000 * t,
        }


INPUTS = SD3Inputs()


def _grid(model: Any, shape: Sequence[int]) -> Grid:
    patch = model.config.patch_size
    # as the patch embedding does, which drops rows and columns that do not fill a patch
    return Grid(1, shape[-2] // patch, shape[-1] // patch)


def _blocks(model: Any) -> list[tuple[str, Any]]:
    return [(f"blocks.{i}", block) for i, block in enumerate(model.transformer_blocks)]


def _control(residuals: Sequence[Tensor], blocks: Sequence[Any] | nn.ModuleList) -> Control:
    """Each residual for an equal span of blocks; the last block, whose text ends, has none."""
    per_block = len(residuals) / len(blocks)
    place = [int(i * per_block) for i in range(len(blocks))]
    ends = [not residuals or block.context_pre_only for block in blocks]
    return Control(tuple(residuals), tuple(None if e else p for e, p in zip(ends, place, strict=True)))
