"""Small random transformers of diffusers with patches of latents, their inputs, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection, get_3d_rotary_pos_embed
from torch import Tensor
from torch.utils._pytree import tree_map

from ditkit.core.grid import Segment
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Call, Run
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import cogvideox, dit, pixart, sd3
from ditkit.hosts.view import running
from policies_support import Tap

B, C, S, D, DEPTH, HEADS, PATCH, CLASSES = 2, 4, 7, 64, 3, 4, 2, 10
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One kind of transformer: its class with a small config, and the view that it gets.

    Args:
        text: rows of it, where they are part of the sequence. frames: of a clip, which come before its channels.
    """

    host: Any
    view: ModuleType
    config: dict[str, Any]
    size: tuple[int, int]
    draw: Callable[[torch.Generator], Inputs]
    text: tuple[int, ...] = field(default=())
    frames: tuple[int, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        return (B, *self.frames, C, *self.size)

    def transformer(self, **changed: Any) -> Any:
        """Always the same weights."""
        torch.manual_seed(0)
        return self.host(**{**self.config, **changed}).eval()

    def inputs(self) -> Inputs:
        draw = torch.Generator().manual_seed(1)
        return {"hidden_states": torch.randn(self.shape, generator=draw), **self.draw(draw)}

    def layout(self, model: Any) -> tuple[Segment, ...]:
        layout: tuple[Segment, ...] = self.view.layout(model, self.shape, *self.text)
        return layout

    def channels_first(self, v: Tensor) -> Tensor:
        """As policies see a prediction, and back: a clip's channels before its frames."""
        return v.transpose(1, 2) if self.frames else v


def sd3_inputs(draw: torch.Generator) -> Inputs:
    return {
        "encoder_hidden_states": torch.randn(B, S, 32, generator=draw),
        "pooled_projections": torch.randn(B, 24, generator=draw),
        "timestep": torch.tensor([700.0, 300.0]),
    }


def dit_inputs(draw: torch.Generator) -> Inputs:
    return {"timestep": torch.tensor([700, 300]), "class_labels": torch.tensor([3, CLASSES])}


def cogvideox_inputs(draw: torch.Generator) -> Inputs:
    return {
        "encoder_hidden_states": torch.randn(B, S, 32, generator=draw),
        "timestep": torch.tensor([700, 300]),
    }


def rotated(frames: int) -> Callable[[torch.Generator], Inputs]:
    """With the rotary table of so many frames of tokens, as CogVideoX's pipelines make it."""

    def inputs(draw: torch.Generator) -> Inputs:
        table = get_3d_rotary_pos_embed(D // HEADS, ((0, 0), (4, 6)), (4, 6), frames)
        return {**cogvideox_inputs(draw), "image_rotary_emb": table}

    return inputs


def cogvideox_offset_inputs(draw: torch.Generator) -> Inputs:
    return {**rotated(2)(draw), "ofs": torch.full((1,), 2.0)}


def pixart_inputs(draw: torch.Generator) -> Inputs:
    return {
        "encoder_hidden_states": torch.randn(B, S, 32, generator=draw),
        "timestep": torch.tensor([700, 300]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]),
    }


def pixart_sized_inputs(draw: torch.Generator) -> Inputs:
    sizes = {"resolution": torch.tensor([[64.0, 96.0]] * B), "aspect_ratio": torch.tensor([[0.7]] * B)}
    return {**pixart_inputs(draw), "added_cond_kwargs": sizes}


SHARED = {"num_layers": DEPTH, "num_attention_heads": HEADS, "attention_head_dim": D // HEADS}
SD3 = {
    **SHARED,
    "sample_size": 16,
    "patch_size": PATCH,
    "in_channels": C,
    "out_channels": C,
    "joint_attention_dim": 32,
    "caption_projection_dim": D,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
DUAL = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
DIT = {**SHARED, "sample_size": 8, "patch_size": PATCH, "in_channels": C, "out_channels": 2 * C}

FAMILIES = {
    "sd3": Family(SD3Transformer2DModel, sd3, SD3, (8, 12), sd3_inputs, (S,)),
    "sd3.5": Family(SD3Transformer2DModel, sd3, SD3 | DUAL, (8, 12), sd3_inputs, (S,)),
    "dit": Family(DiTTransformer2DModel, dit, DIT | {"num_embeds_ada_norm": CLASSES}, (8, 8), dit_inputs),
}

COGVIDEOX = {
    **SHARED,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "in_channels": C,
    "out_channels": C,
    "time_embed_dim": 24,
    "text_embed_dim": 32,
    "max_text_seq_length": S,
}
ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
PIXART = {
    **SHARED,
    "sample_size": 8,
    "in_channels": C,
    "out_channels": 2 * C,
    "cross_attention_dim": D,
    "caption_channels": 32,
}
SIZED: dict[str, Any] = {
    "use_additional_conditions": True,
    "num_attention_heads": 3,
    "cross_attention_dim": 48,
}
"""Size and aspect ratio are embedded in a third of the width each."""
LATER = {
    "cogvideox": Family(
        CogVideoXTransformer3DModel, cogvideox, COGVIDEOX, (8, 12), cogvideox_inputs, (S,), (3,)
    ),
    "cogvideox rotary": Family(
        CogVideoXTransformer3DModel, cogvideox, COGVIDEOX | ROTARY, (8, 12), rotated(3), (S,), (3,)
    ),
    "cogvideox 1.5": Family(
        CogVideoXTransformer3DModel,
        cogvideox,
        COGVIDEOX | ROTARY | {"patch_size_t": 2, "ofs_embed_dim": 24},
        (8, 12),
        cogvideox_offset_inputs,
        (S,),
        (4,),
    ),
    "pixart": Family(PixArtTransformer2DModel, pixart, PIXART, (8, 12), pixart_inputs),
    "pixart sized": Family(
        PixArtTransformer2DModel,
        pixart,
        PIXART | SIZED,
        (8, 12),
        pixart_sized_inputs,
    ),
}

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_sd3 = pytest.mark.parametrize("family", [FAMILIES["sd3"], FAMILIES["sd3.5"]], ids=["sd3", "sd3.5"])


@torch.no_grad()
def call(model: Any, inputs: Inputs, run: Run = DIRECT, **changed: Any) -> Tensor:
    with running(run):
        return model(**{**inputs, **changed}, return_dict=False)[0]


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Rotary tables stay as they are, as in diffusers' pipelines."""

    def cast(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    return {name: v if name == "image_rotary_emb" else tree_map(cast, v) for name, v in inputs.items()}


def tapped(family: Family, model: Any) -> tuple[Run, dict[str, Any]]:
    """A run that passes through a handler at every site, and what it meets."""
    sites = family.view.sites(model)
    tap = Tap(tuple(site.name for site in sites))
    return Trajectory(sites, [tap], 1).run(Call(0, 1, 1.0)), tap.seen


def run_steps(
    family: Family, model: Any, inputs: Inputs, policies: Sequence[Policy], steps: int = 8, **given: Any
) -> tuple[Tensor, Trajectory]:
    """Euler from noise to data."""
    trajectory = Trajectory(family.view.sites(model), policies, steps)
    x = inputs["hidden_states"]
    for i in range(steps):
        now = Call(i, steps, 1 - i / steps, layout=family.layout(model))
        t = torch.full((B,), 1000 * now.t, dtype=inputs["timestep"].dtype)
        v = call(model, inputs, trajectory.run(now), hidden_states=x, timestep=t, **given)
        v = family.channels_first(trajectory.leave(now, v))[:, :C]
        x = x - family.channels_first(trajectory.guided(now, v)) / steps
    return x, trajectory


def residuals(count: int, rows: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [0.1 * torch.randn(B, rows, D, generator=draw) for _ in range(count)]


def with_ip_adapter(model: Any, scale: float = 0.7) -> Any:
    torch.manual_seed(4)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(D, D, D // 4, 32, scale=scale).eval())
    model.image_proj = IPAdapterTimeImageProjection(20, D, 32, 1, 16, 2, 4, timestep_in_dim=16).eval()
    return model


def pictures() -> Inputs:
    picture = torch.randn(B, 5, 20, generator=torch.Generator().manual_seed(2))
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": picture}}
