"""A toy pipeline of diffusers' FLUX around a transformer: letters as text encoder, pixel unshuffling as VAE.

Neither has weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ditkit.nn.toy_text_encoder import encode_letters, pooled


class PixelUnshuffle(ModelMixin, ConfigMixin):
    """A VAE in form: every second row and column of [B, C, H, W] is a channel of [B, 4C, H/2, W/2]."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (1, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.config: Any
        self.register_buffer(
            "_place", torch.empty(0), persistent=False
        )  # a pipeline asks for dtype and device

    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=F.pixel_unshuffle(x, 2))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (F.pixel_shuffle(z, 2),)


class ToyFluxPipeline(FluxPipeline):
    """FLUX's pipeline for a transformer that was trained on spelled captions; called as any other.

    The transformer's `joint_attention_dim` and `pooled_projection_dim` are LETTERS, and a caption has room for
    `tokenizer_max_length` of them.
    """

    @classmethod
    def around(cls, transformer: FluxTransformer2DModel, size: int, length: int) -> Self:
        """With a scheduler and nothing that has weights.

        Args:
            size: height and width of a picture, where a call names none. length: letters of a caption.
        """
        vae = PixelUnshuffle(transformer.config.in_channels // 4)
        pipe = cls(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
        pipe.default_sample_size, pipe.tokenizer_max_length = size // pipe.vae_scale_factor, length
        return pipe

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Letters [B, S, LETTERS], their sum [B, LETTERS], and the ids of S rows of text."""
        if prompt_embeds is None:
            prompt_embeds = encode_letters(
                [prompt] if isinstance(prompt, str) else prompt or [], self.tokenizer_max_length
            )
        if pooled_prompt_embeds is None:
            pooled_prompt_embeds = pooled(prompt_embeds)
        letters, summed = (
            given.to(device, self.transformer.dtype).repeat_interleave(num_images_per_prompt, 0)
            for given in (prompt_embeds, pooled_prompt_embeds)
        )
        return letters, summed, letters.new_zeros(letters.shape[1], 3)
