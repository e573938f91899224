"""diffusers' `PixArtTransformer2DModel` (PixArt-alpha and PixArt-Sigma, Chen et al. 2023, 2024) with sites.

B batch, L image rows, S text rows, D width. Text is only cross-attended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import pixart_transformer_2d as host
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.grid import Grid, Segment, take_rows, unpatchify
from ditkit.core.run import Run, Site
from ditkit.core.slot import Slot
from ditkit.core.transform import Stacked
from ditkit.hosts.blocks import as_wide, attention_sites
from ditkit.hosts.dit import call_basic_block
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.modulation import modulate

STACKS = {"blocks": Stacked("transformer_blocks", "num_layers")}

__all__ = ["layout", "restore", "running", "sites", "view"]


class ImageTokens(NamedTuple):
    """Embedded tokens [B, L, D], positions added: what the `tokens` site returns.

    Args:
        whole: the argument of this call that only all rows together can have; empty: there is none.
    """

    x: Tensor
    whole: str = ""

    def rows(self, stream: str, index: Tensor) -> ImageTokens:
        """Select some tokens.

        Raises:
            ConflictError: the call has such an argument.
        """
        if self.whole:
            raise ConflictError(f"PixArtTransformer2DModel: {self.whole} goes with all rows, not with some")
        return ImageTokens(take_rows(self.x, index))


@stands_for(host.PixArtTransformer2DModel)
class PixArtTransformer2DModel(host.PixArtTransformer2DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Any = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Latents [B, C, H, W] and captions [B, S, D'], masks of 0 and 1 [B, L] and [B, S] or biases [B, 1, ...].

        Raises:
            ConfigError: a model of several sizes is not told the size.
        """
        if self.use_additional_conditions and added_cond_kwargs is None:
            raise ConfigError(
                "PixArtTransformer2DModel: got added_cond_kwargs=None, expected resolution and aspect_ratio"
            )
        run, text = current(), encoder_hidden_states
        mask_bias, known = (_bias(mask, hidden_states) for mask in (attention_mask, encoder_attention_mask))
        x_BLD = run.site("tokens", partial(self._embed, _whole(text, mask_bias)), hidden_states).x
        B, _, D = x_BLD.shape
        projected, embedded = run.site("time", self.adaln_single, timestep, added_cond_kwargs, B, x_BLD.dtype)
        if self.caption_projection is not None:
            text = self.caption_projection(text).view(B, -1, D)
        stack = partial(self._stack, run, cross_attention_kwargs)
        x_BLD = run.site("blocks", stack, x_BLD, projected, mask_bias, text, known)
        out = run.site("head", self._head, x_BLD, embedded)
        sample = unpatchify(out, _grid(self, hidden_states.shape), self.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, whole: str, image: Tensor) -> ImageTokens:
        return ImageTokens(self.pos_embed(image), whole)

    def _stack(
        self,
        run: Run,
        kwargs: dict[str, Any] | None,
        x_BLD: Tensor,
        times: Tensor,
        mask_bias: Tensor | None,
        text: Tensor | None,
        known: Tensor | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks `start` to `stop`; `seen` and `known` are biases of image and text, [B, 1, L] and [B, 1, S]."""
        for i, block in list(enumerate(self.transformer_blocks))[start:stop]:
            apply = partial(self._call_block, block, run, f"blocks.{i}", kwargs)
            x_BLD = run.site(f"blocks.{i}", apply, x_BLD, times, mask_bias, text, known)
        return x_BLD

    def _call_block(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        kwargs: dict[str, Any] | None,
        x_BLD: Tensor,
        times: Tensor,
        mask_bias: Tensor | None,
        text: Tensor | None,
        known: Tensor | None,
    ) -> Tensor:
        return call_basic_block(self, block, run, name, kwargs, x_BLD, times, mask_bias, text, known)

    def _head(self, x_BLD: Tensor, embedded: Tensor) -> Tensor:
        table = self.scale_shift_table + embedded[:, None].to(self.scale_shift_table.device)
        # with layers spread over devices, the last one's is not that of the times
        shift, scale = (part.to(x_BLD.device) for part in table.chunk(2, 1))
        return self.proj_out(modulate(self.norm_out(x_BLD), shift, scale))


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens"), Site("time", "time"), Site("blocks", "stack")]
    for i, block in enumerate(model.transformer_blocks):
        at = f"blocks.{i}"
        named += [Site(at, "block"), Site(f"{at}.attn", "branch")]
        named += attention_sites(f"{at}.attn", block.attn1)
        named += [Site(f"{at}.cross_attn", "branch"), Site(f"{at}.mlp", "branch")]
    return as_wide((*named, Site("head", "head")), model.inner_dim)


def layout(model: Any, shape: Sequence[int]) -> tuple[Segment, ...]:
    """Build the layout of a call on latents of `shape` [B, C, H, W]: one segment."""
    grid = _grid(model, shape)
    return (Segment("image", grid, grid.length),)


PIXELS = 8
"""Pixels a side of a latent; a transformer of several sizes is told those of the picture."""


class PixArtInputs(Inputs):
    """PixArt: T5's rows and their mask; where the network is told the picture's size, that of the latents."""

    flow = False

    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        return model.config.in_channels, (model.config.patch_size,) * 2

    def slots(self, model: Any) -> Mapping[str, Slot]:
        return {
            "prompt_embeds": Slot("text", ("S", model.config.caption_channels)),
            "prompt_attention_mask": Slot("text_mask", ("S",), optional=True),
        }

    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            height, width = (PIXELS * n for n in x.shape[2:])
            size = {
                "resolution": x.new_tensor([[height, width]]).repeat(len(x), 1),
                "aspect_ratio": x.new_tensor([[height / width]]).repeat(len(x), 1),
            }
        return {
            "hidden_states": x,
            "encoder_hidden_states": cond.text,
            "encoder_attention_mask": cond.text_mask,
            "timestep": t,
            "added_cond_kwargs": size,
        }


INPUTS = PixArtInputs()


def _grid(model: Any, shape: Sequence[int]) -> Grid:
    """As the patch embedding cuts: what fills no patch is left out."""
    height, width = (n // model.config.patch_size for n in shape[2:])
    return Grid(1, height, width)


def _whole(text: Tensor | None, mask_bias: Tensor | None) -> str:
    """Name the part of a call that concerns all tokens: a mask of them, or cross-attention without text."""
    if text is None:
        return "encoder_hidden_states=None"
    return "" if mask_bias is None else "attention_mask"


def _bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Turn a mask [B, S] of 0 and 1 into what is added to scores [B, 1, S]; a bias stays as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(x.dtype)) * -10000.0).unsqueeze(1)
