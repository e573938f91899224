"""Every optional input of every family, in float32 and bfloat16: the view equals diffusers to the bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import Tensor, nn

import flux_support as fluxes
from adapters_support import flux_adapters, flux_pictures, sd3_adapter, sd3_pictures
from ditkit.hosts.view import view
from hosts_support import (
    CAPTION,
    CLIP_ROWS,
    EVERY,
    ROTARY,
    SIZED,
    B,
    C,
    D,
    Draws,
    Inputs,
    S,
    call,
    captions,
    cogvideox_offset_inputs,
    flux2_inputs,
    in_type,
    pixart_sized_inputs,
    residuals,
    rotated,
    same_in_both,
    shared,
    with_lora,
)


class Option(NamedTuple):
    """Arguments of a call that diffusers can do without.

    Args:
        config: of the transformer that takes them. prepare: what it must be given before.
        without: ends of the names of sites that such a call does not have.
    """

    arguments: Callable[[], Inputs]
    config: Mapping[str, Any] = {}
    prepare: Callable[[Any], Any] = lambda model: model
    without: str = "-"


def drawn(*shape: int) -> Tensor:
    return Draws(3)(*shape)


def of_drawn(inputs: Callable[[Draws], Inputs]) -> Callable[[], Inputs]:
    return lambda: inputs(Draws(3))


def scale_of_lora(name: str) -> Option:
    return Option(lambda: {name: {"scale": 0.3}}, prepare=with_lora)


def key_bias(length: int) -> Tensor:
    return torch.zeros(B, 1, length).index_fill(2, torch.tensor([1, 4]), -1e4)


def flux_mask() -> Inputs:
    mask = torch.ones(fluxes.B, 1, fluxes.S + fluxes.L, fluxes.S + fluxes.L, dtype=torch.bool)
    mask[..., fluxes.S - 3 : fluxes.S] = False
    return {"joint_attention_kwargs": {"attention_mask": mask}}


CONTROL: Inputs = {
    "controlnet_block_samples": fluxes.controls(1, 5),
    "controlnet_single_block_samples": fluxes.controls(2, 6),
}
FLUX = {
    "no guidance embedding": Option(lambda: {"guidance": None}, {"guidance_embeds": False}),
    "mask": Option(flux_mask),
    "scale of LoRA": scale_of_lora("joint_attention_kwargs"),
    "control": Option(lambda: CONTROL),
    "repeated control": Option(lambda: CONTROL | {"controlnet_blocks_repeat": True}),
    "one IP-Adapter": Option(partial(flux_pictures, 1), prepare=partial(flux_adapters, count=1)),
    "two IP-Adapters": Option(partial(flux_pictures, 2), prepare=partial(flux_adapters, count=2)),
    "IP-Adapter and control": Option(
        lambda: flux_pictures(1) | CONTROL, prepare=partial(flux_adapters, count=1)
    ),
    # the concatenated latents of FLUX Fill and FLUX Control
    "more channels": Option(
        lambda: {"hidden_states": drawn(2, fluxes.L, 48)}, {"in_channels": 48, "out_channels": 16}
    ),
}
SD3 = {
    "control": Option(lambda: {"block_controlnet_hidden_states": residuals(2, 24)}),
    "control of one block in three": Option(lambda: {"block_controlnet_hidden_states": residuals(1, 24)}),
    "skipped layers": Option(lambda: {"skip_layers": [1]}, without="blocks.1"),
    "scale of LoRA": scale_of_lora("joint_attention_kwargs"),
    "IP-Adapter": Option(sd3_pictures, prepare=sd3_adapter),
    "all": Option(
        lambda: {
            "block_controlnet_hidden_states": residuals(3, 24),
            "skip_layers": [0],
            **sd3_pictures(),
        },
        prepare=lambda model: sd3_adapter(with_lora(model)),
        without="blocks.0",
    ),
    # the concatenated mask and latents of inpainting
    "more channels": Option(lambda: {"hidden_states": drawn(2, 9, 8, 12)}, {"in_channels": 9}),
    "a row too many": Option(lambda: {"hidden_states": drawn(2, C, 7, 12)}),
}
DIT = {
    "no processor takes any": Option(
        lambda: {"cross_attention_kwargs": {}, "class_labels": torch.tensor([1, 2])}
    )
}
WAN_PICTURE = {"image_dim": 16, "added_kv_proj_dim": 48}
WAN = {
    "first picture": Option(
        lambda: {"encoder_hidden_states_image": drawn(3, 5, 16), "encoder_hidden_states": drawn(3, 512, 20)},
        WAN_PICTURE,
    ),
    "first and last picture": Option(
        lambda: {"encoder_hidden_states_image": drawn(6, 5, 16), "encoder_hidden_states": drawn(3, 512, 20)},
        WAN_PICTURE | {"pos_embed_seq_len": 10},
    ),
    "more channels": Option(lambda: {"hidden_states": drawn(3, 9, 2, 6, 8)}, {"in_channels": 9}),
    "time a token": Option(lambda: {"timestep": torch.arange(3 * CLIP_ROWS).reshape(3, CLIP_ROWS)}),
    "scale of LoRA": scale_of_lora("attention_kwargs"),
    "a pixel too many": Option(lambda: {"hidden_states": drawn(3, C, 2, 5, 7)}),
    "one token": Option(lambda: {"hidden_states": drawn(3, C, 1, 2, 2)}),
}
LUMINA2 = {
    "mask": Option(lambda: {"encoder_attention_mask": captions(7, 2, 4)}),
    "scale of LoRA": scale_of_lora("attention_kwargs"),
    "one token": Option(lambda: {"hidden_states": drawn(3, C, 2, 2)}),
}
LUMINA_NEXT = {
    "mask": Option(lambda: {"encoder_mask": captions(2, CAPTION, 5)}),
    "proportional attention": Option(lambda: {"cross_attention_kwargs": {"base_sequence_length": 16}}),
    "one token": Option(lambda: {"hidden_states": drawn(3, C, 2, 2)}),
}


def told_more_of_time(model: Any) -> Any:
    """diffusers' CogVideoX takes the argument, and has no layer for it."""
    torch.manual_seed(4)
    model.time_embedding.cond_proj = nn.Linear(9, D, bias=False)
    return model


def without_norms(model: Any) -> Any:
    for block in model.transformer_blocks:
        block.attn1.norm_q = block.attn1.norm_k = None
    return model


COGVIDEOX = {
    "rotary table": Option(of_drawn(rotated(3)), ROTARY),
    "offset": Option(lambda: {"ofs": torch.tensor([2.0])}, {"ofs_embed_dim": 24}),
    "offset and patches of frames": Option(
        lambda: {**cogvideox_offset_inputs(Draws(3)), "hidden_states": drawn(B, 4, C, 8, 12)},
        EVERY["cogvideox"].config,
    ),
    "condition of the time": Option(lambda: {"timestep_cond": drawn(B, 9)}, prepare=told_more_of_time),
    "mask": Option(lambda: {"attention_kwargs": {"attention_mask": key_bias(S + 72)}}),
    "scale of LoRA": scale_of_lora("attention_kwargs"),
    # the first picture's latents
    "more channels": Option(lambda: {"hidden_states": drawn(B, 3, 2 * C, 8, 12)}, {"in_channels": 2 * C}),
    "learned positions": Option(of_drawn(rotated(3)), ROTARY | {"use_learned_positional_embeddings": True}),
    "more frames": Option(lambda: {"hidden_states": drawn(B, 5, C, 8, 12)}),
    "a pixel too many": Option(lambda: {"hidden_states": drawn(B, 3, C, 9, 13)}),
    "one token": Option(lambda: {"hidden_states": drawn(B, 1, C, 2, 2)}),
    "no norm of queries and keys": Option(dict, prepare=without_norms),
}
PIXART = {
    "size and aspect ratio": Option(of_drawn(pixart_sized_inputs), SIZED),
    "no mask of text": Option(lambda: {"encoder_attention_mask": None}),
    "bias of text": Option(lambda: {"encoder_attention_mask": key_bias(S)}),
    "mask": Option(lambda: {"attention_mask": torch.ones(B, 24).tril(5)}, without=".attn.kv .attn.core"),
    "bias": Option(lambda: {"attention_mask": key_bias(24)}, without=".attn.kv .attn.core"),
    "cross-attention to itself": Option(
        lambda: {"encoder_hidden_states": None, "encoder_attention_mask": None}, {"caption_channels": None}
    ),
    "text of the model's width": Option(
        lambda: {"encoder_hidden_states": drawn(B, S, D)}, {"caption_channels": None}
    ),
    "as many channels as latents": Option(dict, {"out_channels": C}),
    "a pixel too many": Option(lambda: {"hidden_states": drawn(B, C, 9, 13)}),
    "one token": Option(lambda: {"hidden_states": drawn(B, C, 2, 2)}),
}
HUNYUAN_VIDEO = {
    "no guidance embedding": Option(lambda: {"guidance": None}, {"guidance_embeds": False}),
    "scale of LoRA": scale_of_lora("attention_kwargs"),
    "shorter text": Option(lambda: {"encoder_attention_mask": captions(2, 5, rows=S)}),
    "a mask with holes": Option(lambda: {"encoder_attention_mask": captions(6, 3, rows=S).flip(1)}),
    "more text": Option(
        lambda: {
            "encoder_hidden_states": drawn(B, 11, 20),
            "encoder_attention_mask": captions(11, 2, rows=11),
        }
    ),
    # a first picture beside the latents, or in the place of their first frame
    "more channels": Option(
        lambda: {"hidden_states": drawn(B, 2 * C + 1, 2, 6, 8)},
        {"in_channels": 2 * C + 1, "image_condition_type": "latent_concat"},
    ),
    "a first frame": Option(dict, {"image_condition_type": "token_replace"}),
    "patches of frames": Option(lambda: {"hidden_states": drawn(B, C, 4, 6, 8)}, {"patch_size_t": 2}),
    "a pixel too many": Option(lambda: {"hidden_states": drawn(B, C, 2, 7, 9)}),
    "one token": Option(lambda: {"hidden_states": drawn(B, C, 1, 2, 2)}),
}
QWEN_IMAGE = {
    "scale of LoRA": scale_of_lora("attention_kwargs"),
    "no mask of text": Option(lambda: {"encoder_hidden_states_mask": None}),
    "a mask of ones and zeros": Option(
        lambda: {"encoder_hidden_states_mask": captions(5, 2, rows=S)},
    ),
    "more text": Option(
        lambda: {"encoder_hidden_states": drawn(B, 11, 20), "encoder_hidden_states_mask": None}
    ),
    "control": Option(lambda: {"controlnet_block_samples": [0.1 * drawn(B, 24, 24)] * 2}),
    "a kind of condition": Option(
        lambda: {"additional_t_cond": torch.tensor([0, 1])}, {"use_additional_t_cond": True}
    ),
    "pictures that it refers to": Option(
        lambda: {
            "hidden_states": drawn(B, 40, 4 * C),
            "img_shapes": [[(1, 4, 6), (1, 4, 2), (1, 2, 4)]] * B,
        }
    ),
    "clean pictures that it refers to": Option(
        lambda: {"hidden_states": drawn(B, 32, 4 * C), "img_shapes": [[(1, 4, 6), (1, 4, 2)]] * B},
        {"zero_cond_t": True},
    ),
    "layers": Option(
        lambda: {"hidden_states": drawn(B, 72, 4 * C), "img_shapes": [[(1, 4, 6)] * 3] * B},
        {"use_layer3d_rope": True},
    ),
    "one shape a sample": Option(
        lambda: {"hidden_states": drawn(B, 20, 4 * C), "img_shapes": [(1, 4, 5)] * B}
    ),
    "one token": Option(lambda: {"hidden_states": drawn(B, 1, 4 * C), "img_shapes": [[(1, 1, 1)]] * B}),
}
LATTE = {
    "no attention along frames": Option(
        lambda: {"enable_temporal_attentions": False}, without="temporal.0 temporal.1"
    ),
    "bias of text": Option(lambda: {"encoder_attention_mask": key_bias(S).repeat_interleave(3, 0)}),
    "one frame": Option(lambda: {"hidden_states": drawn(B, C, 1, 8, 12)}, {"video_length": 1}),
    "as many channels as latents": Option(dict, {"out_channels": C}),
    "a pixel too many": Option(lambda: {"hidden_states": drawn(B, C, 3, 9, 13)}),
}
LTX = {
    "scale of LoRA": scale_of_lora("attention_kwargs"),
    "no mask of text": Option(lambda: {"encoder_attention_mask": None}),
    "bias of text": Option(lambda: {"encoder_attention_mask": key_bias(S)}),
    "time a token": Option(lambda: {"timestep": torch.arange(B * CLIP_ROWS).reshape(B, CLIP_ROWS)}),
    "coordinates": Option(lambda: {"num_frames": None, "video_coords": drawn(B, 3, CLIP_ROWS)}),
    "no scale of positions": Option(lambda: {"rope_interpolation_scale": None}),
    "another clip": Option(lambda: {"hidden_states": drawn(B, 36, C), "num_frames": 3}),
    "one token": Option(lambda: {"hidden_states": drawn(B, 1, C), "num_frames": 1, "height": 1, "width": 1}),
}


def kept_keys(model: Any) -> Any:
    """The processors of FLUX.2 klein's pipeline that keeps the keys of pictures, where no site can be."""
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def pictures_first() -> Inputs:
    """Two rows of a picture that is referred to, before the others."""
    return {"kv_cache_mode": "extract", "num_ref_tokens": 2, "ref_fixed_timestep": 0.1}


FLUX2 = {
    "no guidance embedding": Option(lambda: {"guidance": None}, {"guidance_embeds": False}),
    "mask": Option(
        lambda: {"joint_attention_kwargs": {"attention_mask": drawn(B, 1, S + 24, S + 24) > -0.3}}
    ),
    "scale of LoRA": scale_of_lora("joint_attention_kwargs"),
    "a picture that it refers to": Option(
        lambda: {
            "hidden_states": drawn(B, 32, 16),
            "img_ids": flux2_inputs((4, 6), (2, 4))(Draws())["img_ids"],
        }
    ),
    "ids of all samples": Option(
        lambda: {"img_ids": flux2_inputs((6, 4))(Draws())["img_ids"][0], "txt_ids": torch.zeros(S, 4).long()}
    ),
    "keys of pictures that diffusers keeps": Option(
        pictures_first, prepare=kept_keys, without="time tokens blocks head single"
    ),
    "a cache of diffusers that is not used": Option(
        lambda: {"kv_cache": None, "guidance": None}, prepare=kept_keys
    ),
}
OPTIONS: dict[str, dict[str, Option]] = {
    "flux": FLUX,
    "sd3": SD3,
    "sd3.5": SD3,
    "dit": DIT,
    "lumina2 even": LUMINA2,
    "lumina-next": LUMINA_NEXT,
    "wan one time": WAN,
    "cogvideox 2b": COGVIDEOX,
    "pixart": PIXART,
    "hunyuan-video": HUNYUAN_VIDEO,
    "qwen-image": QWEN_IMAGE,
    "latte": LATTE,
    "ltx one time": LTX,
    "flux2": FLUX2,
}
UNSEEN = {"pixart": {"cross_attention_kwargs"}, "qwen-image": {"guidance"}}
"""Optional inputs that change nothing: no processor takes any; or that no model of diffusers can take."""


@pytest.mark.parametrize("name", OPTIONS)
def test_the_table_has_every_optional_input(name: str) -> None:
    """A later diffusers may add one."""
    parameters = inspect.signature(EVERY[name].host.forward).parameters.values()
    optional = {p.name for p in parameters if p.default is not p.empty} - {"return_dict"}
    given = {argument for option in OPTIONS[name].values() for argument in option.arguments()}
    assert optional <= given | EVERY[name].inputs().keys() | UNSEEN.get(name, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "option"), [(name, o) for name in OPTIONS for o in OPTIONS[name]])
def test_an_optional_input_changes_diffusers_and_the_view_alike(
    name: str, option: str, dtype: torch.dtype
) -> None:
    chosen, (_, inputs, plain) = OPTIONS[name][option], shared(name, dtype)
    model = chosen.prepare(EVERY[name].transformer(**chosen.config)).to(dtype)

    def asked() -> Inputs:
        """Drawn anew: diffusers takes some of it out of the dictionaries that it is given."""
        return in_type(inputs | chosen.arguments(), dtype)

    expected = call(model, asked())
    assert not torch.equal(plain, expected)
    assert same_in_both(view(model), asked(), expected, chosen.without, **asked())
