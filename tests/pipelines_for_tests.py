"""A tiny random FLUX pipeline of diffusers, without text encoders, and calls of it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.tasks.accelerate import Accelerated
from flux_for_tests import S, transformer

STEPS, SIDE = 8, 16
POLICY = TaylorSeer(interval=3, order=1)
Options = dict[str, Any]


def vae() -> AutoencoderKL:
    """Two levels, so that 16 pixels a side are 16 tokens."""
    torch.manual_seed(5)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def pipeline(kind: Any = FluxPipeline, scheduler: Any = None, net: Any = None) -> Any:
    """Always the same weights."""
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    pipe = kind(scheduler, vae(), None, None, None, None, net or transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(seed: int = 0, batch: int = 1, side: int = SIDE, steps: int = STEPS, **more: Any) -> Options:
    """Arguments of a text-to-image call; the noise is that of the seed."""
    return {
        **prompt(batch),
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **more,
    }


def prompt(batch: int = 1, seed: int = 1, prefix: str = "") -> Options:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}prompt_embeds": torch.randn(batch, S, 32, generator=draw),
        f"{prefix}pooled_prompt_embeds": torch.randn(batch, 24, generator=draw),
    }


def picture(seed: int = 2) -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def latents(pipe: Any, options: Options) -> Tensor:
    return pipe(**options)[0]


def lanes(fast: Accelerated) -> dict[str, dict[str, str]]:
    """The receipt of the last trajectory of the last call."""
    return fast.report().took.receipts[-1].as_dict()["lanes"]


def computed(fast: Accelerated) -> dict[str, str]:
    return {lane: done["computed"] for lane, done in lanes(fast).items()}


IMAGE_TO_IMAGE = {
    FluxImg2ImgPipeline: {"image": picture(), "strength": 0.75},
    FluxInpaintPipeline: {
        "image": picture(),
        "mask_image": torch.ones(1, 1, SIDE, SIDE).tril(),
        "strength": 0.75,
    },
}
"""Pipelines that start late, and what else they are told."""
