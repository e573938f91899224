"""diffusers' `LatteTransformer3DModel` (Latte, Ma et al. 2024) with sites.

B batch, T frames, L rows of a frame, S text rows, D width. Blocks alternate: attention within each frame and to text,
then attention along the frames of each place. Inside a block the samples are frames, or places, as in diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import latte_transformer_3d as host
from torch import Tensor, nn

from ditkit.core.grid import Grid, Segment, Tokens, unpatchify
from ditkit.core.run import Run, Site
from ditkit.hosts.blocks import as_wide, attention_sites
from ditkit.hosts.dit import call_basic_block
from ditkit.hosts.view import current, restore, running, stands_for, view
from ditkit.nn.modulation import modulate

__all__ = ["layout", "restore", "running", "sites", "view"]


@stands_for(host.LatteTransformer3DModel)
class LatteTransformer3DModel(host.LatteTransformer3DModel):
    """The transformer: its forward takes and returns what diffusers' does."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        run, clip = current(), hidden_states
        grid = _grid(self, clip.shape)
        x_BLD = run.site("tokens", self._embed, clip).x
        whole: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        embed = partial(
            self.adaln_single, added_cond_kwargs=whole, batch_size=len(clip), hidden_dtype=x_BLD.dtype
        )
        projected, embedded = run.site("time", embed, timestep)
        text = self.caption_projection(encoder_hidden_states)
        stack = partial(self._stack, run, grid, enable_temporal_attentions)
        x_BLD = run.site("blocks", stack, x_BLD, projected, text, encoder_attention_mask)
        out = run.site("head", partial(self._head, grid), x_BLD, embedded)
        frames = unpatchify(
            out.unflatten(1, (grid.frames, -1)).flatten(0, 1), _of_frame(grid), self.config.patch_size
        )
        sample = frames.unflatten(0, (-1, grid.frames)).transpose(1, 2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, clip: Tensor) -> Tokens:
        frames = clip.transpose(1, 2).flatten(0, 1)
        return Tokens(self.pos_embed(frames).unflatten(0, (len(clip), -1)).flatten(1, 2))

    def _stack(
        self,
        run: Run,
        grid: Grid,
        temporal: bool,
        x_BLD: Tensor,
        times: Tensor,
        text: Tensor,
        known: Tensor | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks `start` to `stop`, those of frames and those along them in turns; `known` is a bias of text."""
        blocks = [(name, block) for name, block in _blocks(self) if temporal or name.startswith("blocks")]
        for name, block in blocks[start:stop]:
            if name.startswith("blocks"):
                apply = partial(self._call_spatial, block, run, name, grid)
                x_BLD = run.site(name, apply, x_BLD, times, text, known)
            else:
                apply = partial(self._call_temporal, block, run, name, grid)
                x_BLD = run.site(name, apply, x_BLD, times)
        return x_BLD

    def _call_spatial(
        self,
        block: nn.Module,
        run: Run,
        name: str,
        grid: Grid,
        x_BLD: Tensor,
        times: Tensor,
        text: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        """Attention within each frame and to text: samples are frames, [B T, L, D]."""
        frames = x_BLD.unflatten(1, (grid.frames, -1)).flatten(0, 1)
        text, times = (part.repeat_interleave(grid.frames, 0) for part in (text, times))
        out = call_basic_block(self, block, run, name, None, frames, times, text=text, known=known)
        return out.unflatten(0, (-1, grid.frames)).flatten(1, 2)

    def _call_temporal(
        self, block: nn.Module, run: Run, name: str, grid: Grid, x_BLD: Tensor, times: Tensor
    ) -> Tensor:
        """Attention along the frames of each place: samples are places, [B L, T, D]."""
        L = grid.height * grid.width
        places = x_BLD.unflatten(1, (grid.frames, L)).transpose(1, 2).flatten(0, 1)
        if name == "temporal.0" and grid.frames > 1:
            places = places + self.temp_pos_embed.to(places.dtype)
        out = call_basic_block(self, block, run, name, None, places, times.repeat_interleave(L, 0))
        return out.unflatten(0, (-1, L)).transpose(1, 2).flatten(1, 2)

    def _head(self, grid: Grid, x_BLD: Tensor, embedded: Tensor) -> Tensor:
        frames = x_BLD.unflatten(1, (grid.frames, -1)).flatten(0, 1)
        embedded = embedded.repeat_interleave(grid.frames, 0)
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, 1)
        out = self.proj_out(modulate(self.norm_out(frames), shift, scale))
        return out.unflatten(0, (-1, grid.frames)).flatten(1, 2)


def sites(model: Any) -> tuple[Site, ...]:
    """List the sites of a viewed transformer, in the order of the call."""
    named = [Site("tokens", "tokens"), Site("time", "time"), Site("blocks", "stack")]
    for at, block in _blocks(model):
        named += [Site(at, "block"), Site(f"{at}.attn", "branch")]
        inside = attention_sites(f"{at}.attn", block.attn1, attention="axial")
        named += [site._replace(axis="time" if at.startswith("temporal") else "space") for site in inside]
        named += [Site(f"{at}.cross_attn", "branch")] if block.attn2 is not None else []
        named.append(Site(f"{at}.mlp", "branch"))
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return as_wide((*named, Site("head", "head")), width)


def layout(model: Any, shape: Sequence[int]) -> tuple[Segment, ...]:
    """Build the layout of a call on latents of `shape` [B, C, T, H, W]: one segment."""
    grid = _grid(model, shape)
    return (Segment("image", grid, grid.length),)


def _grid(model: Any, shape: Sequence[int]) -> Grid:
    """As the patch embedding cuts: what fills no patch is left out."""
    patch = model.config.patch_size
    return Grid(shape[2], shape[3] // patch, shape[4] // patch)


def _of_frame(grid: Grid) -> Grid:
    return Grid(1, grid.height, grid.width)


def _blocks(model: Any) -> list[tuple[str, Any]]:
    """Pair the blocks within frames with those along them, in the order of the call."""
    pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    return [
        named
        for i, (frame, along) in enumerate(pairs)
        for named in ((f"blocks.{i}", frame), (f"temporal.{i}", along))
    ]
