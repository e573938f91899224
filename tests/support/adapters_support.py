"""IP-Adapters of small random transformers, and the pictures that they are given."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import flux_support as fluxes
from hosts_support import B, D, Draws, Inputs


def flux_adapters(model: Any, count: int) -> Any:
    """IP-Adapters of two tokens each."""
    torch.manual_seed(4)
    for block in model.transformer_blocks:
        scale = [0.7, 0.4][:count]
        block.attn.set_processor(FluxIPAdapterAttnProcessor(fluxes.D, 32, (2,) * count, scale).eval())
    projections = [ImageProjection(20, 32, num_image_text_embeds=2) for _ in range(count)]
    model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    return model


def flux_pictures(count: int) -> Inputs:
    draw = Draws(2)
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": [draw(2, 1, 20) for _ in range(count)]}}


def sd3_adapter(model: Any, scale: float = 0.7) -> Any:
    torch.manual_seed(4)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(D, D, D // 4, 32, scale=scale).eval())
    model.image_proj = IPAdapterTimeImageProjection(20, D, 32, 1, 16, 2, 4, timestep_in_dim=16).eval()
    return model


def sd3_pictures() -> Inputs:
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": Draws(2)(B, 5, 20)}}
