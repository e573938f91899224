"""Five families of pipelines with tiny random transformers: does one setting save anything on all of them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ditkit.bench.macs import count_macs
from race.contestants import Contestant, Told
from race.course import alone, reason

STEPS = 28
Case = tuple[Any, Told]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3}


def savings(contestant: Contestant) -> dict[str, str]:
    """For each family, how many times fewer MACs, or why none."""
    return {name: _saving(contestant, make) for name, make in FAMILIES.items()}


@torch.no_grad()
def _saving(contestant: Contestant, make: Callable[[], Case]) -> str:
    (plain, told), (pipe, _) = make(), make()
    whole = count_macs(plain, **told).total
    try:
        fast = contestant.set_up(pipe, told)
        share = count_macs(fast, **told).total / whole
    except Exception as error:  # whatever a contestant raises is its result
        return reason(error)
    return f"{1 / share:.2f}x" if share < 1 else "nothing saved"


def _case(kind: type, told: Told, parts: dict[str, Any]) -> Case:
    """A pipeline without the components that are not among `parts`."""
    required, _ = kind._get_signature_keys(kind)  # type: ignore[attr-defined]
    pipe = alone(kind)(**{**dict.fromkeys(required), **parts})
    pipe.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval()
    drawn = {"num_inference_steps": STEPS, "output_type": "latent"}
    return pipe, {**drawn, "generator": torch.Generator().manual_seed(0), **told}


def _flux() -> Case:
    sizes = {
        "in_channels": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "num_single_layers": 3,
    }
    net = _seeded(diffusers.FluxTransformer2DModel, **HEADS, **sizes, axes_dims_rope=(4, 6, 6))
    told = {
        "prompt_embeds": _drawn(1, 5, 32),
        "pooled_prompt_embeds": _drawn(1, 24),
        "height": 64,
        "width": 64,
    }
    return _case(diffusers.FluxPipeline, told, {"transformer": net, "scheduler": _flow()})


def _sd3() -> Case:
    sizes = {"sample_size": 32, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 96}
    text = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 24}
    net = _seeded(diffusers.SD3Transformer2DModel, **HEADS, **sizes, **text)
    told = {
        "prompt_embeds": _drawn(1, 5, 32),
        "pooled_prompt_embeds": _drawn(1, 24),
        "negative_prompt_embeds": _drawn(1, 5, 32),
        "negative_pooled_prompt_embeds": _drawn(1, 24),
        "height": 64,
        "width": 64,
    }
    return _case(diffusers.StableDiffusion3Pipeline, told, {"transformer": net, "scheduler": _flow()})


def _dit() -> Case:
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 1000,
    }
    net = _seeded(diffusers.DiTTransformer2DModel, **HEADS, **sizes)
    vae = _seeded(diffusers.AutoencoderKL, block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    parts = {"transformer": net, "vae": vae, "scheduler": diffusers.DDIMScheduler()}
    return _case(diffusers.DiTPipeline, {"class_labels": [1], "output_type": "np"}, parts)


def _wan() -> Case:
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 16, "ffn_dim": 64}
    net = _seeded(diffusers.WanTransformer3DModel, **HEADS, **sizes, rope_max_seq_len=32)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    told = {"prompt_embeds": _drawn(1, 5, 32), "negative_prompt_embeds": _drawn(1, 5, 32)}
    size = {"height": 32, "width": 32, "num_frames": 5}
    return _case(diffusers.WanPipeline, told | size, {"transformer": net, "scheduler": scheduler})


def _lumina2() -> Case:
    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "cap_feat_dim": 8, "num_layers": 3}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 6, 6)}
    net = _seeded(diffusers.Lumina2Transformer2DModel, **sizes, **heads, num_refiner_layers=1)
    seen = torch.ones(1, 5).bool()
    told = {
        "prompt_embeds": _drawn(1, 5, 8),
        "prompt_attention_mask": seen,
        "negative_prompt_embeds": _drawn(1, 5, 8),
        "negative_prompt_attention_mask": seen,
        "height": 64,
        "width": 64,
    }
    return _case(diffusers.Lumina2Pipeline, told, {"transformer": net, "scheduler": _flow()})


FAMILIES: dict[str, Callable[[], Case]] = {
    "FLUX": _flux,
    "SD3": _sd3,
    "DiT": _dit,
    "Wan": _wan,
    "Lumina2": _lumina2,
}


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _seeded(kind: Any, **config: Any) -> Any:
    """Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**config)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
