"""diffusers' `DiTTransformer2DModel` (DiT, Peebles and Xie 2023) with sites.

B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import dit_transformer_2d as host
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment, Tokens, unpatchify
from ditkit.core.run import Run, Site
from ditkit.hosts.basic_block import call_basic_block
from ditkit.hosts.blocks import attention_sites
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.modulation import modulate

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
        return call_basic_block(self, block, run, name, kwargs, x_BLD, timestep, label=class_labels)

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
