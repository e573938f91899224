"""diffusers' `Lumina2Transformer2DModel` (Lumina-Image 2.0, Qin et al. 2025) with sites.

B batch, L image rows, S text rows, D width, N heads, K head width. One sequence of M = S + L rows, text first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_lumina2 as host
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ditkit.core.grid import Grid, Segment, unpatchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.hosts.attention import computes_as, flip
from ditkit.hosts.blocks import as_wide, attention_sites, call_block, modulation
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
    of_all,
    rotate,
    scaled,
    stack,
)
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.blocks import KV, keep

STACKS = {"blocks": Stacked("layers", "num_layers")}

__all__ = ["layout", "restore", "running", "sites", "view"]


@computes_as(host.Lumina2AttnProcessor2_0)
def joint_attention(
    attn: Any,
    run: Run,
    at: str,
    x_BLD: Tensor,
    context: Tensor,
    mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    base_sequence_length: int | None = None,
) -> Tensor:
    """Self-attention of Lumina 2; queries and keys are normed in each head."""
    q, k, v = heads(attn, x_BLD, context)
    kv = run.site(at + ".kv", keep, KV(flip(k), flip(v), image_rotary_emb))
    k = flip(kv.k)
    q, k = (x if norm is None else norm(x) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
    q, k = rotate(q, image_rotary_emb), rotate(k, kv.position)
    core = partial(_packed_attention, attn.scale, base_sequence_length)
    o = run.site(at + ".core", core, flip(q), *grouped(q, k, kv.v), *masks(mask))
    return attn.to_out[1](attn.to_out[0](flip(o).flatten(2).type_as(q)))


@stands_for(host.Lumina2TransformerBlock)
class Lumina2TransformerBlock(host.Lumina2TransformerBlock):
    """Norms before and after attention and MLP, the latter part of their branch; a text refiner has no gates."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: Tensor,
        temb: Any = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Tensor:
        x, place = hidden_states, Place(image_rotary_emb, attention_mask)
        by = modulation(self.norm1, temb, 4) if self.modulation else (None,) * 4
        attend = partial(self._attend, run, at + ".attn")
        x = added(x, by[1], run.site(at + ".attn", attend, x, place, by[0]))
        return added(x, by[3], run.site(at + ".mlp", partial(feed, self), x, by[2]))

    def _attend(self, run: Run, at: str, x_BMD: Tensor, place: Place, scale: Tensor | None) -> Tensor:
        norm = self.norm1.norm if self.modulation else self.norm1
        h_BMD = scaled(norm(x_BMD), scale)
        return self.norm2(
            self.attn(
                hidden_states=h_BMD,
                encoder_hidden_states=h_BMD,
                attention_mask=place.visible,
                image_rotary_emb=place.phases,
                run=run,
                # in the refiner of text it is diffusers' own, whose mask may have holes
                at=at if self.modulation else "",
            )
        )


@stands_for(host.Lumina2Transformer2DModel)
class Lumina2Transformer2DModel(host.Lumina2Transformer2DModel):
    """Lumina 2: its forward takes and returns what diffusers' does.

    The padding of ragged captions comes between text and image, not last as in diffusers, so that the image
    begins at the same row in all samples.
    """

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        run, mask = current(), encoder_attention_mask
        temb, text = run.site("time", self.time_caption_embed, hidden_states, timestep, encoder_hidden_states)
        tokens = run.site("tokens", partial(self._embed, run), hidden_states, text, mask, temb)
        x = run.site(
            "blocks", partial(stack, run, self.layers, self._call_block), tokens.x, tokens.place, (temb,)
        )
        out = run.site("head", partial(self._head, tokens.place.text), x, temb)
        sample = unpatchify(out, grid_of(self, hidden_states.shape), self.config.patch_size).contiguous()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, run: Run, image: Tensor, text: Tensor, mask: Tensor, temb: Tensor) -> PlacedTokens:
        """Each stream through its refiners, then one sequence, in which padding is zero."""
        patches, text_phases, phases, _, lengths, _ = self.rope_embedder(image, mask)
        x = self.x_embedder(patches)
        for i, block in enumerate(self.context_refiner):
            text = block(text, mask, text_phases, run=run, at=_name(run, "context", i))
        for i, block in enumerate(self.noise_refiner):
            x = block(x, None, phases, temb, run=run, at=_name(run, "noise", i))
        visible, S = _visible(lengths, x.device), max(lengths)
        text = text[:, :S].masked_fill(~visible[..., None], 0)
        # without ragged captions diffusers has no mask either, and attention may take another kernel
        whole = F.pad(visible, (0, x.shape[1]), value=True) if len(set(lengths)) > 1 else None
        place = Place(torch.cat([text_phases[:, :S], phases], 1), whole, S)
        return PlacedTokens(torch.cat([text, x], 1), place)

    def _call_block(
        self, block: nn.Module, run: Run, name: str, x_BMD: Tensor, place: Place, temb: Tensor
    ) -> Tensor:
        return call_block(self, block, run, name, x_BMD, place.visible, place.phases, temb)

    def _head(self, text: int, x_BMD: Tensor, temb: Tensor) -> Tensor:
        return self.norm_out(x_BMD, temb)[:, text:]


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call.

    The refiners of one stream each have branches only: rows are taken, and the stack begins, after them.
    """
    named = [Site("time", "time"), Site("tokens", "tokens", "joint")]
    for name, stream in (("context", "text"), ("noise", "image")):
        for i in range(model.config.num_refiner_layers):
            named += [Site(f"{name}.{i}.{branch}", "branch", stream) for branch in ("attn", "mlp")]
    named.append(Site("blocks", "stack", "joint"))
    for i, block in enumerate(model.layers):
        at = f"blocks.{i}"
        named += [Site(at, "block", "joint"), Site(f"{at}.attn", "branch", "joint")]
        named += attention_sites(f"{at}.attn", block.attn, core="joint", kv="joint")
        named.append(Site(f"{at}.mlp", "branch", "joint"))
    return as_wide((*named, Site("head", "head")), model.config.hidden_size)


def layout(model: Any, shape: Sequence[int], encoder_attention_mask: Tensor) -> tuple[Segment, ...]:
    """Segments of a call on latents of `shape` [B, C, H, W]: text as long as the longest caption, then the image."""
    grid = grid_of(model, shape)
    image = Segment("image", grid, grid.length)
    lengths = encoder_attention_mask.sum(1).tolist()
    S, ragged = max(lengths), len(set(lengths)) > 1
    visible = _visible(lengths, encoder_attention_mask.device) if ragged else None
    return (Segment("text", Grid(S), S, visible), image) if S else (image,)


def _name(run: Run, kind: str, i: int) -> str:
    # no name without handlers: blocks share their code, and torch.compile would specialise on it
    return f"{kind}.{i}" if run.named else ""


def _visible(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Build the mask of text tokens that are not padding, [B, S], S being the longest caption's length."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def _packed_attention(
    scale: float, base: int | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`attention` on rows moved so that padding is last: diffusers' order, and so its order of summation."""
    if mask is None:
        return attention(scale, base, q, k, v)
    mask = of_all(mask, k)
    order = mask.int().argsort(stable=True, dim=-1, descending=True)
    at = order.mT.expand_as(k)
    k, v, mask = k.gather(2, at), v.gather(2, at), mask.gather(-1, order)
    if q.shape[2] < k.shape[2]:
        return attention(scale, base, q, k, v, mask)
    # all queries: a kernel takes them in blocks, whose last may be summed in another order
    packed = attention(scale, base, q.gather(2, order.mT.expand_as(q)), k, v, mask)
    return torch.empty_like(packed).scatter_(2, order.mT.expand_as(packed), packed)
