"""Small random transformers of diffusers, of each family that has a view, their inputs, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina, get_3d_rotary_pos_embed
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import flux_support as fluxes
from ditkit.core.grid import Segment
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Call, Run, Site
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.family import families
from ditkit.hosts.family import family as family_of
from ditkit.hosts.view import running, view
from policies_support import Tap, captions

families()
B, C, S, D, DEPTH, HEADS, PATCH, CLASSES = 2, 4, 7, 64, 3, 4, 2, 10
Inputs = dict[str, Any]
TABLES = ("image_rotary_emb", "img_ids", "txt_ids", "video_coords")
"""Inputs that pipelines leave in float32: positions."""
LORA = {
    "r": 2,
    "target_modules": ["to_q", "linear", "linear_1", "proj_out", "proj_out_1"],
    "init_lora_weights": False,
}


class Draws:
    """A generator that a family draws its inputs from, always the same ones."""

    def __init__(self, seed: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True)
class Family:
    """One kind of transformer: its class with a small config, and the inputs of a call.

    Args:
        shape: of its latents. draw: its other inputs. time: the largest timestep.
        graphs: number of graphs when its blocks are compiled.
        tolerance: of gradients, relative, where a sum has another order than in diffusers.
    """

    host: Any
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    draw: Callable[[Draws], Inputs]
    time: float = 1000.0
    graphs: int = 1
    tolerance: float = 0.0
    kwargs: str = "attention_kwargs"
    """The argument that holds what attention processors take, and the scale of LoRAs."""

    def transformer(self, **changed: Any) -> Any:
        """Always the same weights, none of them zero."""
        torch.manual_seed(0)
        model = self.host(**{**self.config, **changed}).eval()
        for name, p in model.named_parameters():
            if name.endswith((".gate", "pad_token")):
                nn.init.normal_(p)
        return model

    def inputs(self) -> Inputs:
        draw = Draws()
        return {"hidden_states": draw(*self.shape), **self.draw(draw)}


def sites_of(model: Any) -> tuple[Site, ...]:
    """Sites of a transformer by the module that knows it."""
    return family_of(model).sites(model)


def layout_of(model: Any, inputs: Inputs) -> tuple[Segment, ...]:
    """Segments of a call by the module that knows the transformer."""
    return family_of(model).layout(model, inputs)


def blocks_of(model: Any) -> list[Any]:
    """Blocks of a transformer, in the order of the call."""
    names = (
        "transformer_blocks",
        "single_transformer_blocks",
        "temporal_transformer_blocks",
        "blocks",
        "layers",
    )
    return [block for name in names for block in getattr(model, name, ())]


def attention_of(block: Any) -> Any:
    """Self-attention of a block."""
    return block.attn1 if hasattr(block, "attn1") else block.attn


@torch.no_grad()
def call(model: Any, inputs: Inputs, run: Run = DIRECT, **changed: Any) -> Tensor:
    with running(run):
        return model(**{**inputs, **changed}, return_dict=False)[0]


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs in `dtype`; positions stay as they are, as in diffusers' pipelines."""

    def cast(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    return {name: v if name in TABLES else tree_map(cast, v) for name, v in inputs.items()}


def tapped(model: Any) -> tuple[Run, dict[str, Any]]:
    """A run that passes through a handler at every site, and what it meets."""
    sites = sites_of(model)
    tap = Tap(tuple(site.name for site in sites))
    return Trajectory(sites, [tap], 1).run(Call(0, 1, 1.0)), tap.seen


def same_in_both(model: Any, inputs: Inputs, expected: Tensor, without: str = "-", **given: Any) -> bool:
    """Whether a viewed transformer gives `expected`, without handlers and with one at each site.

    Args:
        without: ends of the names of sites that this call does not have, or blocks.
    """
    run, seen = tapped(model)
    plain, sited = call(model, inputs, **given), call(model, inputs, run, **given)
    names = {site.name for site in sites_of(model)}
    skipped = tuple(without.split())
    inside = tuple(name + "." for name in skipped)
    visited = set(seen) == {name for name in names if not (name.endswith(skipped) or name.startswith(inside))}
    # a sum over an axis of other strides, as Lumina 2's pipeline takes one, can be another sum
    laid_out = plain.stride() == sited.stride() == expected.stride()
    return visited and laid_out and torch.equal(plain, expected) and torch.equal(sited, expected)


def run_steps(
    family: Family,
    model: Any,
    inputs: Inputs,
    policies: Sequence[Policy],
    steps: int = 8,
    **given: Any,
) -> tuple[Tensor, Trajectory]:
    """Euler from noise to data."""
    home = family_of(model)
    trajectory, x = Trajectory(home.sites(model), policies, steps), inputs["hidden_states"]
    axis = home.channel_axis if x.ndim > 3 else 2
    for i in range(steps):
        now = Call(i, steps, 1 - i / steps, layout=home.layout(model, inputs))
        t = torch.full_like(inputs["timestep"], family.time * now.t)
        v = call(model, inputs, trajectory.run(now), hidden_states=x, timestep=t, **given)
        v = trajectory.leave(now, v).narrow(axis, 0, min(x.shape[axis], v.shape[axis]))
        v = trajectory.guided(now, v.movedim(axis, 1) if x.ndim > 3 else v)
        x = x - (v.movedim(1, axis) if x.ndim > 3 else v) / steps
    return x, trajectory


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    if hasattr(model, "add_adapter"):
        model.add_adapter(LoraConfig(**LORA))
        return model
    return inject_adapter_in_model(LoraConfig(**LORA), model)


def residuals(count: int, rows: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [0.1 * torch.randn(B, rows, D, generator=draw) for _ in range(count)]


# FLUX, Stable Diffusion 3, DiT


def flux_inputs(draw: Draws) -> Inputs:
    return fluxes.call_inputs()


def sd3_inputs(draw: Draws) -> Inputs:
    return {
        "encoder_hidden_states": draw(B, S, 32),
        "pooled_projections": draw(B, 24),
        "timestep": torch.tensor([700.0, 300.0]),
    }


def dit_inputs(draw: Draws) -> Inputs:
    return {"timestep": torch.tensor([700, 300]), "class_labels": torch.tensor([3, CLASSES])}


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
DIT = {
    **SHARED,
    "sample_size": 8,
    "patch_size": PATCH,
    "in_channels": C,
    "out_channels": 2 * C,
    "num_embeds_ada_norm": CLASSES,
}

# CogVideoX, PixArt


def cogvideox_inputs(draw: Draws) -> Inputs:
    return {"encoder_hidden_states": draw(B, S, 32), "timestep": torch.tensor([700, 300])}


def rotated(frames: int) -> Callable[[Draws], Inputs]:
    """With the rotary table of so many frames of tokens, as CogVideoX's pipelines make it."""

    def inputs(draw: Draws) -> Inputs:
        table = get_3d_rotary_pos_embed(D // HEADS, ((0, 0), (4, 6)), (4, 6), frames)
        return {**cogvideox_inputs(draw), "image_rotary_emb": table}

    return inputs


def cogvideox_offset_inputs(draw: Draws) -> Inputs:
    return {**rotated(2)(draw), "ofs": torch.full((1,), 2.0)}


def pixart_inputs(draw: Draws) -> Inputs:
    return {
        "encoder_hidden_states": draw(B, S, 32),
        "timestep": torch.tensor([700, 300]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]),
    }


def pixart_sized_inputs(draw: Draws) -> Inputs:
    sizes = {"resolution": torch.tensor([[64.0, 96.0]] * B), "aspect_ratio": torch.tensor([[0.7]] * B)}
    return {**pixart_inputs(draw), "added_cond_kwargs": sizes}


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
PIXARTS = partial(Family, diffusers.PixArtTransformer2DModel, graphs=2, kwargs="cross_attention_kwargs")
COGVIDEOXES = partial(Family, diffusers.CogVideoXTransformer3DModel, graphs=2)

# Lumina 2 and Lumina-Next

CAPTION = 9
"""Rows of text of Lumina and Wan, whose batches are of three samples."""


def lumina2_inputs(*lengths: int) -> Callable[[Draws], Inputs]:
    def inputs(draw: Draws) -> Inputs:
        return {
            "timestep": torch.tensor([0.3, 0.9, 0.5]),
            "encoder_hidden_states": draw(3, CAPTION, 20),
            "encoder_attention_mask": captions(*lengths),
        }

    return inputs


def next_inputs(draw: Draws) -> Inputs:
    return {
        "timestep": torch.tensor([0.3, 0.9, 0.5]),
        "encoder_hidden_states": draw(3, CAPTION, 20),
        "encoder_mask": captions(9, 4, 1),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(24, 16, 16),
        "cross_attention_kwargs": {},
    }


LUMINA = {
    "sample_size": 8,
    "in_channels": C,
    "hidden_size": 96,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 32,
}
LUMINA2 = LUMINA | {
    "num_refiner_layers": 2,
    "axes_dim_rope": (8, 8, 8),
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": 20,
}
LUMINA_NEXT = LUMINA | {"cross_attention_dim": 20}
LUMINAS = partial(Family, diffusers.Lumina2Transformer2DModel, LUMINA2, (3, C, 8, 12), time=1.0)

# Wan

CLIP_ROWS = 24


def wan_inputs(text: int = CAPTION, times: tuple[int, ...] = (), picture: bool = False) -> Any:
    def inputs(draw: Draws) -> Inputs:
        given = {"encoder_hidden_states_image": draw(3, 5, 16)} if picture else {}
        t = torch.randint(0, 1000, (3, *times), generator=draw.generator)
        return {"timestep": t, "encoder_hidden_states": draw(3, text, 20), **given}

    return inputs


WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": C,
    "out_channels": C,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def of_wan(draw: Callable[[Draws], Inputs], **config: Any) -> Family:
    return Family(diffusers.WanTransformer3DModel, WAN | config, (3, C, 2, 6, 8), draw)


# HunyuanVideo


def hunyuan_inputs(*lengths: int, guidance: bool = True) -> Callable[[Draws], Inputs]:
    def inputs(draw: Draws) -> Inputs:
        embedded: Inputs = {"guidance": torch.tensor([3000.0, 5000.0])} if guidance else {}
        return {
            "timestep": torch.tensor([700.0, 300.0]),
            "encoder_hidden_states": draw(B, S, 20),
            "encoder_attention_mask": captions(*lengths, rows=S),
            "pooled_projections": draw(B, 12),
            **embedded,
        }

    return inputs


HUNYUAN_VIDEO = {
    "in_channels": C,
    "out_channels": C,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 20,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (4, 4, 4),
}
HUNYUANS = partial(
    Family,
    diffusers.HunyuanVideoTransformer3DModel,
    shape=(B, C, 2, 6, 8),
    graphs=3,
    tolerance=1e-5,  # gradients of the time are summed over its modulations in another order
)

# Qwen-Image


def qwen_inputs(*pictures: tuple[int, int, int], ragged: bool = True) -> Callable[[Draws], Inputs]:
    """The picture itself, and those that it refers to."""

    def inputs(draw: Draws) -> Inputs:
        known = torch.tensor([[1] * 7, [1, 1, 0, 1, 0, 0, 0]]).bool()
        return {
            "encoder_hidden_states": draw(B, S, 20),
            **({"encoder_hidden_states_mask": known} if ragged else {}),
            "timestep": torch.tensor([0.7, 0.3]),
            "img_shapes": [list(pictures)] * B,
        }

    return inputs


QWEN_IMAGE = {
    "in_channels": 4 * C,
    "out_channels": C,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "joint_attention_dim": 20,
    "axes_dims_rope": (4, 4, 4),
}
QWENS = partial(Family, diffusers.QwenImageTransformer2DModel, time=1.0, tolerance=1e-5)

# Latte


def latte_inputs(draw: Draws) -> Inputs:
    return {"encoder_hidden_states": draw(B, S, 32), "timestep": torch.tensor([700, 300])}


LATTE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": C,
    "out_channels": 2 * C,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": PATCH,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 32,
    "video_length": 3,
}

# LTX-Video


def ltx_inputs(*times: int) -> Callable[[Draws], Inputs]:
    def inputs(draw: Draws) -> Inputs:
        return {
            "encoder_hidden_states": draw(B, S, 20),
            "timestep": torch.randint(0, 1000, (B, *times), generator=draw.generator),
            "encoder_attention_mask": captions(7, 3, rows=S),
            "num_frames": 2,
            "height": 3,
            "width": 4,
            "rope_interpolation_scale": (8 / 25, 32, 32),
        }

    return inputs


LTX = {
    "in_channels": C,
    "out_channels": C,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 20,
}

# FLUX.2


def flux2_inputs(*pictures: tuple[int, int]) -> Callable[[Draws], Inputs]:
    """The picture itself, and those that it refers to, of so many rows and columns."""
    axes = [(torch.tensor([10 * i]), *map(torch.arange, picture)) for i, picture in enumerate(pictures)]
    ids = [torch.cartesian_prod(*sides, torch.zeros(1).long()) for sides in axes]

    def inputs(draw: Draws) -> Inputs:
        return {
            "encoder_hidden_states": draw(B, S, 20),
            "timestep": torch.tensor([0.7, 0.3]),
            "img_ids": torch.cat(ids).expand(B, -1, -1),
            "txt_ids": torch.cartesian_prod(*[torch.zeros(1).long()] * 3, torch.arange(S)).expand(B, -1, -1),
            "guidance": torch.full((B,), 3.5),
        }

    return inputs


FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
FLUXES2 = partial(
    Family, diffusers.Flux2Transformer2DModel, FLUX2, time=1.0, graphs=2, kwargs="joint_attention_kwargs"
)

FAMILIES: dict[str, Family] = {
    "flux": Family(
        diffusers.FluxTransformer2DModel,
        fluxes.CONFIG,
        (fluxes.B, fluxes.L, 16),
        flux_inputs,
        time=1.0,
        graphs=3,  # a second one of the single blocks, whose tokens have other strides after the first
        kwargs="joint_attention_kwargs",
    ),
    "sd3.5": Family(
        diffusers.SD3Transformer2DModel,
        SD3 | DUAL,
        (B, C, 8, 12),
        sd3_inputs,
        graphs=2,
        tolerance=1e-5,  # dual attention norms its input once a branch
        kwargs="joint_attention_kwargs",
    ),
    "dit": Family(
        diffusers.DiTTransformer2DModel, DIT, (B, C, 8, 8), dit_inputs, kwargs="cross_attention_kwargs"
    ),
    "pixart": PIXARTS(PIXART, (B, C, 8, 12), pixart_inputs),
    "cogvideox": COGVIDEOXES(
        COGVIDEOX | ROTARY | {"patch_size_t": 2, "ofs_embed_dim": 24},
        (B, 4, C, 8, 12),
        cogvideox_offset_inputs,
    ),
    # ragged captions: padding lies elsewhere in the sequence, so sums over rows have another order
    "lumina2": LUMINAS(lumina2_inputs(7, 2, 4), tolerance=1e-5),
    "lumina-next": Family(
        diffusers.LuminaNextDiT2DModel,
        LUMINA_NEXT,
        (3, C, 8, 12),
        next_inputs,
        time=1.0,
        kwargs="cross_attention_kwargs",
    ),
    "wan": of_wan(wan_inputs(times=(CLIP_ROWS,))),
    "hunyuan-video": HUNYUANS(HUNYUAN_VIDEO, draw=hunyuan_inputs(7, 3)),
    "qwen-image": QWENS(QWEN_IMAGE, (B, 24, 4 * C), qwen_inputs((1, 4, 6))),
    "latte": Family(
        diffusers.LatteTransformer3DModel,
        LATTE,
        (B, C, 3, 8, 12),
        latte_inputs,
        graphs=2,
        tolerance=1e-5,  # the time is repeated for frames and places once a block
    ),
    "flux2": FLUXES2((B, 24, 16), flux2_inputs((4, 6))),
    "ltx": Family(diffusers.LTXVideoTransformer3DModel, LTX, (B, CLIP_ROWS, C), ltx_inputs(CLIP_ROWS)),
}
"""One of each."""
VARIANTS: dict[str, Family] = {
    "sd3": replace(FAMILIES["sd3.5"], config=SD3, tolerance=0.0),
    "pixart sized": PIXARTS(PIXART | SIZED, (B, C, 8, 12), pixart_sized_inputs),
    "cogvideox 2b": COGVIDEOXES(COGVIDEOX, (B, 3, C, 8, 12), cogvideox_inputs),
    "cogvideox rotary": COGVIDEOXES(COGVIDEOX | ROTARY, (B, 3, C, 8, 12), rotated(3)),
    "lumina2 even": LUMINAS(lumina2_inputs(6, 6, 6)),
    "lumina2 full": LUMINAS(lumina2_inputs(9, 9, 9)),
    "wan one time": of_wan(wan_inputs()),
    "wan picture": of_wan(wan_inputs(text=512, picture=True), image_dim=16, added_kv_proj_dim=48),
    "hunyuan-video first frame": HUNYUANS(
        HUNYUAN_VIDEO | {"image_condition_type": "token_replace"}, draw=hunyuan_inputs(7, 7)
    ),
    "qwen-image no mask": QWENS(QWEN_IMAGE, (B, 24, 4 * C), qwen_inputs((1, 4, 6), ragged=False)),
    "qwen-image edit": QWENS(
        QWEN_IMAGE | {"zero_cond_t": True}, (B, 40, 4 * C), qwen_inputs((1, 4, 6), (1, 4, 2), (1, 2, 4))
    ),
    "ltx one time": Family(diffusers.LTXVideoTransformer3DModel, LTX, (B, CLIP_ROWS, C), ltx_inputs()),
    "flux2 edit": FLUXES2((B, 32, 16), flux2_inputs((4, 6), (2, 4))),
    "wan plain norm": of_wan(wan_inputs(), cross_attn_norm=False),
}
"""Other kinds of them."""
EVERY = FAMILIES | VARIANTS


@lru_cache(maxsize=64)
def shared(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Inputs, Tensor]:
    """A transformer with its view on, its inputs, and what diffusers gave for them: to read, not to change."""
    family = EVERY[name]
    host, inputs = family.transformer().to(dtype), in_type(family.inputs(), dtype)
    expected = call(host, inputs)
    return view(host), inputs, expected
