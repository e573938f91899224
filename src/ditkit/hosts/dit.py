"""diffusers' `DiTTransformer2DModel` (DiT, Peebles and Xie 2023) with sites.

B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import dit_transformer_2d as host
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment, Tokens, unpatchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.hosts.blocks import attention_sites, call_block, feed_in_chunks, modulation
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.modulation import modulate

__all__ = ["layout", "restore", "running", "sites", "view"]


@stands_for(host.BasicTransformerBlock)
class BasicTransformerBlock(host.BasicTransformerBlock):
    """DiT's block, which embeds time and class itself; what else diffusers makes of this class has no sites."""

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
        x_BLD, kwargs = hidden_states, cross_attention_kwargs or {}
        if not _is_dit(self) or attention_mask is not None or "gligen" in kwargs:
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
        c_BD = self.norm1.emb(timestep, class_labels, hidden_dtype=x_BLD.dtype)
        shift, scale, gate, *mlp = modulation(self.norm1, c_BD, 6)
        attend = partial(self._attend, run, at + ".attn", kwargs)
        x_BLD = x_BLD + gate * run.site(at + ".attn", attend, x_BLD, shift, scale)
        feed = partial(feed_in_chunks, self, self.norm3, self.ff)
        return x_BLD + mlp[2] * run.site(at + ".mlp", feed, x_BLD, *mlp[:2])

    def _attend(
        self, run: Run, at: str, kwargs: Mapping[str, Any], x_BLD: Tensor, shift: Tensor, scale: Tensor
    ) -> Tensor:
        """The attention branch before its gate."""
        h_BLD = modulate(self.norm1.norm(x_BLD), shift, scale)
        return self.attn1(h_BLD, run=run, at=at, **kwargs)


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
        """Samples [B, C, H, W] of equal sides.

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
        return call_block(
            self,
            block,
            run,
            name,
            x_BLD,
            attention_mask=None,
            encoder_hidden_states=None,
            encoder_attention_mask=None,
            timestep=timestep,
            cross_attention_kwargs=kwargs,
            class_labels=class_labels,
            added_cond_kwargs=None,
        )

    def _head(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.proj_out_1(F.silu(c_BD)).unsqueeze(1).chunk(2, -1)
        return self.proj_out_2(modulate(self.norm_out(x_BLD), shift, scale))


def sites(model: nn.Module) -> tuple[Site, ...]:
    """The sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens"), Site("blocks", "stack")]
    for at, block in _blocks(model):
        named += [Site(at, "block"), Site(at + ".attn", "branch")]
        named += [*attention_sites(at + ".attn", block.attn1), Site(at + ".mlp", "branch")]
    return (*named, Site("time", "time"), Site("head", "head"))


def layout(model: Any, shape: Sequence[int]) -> tuple[Segment, ...]:
    """The segment of a call on samples of `shape` [B, C, H, W].

    Raises:
        ShapeError: the sides differ.
    """
    side = shape[-1] // model.patch_size
    if shape[-2] // model.patch_size != side:
        raise ShapeError(f"DiTTransformer2DModel: input {list(shape)} should have equal sides")
    return (Segment("image", Grid(1, side, side), side**2),)


def _blocks(model: Any) -> list[tuple[str, Any]]:
    return [(f"blocks.{i}", block) for i, block in enumerate(model.transformer_blocks)]


def _is_dit(block: Any) -> bool:
    """Whether a block is self-attention and MLP under adaLN-Zero, and no more."""
    return block.use_ada_layer_norm_zero and block.attn2 is None and block.pos_embed is None
