"""diffusers' `WanTransformer3DModel` (Wan 2.1 and 2.2, Wan Team 2025) with sites.

B batch, L tokens of a clip, S text rows (and before them those of a first picture), D width, N heads, K head
width. Text is only cross-attended: the sequence is the clip's. The two experts of Wan 2.2 are two transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_wan as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment, take_rows, unpatchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.slot import Slot
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import dispatched, flip, has_core, opens
from ditkit.hosts.blocks import as_wide, attention_sites, call_block
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.streams import Modulation
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.modulation import modulate

STACKS = {"blocks": Stacked("blocks", "num_layers")}

__all__ = ["layout", "restore", "running", "sites", "view"]

opens(host.WanAttnProcessor)


class Rotary(NamedTuple):
    """Rotary table of a clip, [1, L, 1, K] each."""

    cos: Tensor
    sin: Tensor

    def rows(self, stream: str, index: Tensor) -> Rotary:
        return Rotary(take_rows(self.cos, index), take_rows(self.sin, index))


class Times(NamedTuple):
    """Embedded times [B, D] and their projection for the blocks [B, 6, D]; Wan 2.2 TI2V: [B, L, D], [B, L, 6, D]."""

    embedded: Tensor
    projected: Tensor

    def rows(self, stream: str, index: Tensor) -> Times:
        if self.projected.ndim == 3:
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


@stands_for(host.WanAttention)
class WanAttention(host.WanAttention):
    """Self-attention has `kv` and `core` sites; cross-attention, or another processor than diffusers', has none."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        run: Run = DIRECT,
        at: str = "",
        **kwargs: Any,
    ) -> Tensor:
        if not has_core(self) or encoder_hidden_states is not None or rotary_emb is None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        q, k, v = host._get_qkv_projections(self, hidden_states, None)
        table: Any = Rotary(*rotary_emb)
        kv = run.site(at + ".kv", keep, KV(flip(self._split(k)), flip(self._split(v)), table))
        # the norm is over all heads together
        q = _rotate(self._split(self.norm_q(q)), table)
        k = _rotate(self._split(self.norm_k(flip(kv.k).flatten(2))), kv.position)
        masks = () if attention_mask is None else (attention_mask,)
        o = run.site(at + ".core", partial(dispatched, self.processor), flip(q), flip(k), kv.v, *masks)
        return self.to_out[1](self.to_out[0](flip(o).flatten(2, 3).type_as(q)))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(2, (self.heads, -1))  # [B, L, N, K]


@stands_for(host.WanTransformerBlock)
class WanTransformerBlock(host.WanTransformerBlock):
    """Self-attention, cross-attention to text, and MLP; the residual stream is summed in float32."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        run: Run = DIRECT,
        at: str = "",
    ) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _parts(self.scale_shift_table + temb.float(), 6)
        attend = partial(self._attend, run, at + ".attn")
        a = run.site(at + ".attn", attend, x, Rotary(*rotary_emb), Modulation(shift, scale))
        x = (x.float() + a * gate).type_as(x)
        x = x + run.site(at + ".cross_attn", self._look, x, text)
        m = run.site(at + ".mlp", self._feed, x, Modulation(mlp_shift, mlp_scale))
        return (x.float() + m.float() * mlp_gate).type_as(x)

    def _attend(self, run: Run, at: str, x_BLD: Tensor, rotary: Rotary, by: Modulation) -> Tensor:
        return self.attn1(_modulated(self.norm1, x_BLD, by), None, None, rotary, run=run, at=at)

    def _look(self, x_BLD: Tensor, text_BSD: Tensor) -> Tensor:
        return self.attn2(self.norm2(x_BLD.float()).type_as(x_BLD), text_BSD, None, None)

    def _feed(self, x_BLD: Tensor, by: Modulation) -> Tensor:
        return self.ffn(_modulated(self.norm3, x_BLD, by))


@stands_for(host.WanTransformer3DModel)
class WanTransformer3DModel(host.WanTransformer3DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run, picture = current(), encoder_hidden_states_image
        times, text = run.site("time", self._condition, timestep, encoder_hidden_states, picture)
        tokens = run.site("tokens", self._embed, hidden_states, times)
        x = run.site("blocks", partial(self._stack, run), tokens.x, tokens.times, tokens.rotary, text)
        out = run.site("head", self._head, x, tokens.times)
        sample = unpatchify(out, _grid(self, hidden_states.shape), tuple(self.config.patch_size))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _condition(self, timestep: Tensor, text: Tensor, picture: Tensor | None) -> tuple[Times, Tensor]:
        """Embed times, and gather the cross-attention tokens: of the picture, if there is one, then of the text."""
        tokens = timestep.shape[1] if timestep.ndim == 2 else None
        embedded, projected, text, picture = self.condition_embedder(
            timestep.flatten(), text, picture, timestep_seq_len=tokens
        )
        rows = text if picture is None else torch.cat([picture, text], 1)
        return Times(embedded, projected.unflatten(-1, (6, -1))), rows

    def _embed(self, clip: Tensor, times: Times) -> ClipTokens:
        x_BLD = self.patch_embedding(clip).flatten(2).transpose(1, 2).contiguous()
        return ClipTokens(x_BLD, times, Rotary(*self.rope(clip)))

    def _stack(
        self,
        run: Run,
        x_BLD: Tensor,
        times: Times,
        rotary: Rotary,
        text_BSD: Tensor,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks `start` to `stop`."""
        for i, block in list(enumerate(self.blocks))[start:stop]:
            apply = partial(self._call_block, block, run, f"blocks.{i}")
            x_BLD = run.site(f"blocks.{i}", apply, x_BLD, times, rotary, text_BSD)
        return x_BLD

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        x_BLD: Tensor,
        times: Times,
        rotary: Rotary,
        text_BSD: Tensor,
    ) -> Tensor:
        return call_block(self, block, run, name, x_BLD, text_BSD, times.projected, tuple(rotary))

    def _head(self, x_BLD: Tensor, times: Times) -> Tensor:
        table = self.scale_shift_table.to(times.embedded.device) + times.embedded.unsqueeze(-2)
        # with layers spread over devices, the last one's is not that of the times
        shift, scale = (part.to(x_BLD.device) for part in _parts(table, 2))
        return self.proj_out(_modulated(self.norm_out, x_BLD, Modulation(shift, scale)))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("time", "time"), Site("tokens", "tokens"), Site("blocks", "stack")]
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}"
        named += [Site(at, "block"), Site(f"{at}.attn", "branch")]
        named += attention_sites(f"{at}.attn", block.attn1)
        named += [Site(f"{at}.cross_attn", "branch"), Site(f"{at}.mlp", "branch")]
    return as_wide(
        (*named, Site("head", "head")), model.config.num_attention_heads * model.config.attention_head_dim
    )


def layout(model: Any, shape: Sequence[int]) -> tuple[Segment, ...]:
    """Build the layout of a call on latents of `shape` [B, C, T, H, W]: one segment."""
    grid = _grid(model, shape)
    return (Segment("image", grid, grid.length),)


class WanInputs(Inputs):
    """Wan from text: UMT5's rows, zeros after the prompt, as the pipeline has them."""

    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        own, out = model.config.in_channels, model.config.out_channels
        if own != out or model.config.image_dim is not None:
            raise ConfigError(
                f"WanTransformer3DModel: in_channels={own}, out_channels={out}, image_dim={model.config.image_dim}: it "
                "is given a first picture, expected a transformer of text alone"
            )
        return own, tuple(model.config.patch_size)

    def slots(self, model: Any) -> Mapping[str, Slot]:
        return {"prompt_embeds": Slot("text", ("S", model.config.text_dim))}

    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": cond.text}


INPUTS = WanInputs()


def _grid(model: Any, shape: Sequence[int]) -> Grid:
    """As the patch embedding cuts: what fills no patch is left out."""
    return Grid(*(n // p for n, p in zip(shape[2:], model.config.patch_size, strict=True)))


def _parts(table: Tensor, count: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates of a table [B, count, D] or [B, L, count, D]: [B, 1, D] or [B, L, D] each."""
    parts = table.chunk(count, -2)
    return parts if table.ndim == 3 else tuple(part.squeeze(-2) for part in parts)


def _modulated(norm: nn.Module, x_BLD: Tensor, by: Modulation) -> Tensor:
    return modulate(norm(x_BLD.float()), *by).type_as(x_BLD)


def _rotate(x_BLNK: Tensor, table: Rotary) -> Tensor:
    even, odd = x_BLNK.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.cos[..., 0::2], table.sin[..., 1::2]
    out = torch.empty_like(x_BLNK)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out
