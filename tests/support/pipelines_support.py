"""Tiny random pipelines of diffusers, without text encoders: FLUX and calls of it, CogVideoX and PixArt."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.pipelines.accelerate import Accelerated
from flux_support import S, transformer
from hosts_support import COGVIDEOX, PIXART

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
    return fast.report().cost.receipts[-1].as_dict()["lanes"]


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

CLIP_SIZE: Options = {"height": 32, "width": 48, "output_type": "latent"}
CLIP_CONFIG = {**COGVIDEOX, "num_layers": 2, "sample_height": 4, "sample_width": 6, "sample_frames": 9}
PREDICTION = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
"""Settings that CogVideoX was trained with."""


def text(seed: int, rows: int = 7) -> Tensor:
    return torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(seed))


def video_vae() -> AutoencoderKLCogVideoX:
    """A frame in four and a pixel in eight each way."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def cogvideox(
    scheduler: Any = CogVideoXDDIMScheduler,
    kind: Any = CogVideoXPipeline,
    told: Options | None = None,
    **config: Any,
) -> tuple[Any, Options]:
    """A pipeline, random as of now, and arguments of a call of it: 18 rows of the clip, 7 of text."""
    net = CogVideoXTransformer3DModel(**{**CLIP_CONFIG, **config})
    pipe = kind(None, None, video_vae(), net, scheduler(**PREDICTION))
    told = told or {}
    length = {} if told.keys() & {"video", "control_video"} else {"num_frames": 9}
    texts = {"prompt_embeds": text(0), "negative_prompt_embeds": text(1)}
    return pipe, {**texts, **CLIP_SIZE, **length, **told}


def pixart(
    scheduler: Any = DPMSolverMultistepScheduler,
    kind: Any = PixArtAlphaPipeline,
    told: Options | None = None,
    **config: Any,
) -> tuple[Any, Options]:
    """The same for PixArt: 16 rows of the image."""
    net = PixArtTransformer2DModel(**{**PIXART, "num_layers": 2, **config})
    pipe = kind(None, None, vae(), net, scheduler())
    known = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    texts = {"prompt_embeds": text(0), "prompt_attention_mask": known}
    others = {"negative_prompt_embeds": text(1), "negative_prompt_attention_mask": known.roll(1)}
    size = {"height": SIDE, "width": SIDE, "output_type": "latent"}
    plainly = {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**texts, **others, **size, **plainly, **(told or {})}
