"""diffusers' `QwenImageTransformer2DModel` (Qwen-Image, Wu et al. 2025, and its editing models) with sites.

B batch, L image rows, S text rows, D width, N heads, K head width. In a joint sequence text comes first, and its
padding may lie anywhere. Pictures that a picture refers to follow its rows, and may be modulated as if clean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_qwenimage as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment, take_rows
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.slot import Slot
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import computes_as, dispatched, flip
from ditkit.hosts.blocks import (
    as_wide,
    attention_sites,
    call_block,
    chosen,
    clip_half,
    modulated,
    warn_of_unknown,
)
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.streams import Control, JointTokens, Streams
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep
from ditkit.nn.narrow import TwoStreams, text_sites

STACKS = {"blocks": Stacked("transformer_blocks", "num_layers")}

__all__ = ["layout", "restore", "running", "sites", "view"]


class Phases(NamedTuple):
    """Complex rotary table of the image's rows, [L, K / 2], or [B, R, K / 2] of rows chosen for each sample."""

    table: Tensor

    def rows(self, stream: str, index: Tensor) -> Phases:
        return self if stream == "text" else Phases(self.table[index])


class Side(NamedTuple):
    """Side data of the image's rows, and the rotary table of the text's, [S, K / 2].

    Args:
        clean: 1 for rows of pictures that are referred to, int [B, L]; None where all are modulated alike.
    """

    phases: Phases
    text: Tensor
    clean: Tensor | None = None

    def rows(self, stream: str, index: Tensor) -> Side:
        if stream == "text":
            return self._replace(text=self.text[index])
        clean = None if self.clean is None else take_rows(self.clean, index)
        return Side(self.phases.rows(stream, index), self.text, clean)


@computes_as(host.QwenDoubleStreamAttnProcessor2_0)
def attend(
    attn: Any,
    run: Run,
    at: str,
    image: Tensor,
    text: Tensor | None = None,
    mask: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **unknown: Any,
) -> Any:
    """Joint attention of image [B, L, D] and text [B, S, D], whose mask is bool [B, S]."""
    known = encoder_hidden_states_mask
    if text is None or mask is not None or image_rotary_emb is None:
        return attn.processor(attn, image, text, known, mask, image_rotary_emb)
    warn_of_unknown(attn.processor, unknown)
    width, S = attn.inner_dim // attn.heads, text.shape[1]
    q, k, v = (p(image).unflatten(-1, (-1, width)) for p in (attn.to_q, attn.to_k, attn.to_v))
    phases: Any = Phases(image_rotary_emb[0])
    kv = run.site(at + ".kv", keep, KV(flip(k), flip(v), phases))
    q, k = (h if norm is None else norm(h) for norm, h in ((attn.norm_q, q), (attn.norm_k, flip(kv.k))))
    projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    text_q, text_k, text_v = (p(text).unflatten(-1, (-1, width)) for p in projections)
    norms = (attn.norm_added_q, text_q), (attn.norm_added_k, text_k)
    text_q, text_k = (h if norm is None else norm(h) for norm, h in norms)
    q, k = _rotate(q, image_rotary_emb[0]), _rotate(k, kv.position.table)
    text_q, text_k = (_rotate(h, image_rotary_emb[1]) for h in (text_q, text_k))
    q, k, v = (torch.cat(pair, 1) for pair in ((text_q, q), (text_k, k), (text_v, flip(kv.v))))
    masks = () if known is None else (F.pad(known, (0, k.shape[1] - S), value=True)[:, None, None],)
    o = run.site(at + ".core", partial(dispatched, attn.processor), flip(q), flip(k), flip(v), *masks)
    o = flip(o).flatten(2, 3).to(q.dtype)
    o_image = attn.to_out[0](o[:, S:].contiguous())
    if len(attn.to_out) > 1:
        o_image = attn.to_out[1](o_image)
    return Streams(o_image, attn.to_add_out(o[:, :S].contiguous()))


@stands_for(host.QwenImageTransformerBlock)
class QwenImageTransformerBlock(host.QwenImageTransformerBlock, TwoStreams):
    """A block of two streams that meet in its attention."""

    mlps = MappingProxyType(
        {"image": ("img_mod.1", "img_norm2", "img_mlp"), "text": ("txt_mod.1", "txt_norm2", "txt_mlp")}
    )
    of_text = ("txt_mod", "txt_norm1", "txt_norm2", "txt_mlp")

    def normed_text(self, text: Tensor) -> Tensor:
        normed: Tensor = self.txt_norm1(text)
        return normed

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> tuple[Tensor, Tensor]:
        image, known = hidden_states, encoder_hidden_states_mask
        text, rows = self.split_text(encoder_hidden_states)
        side = image_rotary_emb and Side(Phases(image_rotary_emb[0]), image_rotary_emb[1], modulate_index)
        parts, clean = _halves(self.img_mod(temb), self.zero_cond_t and modulate_index is not None)
        text_parts = self._text_modulation(temb) if self.owns_text else ()
        branch = partial(self._attend, run, at + ".attn", joint_attention_kwargs or {})
        by = parts[:2], clean[:2], text_parts[:2]
        a_image, a_text = run.site(at + ".attn", branch, Streams(image, rows), side, known, *by)
        mark = _marked(side)
        image = image + chosen(mark, parts[2], clean[2:3]) * a_image
        feed = partial(_feed, self.img_norm2, self.img_mlp)
        m_image = run.site(at + ".mlp", feed, image, side, parts[3:5], clean[3:5])
        image = image + chosen(mark, parts[5], clean[5:]) * m_image
        if not self.owns_text:
            return clip_half(self.pass_text(run, at, encoder_hidden_states)), clip_half(image)
        text = text + text_parts[2] * a_text
        feed = partial(_feed, self.txt_norm2, self.txt_mlp)
        text = text + text_parts[5] * run.site(at + ".text.mlp", feed, text, None, text_parts[3:5], ())
        return clip_half(self.hand_text(text, rows, *text_parts[:2])), clip_half(image)

    def _text_modulation(self, temb: Tensor) -> tuple[Tensor, ...]:
        return _halves(self.txt_mod(temb.chunk(2)[0] if self.zero_cond_t else temb), False)[0]

    def _attend(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x: Streams,
        side: Side | None,
        known: Tensor | None,
        by: Sequence[Tensor],
        clean: Sequence[Tensor],
        text_by: Sequence[Tensor],
    ) -> Streams:
        """Image and text before their gates."""
        return self.attn(
            hidden_states=modulated(self.img_norm1, x.image, _marked(side), by, clean),
            encoder_hidden_states=run.site(at + ".text", self.text_rows, x.text, *text_by),
            encoder_hidden_states_mask=known,
            image_rotary_emb=side and (side.phases.table, side.text),
            run=run,
            at=at,
            **kwargs,
        )


@stands_for(host.QwenImageTransformer2DModel)
class QwenImageTransformer2DModel(host.QwenImageTransformer2DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Any = None,
        img_shapes: Any = None,
        guidance: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        run, depths = current(), (len(self.transformer_blocks), 0)
        control = Control.of(controlnet_block_samples or (), (), depths, False)
        tokens = run.site(
            "tokens", self._embed, hidden_states, encoder_hidden_states, img_shapes, timestep, control
        )
        x = tokens.x
        # diffusers checks the mask
        known = host.compute_text_seq_len_from_mask(x.text, encoder_hidden_states_mask)[2]
        temb = run.site("time", self._condition, timestep, guidance, additional_t_cond, x.image)
        stack = partial(self._stack, run, attention_kwargs)
        x = run.site("blocks", stack, x, tokens.rotary, temb, known, tokens.control)
        out = run.site("head", self._head, x.image, temb.chunk(2)[0] if self.zero_cond_t else temb)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _embed(
        self, image: Tensor, text: Tensor, img_shapes: Any, timestep: Tensor, control: Control
    ) -> JointTokens:
        x = Streams(self.img_in(image), self.txt_in(self.txt_norm(text)))
        clean = None
        if self.zero_cond_t:
            rows = [[0] * prod(one[0]) + [1] * sum(map(prod, one[1:])) for one in img_shapes]
            clean = torch.tensor(rows, device=timestep.device, dtype=torch.int)
        table, of_text = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=x.image.device)
        return JointTokens(x, Side(Phases(table), of_text, clean), control)

    def _condition(self, timestep: Tensor, guidance: Tensor | None, more: Tensor | None, x: Tensor) -> Tensor:
        """Embed the time, [B, D]; and, where clean pictures are modulated by another, time 0 after it, [2 B, D]."""
        timestep = timestep.to(x.dtype)
        if self.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])
        guided = () if guidance is None else (guidance.to(x.dtype) * 1000,)
        return self.time_text_embed(timestep, *guided, x, more)

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any] | None,
        x: Streams,
        side: Side,
        temb: Tensor,
        known: Tensor | None,
        control: Control,
        start: int = 0,
        stop: int | None = None,
    ) -> Streams:
        """Blocks `start` to `stop`; the residual of a block follows it."""
        for i, block in list(enumerate(self.transformer_blocks))[start:stop]:
            apply = partial(self._call_block, block, run, f"blocks.{i}", kwargs)
            x = control.add(run.site(f"blocks.{i}", apply, x, side, temb, known), i)
        return x

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any] | None,
        x: Streams,
        side: Side,
        temb: Tensor,
        known: Tensor | None,
    ) -> Streams:
        text, image = call_block(
            self,
            block,
            run,
            name,
            hidden_states=x.image,
            encoder_hidden_states=x.text,
            encoder_hidden_states_mask=known,
            temb=temb,
            image_rotary_emb=(side.phases.table, side.text),
            joint_attention_kwargs=kwargs,
            modulate_index=side.clean,
        )
        return Streams(image, text)

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(x_BLD, temb))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens", "joint"), Site("time", "time"), Site("blocks", "stack", "joint")]
    for i, block in enumerate(model.transformer_blocks):
        at = f"blocks.{i}"
        named += [Site(at, "block", "joint"), Site(f"{at}.attn", "branch", "joint")]
        named.append(Site(f"{at}.attn.text", "modulated", "text"))
        named += attention_sites(f"{at}.attn", block.attn, core="joint")
        named += [Site(f"{at}.mlp", "branch"), *text_sites(block, at)]
    return as_wide((*named, Site("head", "head")), model.inner_dim)


def layout(
    model: Any, img_shapes: Sequence[Any], text: int, encoder_hidden_states_mask: Tensor | None = None
) -> tuple[Segment, ...]:
    """Segments of a call on pictures of `img_shapes`: text, the picture, then pictures that it refers to.

    A model of layers predicts all but the last of its pictures, as one clip.
    """
    known = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
    valid = None if known is None or bool(known.all()) else known
    shapes = img_shapes[0] if isinstance(img_shapes[0], list) else [img_shapes[0]]
    grids = [Grid(*shape) for shape in shapes]
    if model.config.use_layer3d_rope:
        grids = [Grid(len(grids) - 1, grids[0].height, grids[0].width), grids[-1]]
    streams = ["image", *["context"] * (len(grids) - 1)]
    parts = [Segment(stream, grid, grid.length) for stream, grid in zip(streams, grids, strict=True)]
    return Segment("text", Grid(text), text, valid), *parts


class QwenImageInputs(Inputs):
    """Qwen-Image: rows of its language model, and their mask."""

    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        if model.zero_cond_t or model.config.use_layer3d_rope or model.config.use_additional_t_cond:
            raise ConfigError(
                "QwenImageTransformer2DModel: it edits pictures or makes layers, expected one of text alone"
            )
        return model.config.in_channels // 4, (2, 2)

    def slots(self, model: Any) -> Mapping[str, Slot]:
        return {
            "prompt_embeds": Slot("text", ("S", model.config.joint_attention_dim)),
            "prompt_embeds_mask": Slot("text_mask", ("S",), optional=True),
        }

    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        shape = (1, x.shape[2] // 2, x.shape[3] // 2)
        return {
            "hidden_states": F.pixel_unshuffle(x, 2).flatten(2).mT,
            "encoder_hidden_states": cond.text,
            "encoder_hidden_states_mask": cond.text_mask,
            "timestep": t,
            "img_shapes": [[shape]] * len(x),
            **({"guidance": torch.full_like(t, guidance)} if model.config.guidance_embeds else {}),
        }

    def prediction(self, model: Any, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        return F.pixel_shuffle(out.mT.unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)


INPUTS = QwenImageInputs()


def _halves(modulation: Tensor, two: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Six parts [B, 1, D] of the time and, if there are two, of clean pictures."""
    parts = modulation.unsqueeze(1).chunk(6, -1)
    if not two:
        return parts, ()
    pairs = [part.chunk(2) for part in parts]
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def _marked(side: Side | None) -> Tensor | None:
    return None if side is None or side.clean is None else side.clean != 0


def _feed(
    norm: nn.Module,
    mlp: nn.Module,
    x_BLD: Tensor,
    side: Side | None,
    by: Sequence[Tensor],
    clean: Sequence[Tensor],
) -> Tensor:
    """Compute the MLP branch before its gate, row by row."""
    return mlp(modulated(norm, x_BLD, _marked(side), by, clean))


def _rotate(x_BLNK: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BLNK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(3).type_as(x_BLNK)
