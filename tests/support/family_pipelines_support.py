"""A tiny random pipeline of every family that has a view, and of what its pipelines can be told beside a prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import pipelines_support as fluxes
from flux_support import transformer as flux_transformer
from hosts_support import FLUX2, HUNYUAN_VIDEO, LATTE, LTX, QWEN_IMAGE, ROTARY
from pipelines_support import SIDE, Options, cogvideox, picture, pixart, vae

Made = tuple[Any, Options]
Make = Callable[[], Made]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SQUARE: Options = {"height": SIDE, "width": SIDE, "output_type": "latent"}
LATE = {"image": picture(), "strength": 0.75}
FIRST = Image.new("RGB", (32, 32), (200, 30, 90))
CLIP = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
MASK = torch.ones(1, 1, SIDE, SIDE).tril()


class Heun(FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """Some pipelines ask by sigmas, which diffusers' Heun does not take."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        super().set_timesteps(num_inference_steps or len(sigmas), device)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(**FLOW)


def dpm() -> Any:
    return diffusers.DPMSolverMultistepScheduler(**FLOW)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(make: Make) -> Made:
    """Always the same weights, as `from_pretrained` leaves them: DiT drops labels in training."""
    torch.manual_seed(0)
    pipe, told = make()
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, told


def draw(pipe: Any, told: Options, **more: Any) -> Tensor:
    """What the pipeline draws in eight steps from the noise of seed 0; some ask the global generator too."""
    options = {"num_inference_steps": 8, **told, **more}
    torch.manual_seed(0)
    return torch.as_tensor(pipe(**options, generator=torch.Generator().manual_seed(0))[0])


SD3 = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 96,
}
SD3_PARTS = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))


def sd3(
    scheduler: Any = FlowMatchEulerDiscreteScheduler,
    kind: Any = diffusers.StableDiffusion3Pipeline,
    told: Options | None = None,
    parts: Callable[[], Options] = dict,
    **config: Any,
) -> Made:
    net = diffusers.SD3Transformer2DModel(**{**SD3, **config})
    codec = diffusers.AutoencoderKL.from_config({**vae().config, "latent_channels": 16})
    pipe = kind(transformer=net, scheduler=scheduler(), vae=codec, **SD3_PARTS, **parts())
    text = {
        "prompt_embeds": drawn(1, 5, 32),
        "pooled_prompt_embeds": drawn(1, 24),
        "negative_prompt_embeds": drawn(1, 5, 32, seed=1),
        "negative_pooled_prompt_embeds": drawn(1, 24, seed=1),
    }
    return pipe, {**text, **SQUARE, **(told or {})}


def sd3_control() -> Options:
    """With a fresh ControlNet's zero layers made random."""
    net = diffusers.SD3ControlNetModel(**{**SD3, "num_layers": 1})
    for p in net.parameters():
        p.data.normal_(std=0.1)
    return {"controlnet": net}


def wan(
    scheduler: Callable[[], Any] = unipc,
    kind: Any = diffusers.WanPipeline,
    told: Options | None = None,
    text: int = 5,
    experts: int = 1,
    parts: Callable[[], Options] = dict,
    **config: Any,
) -> Made:
    nets = [
        diffusers.WanTransformer3DModel(
            **{
                "patch_size": (1, 2, 2),
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 32,
                "freq_dim": 16,
                "ffn_dim": 32,
                "num_layers": 1,
                "rope_max_seq_len": 32,
                **config,
            }
        )
        for _ in range(experts)
    ]
    named = dict(zip(("transformer", "transformer_2"), nets, strict=False))
    pipe = kind(tokenizer=None, text_encoder=None, scheduler=scheduler(), **{"vae": None, **named, **parts()})
    texts = {"prompt_embeds": drawn(1, text, 32), "negative_prompt_embeds": drawn(1, text, 32, seed=1)}
    told, size = told or {}, {"height": 32, "width": 32, "output_type": "latent"}
    length = {} if "video" in told else {"num_frames": 5}
    return pipe, {**texts, **size, **length, **told}


def wan_vae() -> Options:
    return {"vae": diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)}


def clip_encoder() -> Options:
    """What sees the first picture, as 5 rows of 16."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return {
        **wan_vae(),
        "image_encoder": CLIPVisionModel(config),
        "image_processor": CLIPImageProcessor(**sizes),
    }


LUMINA = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 1,
    "num_kv_heads": 1,
    "multiple_of": 16,
}
CAPTIONS: Options = {
    "prompt_embeds": drawn(1, 5, 8),
    "prompt_attention_mask": torch.ones(1, 5).bool(),
    "negative_prompt_embeds": drawn(1, 5, 8, seed=1),
    "negative_prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]).bool(),
}


def lumina2(scheduler: Any = FlowMatchEulerDiscreteScheduler, told: Options | None = None) -> Made:
    net = diffusers.Lumina2Transformer2DModel(
        **LUMINA, num_refiner_layers=1, axes_dim_rope=(8, 8, 8), axes_lens=(64, 32, 32), cap_feat_dim=8
    )
    pipe = diffusers.Lumina2Pipeline(net, scheduler(), vae(), None, None)
    return pipe, {**CAPTIONS, **SQUARE, "height": 64, "width": 64, **(told or {})}


def lumina_next(scheduler: Any = FlowMatchEulerDiscreteScheduler, told: Options | None = None) -> Made:
    """At four times the size it was made for: rotary table and logits depend on that."""
    net = diffusers.LuminaNextDiT2DModel(**LUMINA, cross_attention_dim=8)
    torch.nn.init.normal_(net.layers[0].gate)
    parts = {"vae": vae(), "text_encoder": None, "tokenizer": None}
    pipe = diffusers.LuminaPipeline(transformer=net, scheduler=scheduler(), **parts)
    pipe.default_sample_size, pipe.default_image_size = 16, 32
    return pipe, {**CAPTIONS, **SQUARE, "height": 64, "width": 64, **(told or {})}


def dit(scheduler: Any = diffusers.DDIMScheduler) -> Made:
    net = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    pipe = diffusers.DiTPipeline(net, vae(), scheduler())
    return pipe, {"class_labels": [1, 2], "guidance_scale": 4.0, "output_type": "np"}


def hunyuan_video(
    scheduler: Any = FlowMatchEulerDiscreteScheduler,
    kind: Any = diffusers.HunyuanVideoPipeline,
    told: Options | None = None,
    parts: Callable[[], Options] = dict,
    **config: Any,
) -> Made:
    """Text of five rows, three of them known, behind the clip."""
    net = diffusers.HunyuanVideoTransformer3DModel(
        **{**HUNYUAN_VIDEO, "in_channels": 16, "out_channels": 16, **config}
    )
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    pipe = kind(transformer=net, scheduler=scheduler(), **{**without, **parts()})
    texts = {
        f"{prefix}{name}": value
        for seed, prefix in enumerate(("", "negative_"))
        for name, value in (
            ("prompt_embeds", drawn(1, 5, 20, seed=seed)),
            ("pooled_prompt_embeds", drawn(1, 12, seed=seed)),
            ("prompt_attention_mask", torch.tensor([[1, 1, 1, 0, 0]])),
        )
    }
    size = {"height": 32, "width": 48, "num_frames": 5, "output_type": "latent"}
    return pipe, {**texts, **size, **(told or {})}


def hunyuan_vae() -> Options:
    """A frame in four and a pixel in eight each way; and what the pipeline of a first picture has beside it."""
    codec = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=16,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return {"vae": codec, "image_processor": None}


def qwen_image(
    scheduler: Any = FlowMatchEulerDiscreteScheduler,
    kind: Any = diffusers.QwenImagePipeline,
    told: Options | None = None,
    parts: Callable[[], Options] = dict,
    **config: Any,
) -> Made:
    """16 rows of the image; five of text, of which three are known."""
    sizes = {"in_channels": 64, "out_channels": 16}
    net = diffusers.QwenImageTransformer2DModel(**{**QWEN_IMAGE, "num_layers": 2, **sizes, **config})
    without = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipe = kind(transformer=net, scheduler=scheduler(), **{**without, **parts()})
    texts = {
        "prompt_embeds": drawn(1, 5, 20),
        "negative_prompt_embeds": drawn(1, 4, 20, seed=1),
        "prompt_embeds_mask": torch.tensor([[1, 1, 1, 0, 0]]).bool(),
        "negative_prompt_embeds_mask": torch.ones(1, 4).bool(),
    }
    return pipe, {**texts, "height": 64, "width": 64, "output_type": "latent", **(told or {})}


def qwen_vae() -> Options:
    codec = diffusers.AutoencoderKLQwenImage(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {"vae": codec}


def latte(
    scheduler: Any = diffusers.DPMSolverMultistepScheduler, told: Options | None = None, **config: Any
) -> Made:
    """Three frames of 16 rows."""
    net = diffusers.LatteTransformer3DModel(**{**LATTE, **config})
    parts = {"vae": vae(), "text_encoder": None, "tokenizer": None}
    pipe = diffusers.LattePipeline(transformer=net, scheduler=scheduler(), **parts)
    texts = {"prompt_embeds": drawn(1, 5, 32), "negative_prompt_embeds": drawn(1, 5, 32, seed=1)}
    plainly = {"negative_prompt": None, "video_length": 3, "mask_feature": False, "clean_caption": False}
    return pipe, {**texts, **plainly, "guidance_scale": 4.0, **SQUARE, **(told or {})}


def ltx(
    scheduler: Any = FlowMatchEulerDiscreteScheduler,
    kind: Any = diffusers.LTXPipeline,
    told: Options | None = None,
    parts: Callable[[], Options] = dict,
    **config: Any,
) -> Made:
    """Two frames of 2 x 3 rows."""
    net = diffusers.LTXVideoTransformer3DModel(**{**LTX, "in_channels": 16, "out_channels": 16, **config})
    without = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipe = kind(transformer=net, scheduler=scheduler(), **{**without, **parts()})
    texts = {
        "prompt_embeds": drawn(1, 5, 20),
        "negative_prompt_embeds": drawn(1, 5, 20, seed=1),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "negative_prompt_attention_mask": torch.ones(1, 5).long(),
    }
    size = {"height": 64, "width": 96, "num_frames": 9, "output_type": "latent"}
    return pipe, {**texts, **size, **(told or {})}


def ltx_vae() -> Options:
    codec = diffusers.AutoencoderKLLTXVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return {"vae": codec}


def flux2(
    kind: Any = diffusers.Flux2Pipeline,
    told: Options | None = None,
    scheduler: Any = FlowMatchEulerDiscreteScheduler,
    **config: Any,
) -> Made:
    """16 rows of the image, 5 of text."""
    net = diffusers.Flux2Transformer2DModel(**{**FLUX2, **config})
    codec = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    parts = {"text_encoder": None, "tokenizer": None, "vae": codec}
    pipe = kind(transformer=net, scheduler=scheduler(), **parts)
    size = {"height": 64, "width": 64, "output_type": "latent"}
    return pipe, {"prompt_embeds": drawn(1, 5, 20), **size, **(told or {})}


def flux(kind: Any = diffusers.FluxPipeline, told: Options | None = None, **config: Any) -> Made:
    pipe = fluxes.pipeline(kind, net=flux_transformer(**config))
    return pipe, {**fluxes.prompt(), **SQUARE, **(told or {})}


def wan_two_experts() -> Made:
    """The first one has the timesteps above nine tenths."""
    return wan(experts=2, told={"num_inference_steps": 16}, parts=two_experts)


def two_experts() -> Options:
    return {**wan_vae(), "boundary_ratio": 0.9}


ONE_EACH: dict[str, Make] = {
    "sd3": sd3,
    "dit": dit,
    "lumina2": lumina2,
    "lumina-next": lumina_next,
    "wan": wan_two_experts,
    "flux": flux,
    "cogvideox": partial(cogvideox, patch_size_t=2, **ROTARY),
    "pixart": pixart,
    "hunyuan-video": hunyuan_video,
    "qwen-image": qwen_image,
    "latte": latte,
    "ltx": ltx,
    "flux2": flux2,
}
