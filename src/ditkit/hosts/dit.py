"""diffusers' `BasicTransformerBlock`, of which DiT, PixArt and Latte are made, with sites.

B batch, L image rows, S text rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention as host_attention
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import dit_transformer_2d as host
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment, Tokens, unpatchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.slot import Slot
from ditkit.core.transform import Stacked
from ditkit.hosts.blocks import as_wide, attention_sites, call_block, feed_in_chunks, modulation
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.modulation import modulate

STACKS = {"blocks": Stacked("transformer_blocks", "num_layers", (0,))}
"""The head is conditioned by block 0's embedding of time."""


@stands_for(host_attention.BasicTransformerBlock)
class BasicTransformerBlock(host_attention.BasicTransformerBlock):
    """The block of DiT, and that of PixArt and Latte; what else diffusers makes of this class has no sites."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        run: Run = DIRECT,
        at: str = "",
    ) -> Tensor:
        kwargs = cross_attention_kwargs or {}
        if _is_dit(self) and attention_mask is None and "gligen" not in kwargs:
            return self._under_zero(run, at, kwargs, hidden_states, timestep, class_labels)
        if _is_pixart(self) and "gligen" not in kwargs:
            text, known = encoder_hidden_states, encoder_attention_mask
            return self._under_single(run, at, kwargs, hidden_states, timestep, attention_mask, text, known)
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )

    def _under_zero(
        self, run: Run, at: str, kwargs: Mapping[str, Any], x_BLD: Tensor, timestep: Any, label: Any
    ) -> Tensor:
        """adaLN-Zero (DiT, section 3.2): the block embeds time and class itself."""
        c_BD = self.norm1.emb(timestep, label, hidden_dtype=x_BLD.dtype)
        shift, scale, gate, *mlp = modulation(self.norm1, c_BD, 6)
        attend = partial(self._attend, self.norm1.norm, run, at + ".attn", kwargs)
        x_BLD = x_BLD + gate * run.site(at + ".attn", attend, x_BLD, shift, scale)
        feed = partial(feed_in_chunks, self, self.norm3, self.ff)
        return x_BLD + mlp[2] * run.site(at + ".mlp", feed, x_BLD, *mlp[:2])

    def _under_single(
        self,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x_BLD: Tensor,
        times: Tensor,
        mask_bias: Tensor | None,
        text: Tensor | None,
        known: Tensor | None,
    ) -> Tensor:
        """adaLN-single (PixArt-alpha, section 2.3): six parts of the time [B, 6 D] plus a table of the block.

        Args:
            seen, known: biases of the image's rows [B, 1, L] and of the text's [B, 1, S].
        """
        shift, scale, gate, *mlp = (self.scale_shift_table + times.unflatten(-1, (6, -1))).chunk(6, 1)
        attend = partial(self._attend, self.norm1, run, at + ".attn", kwargs)
        # a sum has the strides of its first term, and bf16 products of other strides other bits
        x_BLD = gate * run.site(at + ".attn", attend, x_BLD, shift, scale, mask_bias) + x_BLD
        if self.attn2 is not None:
            x_BLD = run.site(at + ".cross_attn", partial(self._look, kwargs), x_BLD, text, known) + x_BLD
        feed = partial(feed_in_chunks, self, self.norm2, self.ff)
        return mlp[2] * run.site(at + ".mlp", feed, x_BLD, *mlp[:2]) + x_BLD

    def _attend(
        self,
        norm: nn.Module,
        run: Run,
        at: str,
        kwargs: Mapping[str, Any],
        x_BLD: Tensor,
        shift: Tensor,
        scale: Tensor,
        mask_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention branch before its gate."""
        h_BLD = modulate(norm(x_BLD), shift, scale)
        return self.attn1(h_BLD, attention_mask=mask_bias, run=run, at=at, **kwargs)

    def _look(
        self, kwargs: Mapping[str, Any], x_BLD: Tensor, text_BSD: Tensor | None, known: Tensor | None
    ) -> Tensor:
        return self.attn2(x_BLD, encoder_hidden_states=text_BSD, attention_mask=known, **kwargs)


def call_basic_block(
    model: Any,
    block: nn.Module,
    run: Run,
    name: str,
    kwargs: dict[str, Any] | None,
    x_BLD: Tensor,
    timestep: Any,
    mask_bias: Tensor | None = None,
    text: Tensor | None = None,
    known: Tensor | None = None,
    label: Any = None,
) -> Tensor:
    """`call_block`, with all parameters of a basic block."""
    return call_block(
        model,
        block,
        run,
        name,
        x_BLD,
        attention_mask=mask_bias,
        encoder_hidden_states=text,
        encoder_attention_mask=known,
        timestep=timestep,
        cross_attention_kwargs=kwargs,
        class_labels=label,
        added_cond_kwargs=None,
    )


def _is_dit(block: Any) -> bool:
    """Return whether a block is self-attention and MLP under adaLN-Zero, and no more."""
    return block.use_ada_layer_norm_zero and block.attn2 is None and block.pos_embed is None


def _is_pixart(block: Any) -> bool:
    """Return whether a block is self-attention, cross-attention or none, and MLP under adaLN-single, and no more."""
    plain = block.pos_embed is None and not block.only_cross_attention
    return block.use_ada_layer_norm_single and plain


__all__ = ["layout", "restore", "running", "sites", "view"]


@stands_for(host.DiTTransformer2DModel)
class DiTTransformer2DModel(host.DiTTransformer2DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict for samples [B, C, H, W] of equal sides.

        Raises:
            ShapeError: the sides differ, which diffusers would fold into a square all the same.
        """
        run = current()
        (segment,) = layout(self, hidden_states.shape)
        tokens = run.site("tokens", self._embed, hidden_states)
        stack = partial(self._stack, run, cross_attention_kwargs)
        x_BLD = run.site("blocks", stack, tokens.x, timestep, class_labels)
        # after the blocks, for a training run to draw its dropped labels in the order of diffusers
        embed = partial(self.transformer_blocks[0].norm1.emb, hidden_dtype=x_BLD.dtype)
        c_BD = run.site("time", embed, timestep, class_labels)
        out = run.site("head", self._head, x_BLD, c_BD)
        sample = unpatchify(out, segment.grid, self.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, x: Tensor) -> Tokens:
        return Tokens(self.pos_embed(x))

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any] | None,
        x_BLD: Tensor,
        timestep: Any,
        class_labels: Any,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks `start` to `stop`."""
        for name, block in _blocks(self)[start:stop]:
            apply = partial(self._call_block, block, run, name, kwargs)
            x_BLD = run.site(name, apply, x_BLD, timestep, class_labels)
        return x_BLD

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any] | None,
        x_BLD: Tensor,
        timestep: Any,
        class_labels: Any,
    ) -> Tensor:
        return call_basic_block(self, block, run, name, kwargs, x_BLD, timestep, label=class_labels)

    def _head(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.proj_out_1(F.silu(c_BD)).unsqueeze(1).chunk(2, -1)
        return self.proj_out_2(modulate(self.norm_out(x_BLD), shift, scale))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens"), Site("blocks", "stack")]
    for at, block in _blocks(model):
        named += [Site(at, "block"), Site(at + ".attn", "branch")]
        named += [*attention_sites(at + ".attn", block.attn1), Site(at + ".mlp", "branch")]
    return as_wide((*named, Site("time", "time"), Site("head", "head")), model.inner_dim)


def layout(model: Any, shape: Sequence[int]) -> tuple[Segment, ...]:
    """Build the layout of a call on samples of `shape` [B, C, H, W]: one segment.

    Raises:
        ShapeError: the sides differ.
    """
    side = shape[-1] // model.patch_size
    if shape[-2] // model.patch_size != side:
        raise ShapeError(f"DiTTransformer2DModel: input {list(shape)} should have equal sides")
    return (Segment("image", Grid(1, side, side), side**2),)


class DiTInputs(Inputs):
    """DiT: a class; the one after the last is none."""

    flow = False

    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        return model.config.in_channels, (model.config.patch_size,) * 2

    def slots(self, model: Any) -> Mapping[str, Slot]:
        return {"class_labels": Slot("label", (), below=model.config.num_embeds_ada_norm)}

    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": t, "class_labels": cond.label}

    def nothing(self, model: Any) -> Cond:
        return Cond(label=torch.tensor([model.config.num_embeds_ada_norm]))

    def prepare(self, model: Any) -> None:
        """Each block of diffusers' would drop labels by itself."""
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0


INPUTS = DiTInputs()


def _blocks(model: Any) -> list[tuple[str, Any]]:
    return [(f"blocks.{i}", block) for i, block in enumerate(model.transformer_blocks)]
