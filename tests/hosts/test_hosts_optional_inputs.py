"""Every optional input of every family, in float32 and bfloat16: the view equals diffusers to the bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor
from torch.utils._pytree import tree_map

import flux_support as fluxes
import hosts_support as pictures
import lumina_wan_support as others
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.family import family
from ditkit.hosts.view import view
from lumina_wan_support import CLIP_ROWS, B, call, captions, drawn
from policies_support import Tap

Inputs = dict[str, Any]


class Host(NamedTuple):
    transformer: Callable[..., Any]
    inputs: Callable[[], Inputs]


class Option(NamedTuple):
    """Arguments of a call that diffusers can do without.

    Args:
        config: of the transformer that takes them. prepare: what it must be given before.
    """

    arguments: Callable[[], Inputs]
    config: Mapping[str, Any] = {}
    prepare: Callable[[Any], Any] = lambda model: model


def of(cases: Any, name: str) -> Host:
    return Host(cases[name].transformer, cases[name].inputs)


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
    others.DRAW.manual_seed(2)
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": [drawn(2, 1, 20) for _ in range(count)]}}


def flux_mask() -> Inputs:
    mask = torch.ones(fluxes.B, 1, fluxes.S + fluxes.L, fluxes.S + fluxes.L, dtype=torch.bool)
    mask[..., fluxes.S - 3 : fluxes.S] = False
    return {"joint_attention_kwargs": {"attention_mask": mask}}


def scale_of_lora(name: str, prepare: Callable[[Any], Any]) -> Option:
    return Option(lambda: {name: {"scale": 0.3}}, prepare=prepare)


CONTROL: Inputs = {
    "controlnet_block_samples": fluxes.controls(1, 5),
    "controlnet_single_block_samples": fluxes.controls(2, 6),
}
FLUX = {
    "no guidance embedding": Option(lambda: {"guidance": None}, {"guidance_embeds": False}),
    "mask": Option(flux_mask),
    "scale of LoRA": scale_of_lora("joint_attention_kwargs", fluxes.with_lora),
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
    "control": Option(lambda: {"block_controlnet_hidden_states": pictures.residuals(2, 24)}),
    "skipped layers": Option(lambda: {"skip_layers": [1]}),
    "scale of LoRA": scale_of_lora("joint_attention_kwargs", fluxes.with_lora),
    "IP-Adapter": Option(pictures.pictures, prepare=pictures.with_ip_adapter),
    "all": Option(
        lambda: {
            "block_controlnet_hidden_states": pictures.residuals(3, 24),
            "skip_layers": [0],
            **pictures.pictures(),
        },
        prepare=lambda model: pictures.with_ip_adapter(fluxes.with_lora(model)),
    ),
    # the concatenated mask and latents of inpainting
    "more channels": Option(lambda: {"hidden_states": drawn(2, 9, 8, 12)}, {"in_channels": 9}),
}
DIT = {
    "no processor takes any": Option(
        lambda: {"cross_attention_kwargs": {}, "class_labels": torch.tensor([1, 2])}
    )
}
WAN_PICTURE = {"image_dim": 16, "added_kv_proj_dim": 48}
WAN = {
    "first picture": Option(
        lambda: {"encoder_hidden_states_image": drawn(B, 5, 16), "encoder_hidden_states": drawn(B, 512, 20)},
        WAN_PICTURE,
    ),
    "first and last picture": Option(
        lambda: {
            "encoder_hidden_states_image": drawn(2 * B, 5, 16),
            "encoder_hidden_states": drawn(B, 512, 20),
        },
        WAN_PICTURE | {"pos_embed_seq_len": 10},
    ),
    "more channels": Option(lambda: {"hidden_states": drawn(B, 9, *others.CLIP[2:])}, {"in_channels": 9}),
    "time a token": Option(lambda: {"timestep": torch.arange(B * CLIP_ROWS).reshape(B, CLIP_ROWS)}),
    "scale of LoRA": scale_of_lora("attention_kwargs", others.with_lora),
}
LUMINA2 = {
    "mask": Option(lambda: {"encoder_attention_mask": captions(7, 2, 4)}),
    "scale of LoRA": scale_of_lora("attention_kwargs", others.with_lora),
}
LUMINA_NEXT = {
    "mask": Option(lambda: {"encoder_mask": captions(2, 9, 5)}),
    "proportional attention": Option(lambda: {"cross_attention_kwargs": {"base_sequence_length": 16}}),
}
HOSTS = {
    "flux": Host(fluxes.transformer, fluxes.call_inputs),
    **{name: of(pictures.FAMILIES, name) for name in ("sd3", "sd3.5", "dit")},
    **{name: of(others.CASES, name) for name in ("lumina2", "lumina-next", "wan")},
}
OPTIONS: dict[str, dict[str, Option]] = {
    "flux": FLUX,
    "sd3": SD3,
    "sd3.5": SD3,
    "dit": DIT,
    "lumina2": LUMINA2,
    "lumina-next": LUMINA_NEXT,
    "wan": WAN,
}


@pytest.mark.parametrize("host", HOSTS)
def test_the_table_has_every_optional_input(host: str) -> None:
    """A later diffusers may add one."""
    transformer, inputs = HOSTS[host]
    parameters = inspect.signature(type(transformer()).forward).parameters.values()
    optional = {p.name for p in parameters if p.default is not p.empty} - inputs().keys() - {"return_dict"}
    given = {name for option in OPTIONS[host].values() for name in option.arguments()}
    assert optional <= given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("host", "name"), [(host, name) for host in HOSTS for name in OPTIONS[host]])
def test_an_optional_input_changes_diffusers_and_the_view_alike(
    host: str, name: str, dtype: torch.dtype
) -> None:
    option, inputs = OPTIONS[host][name], HOSTS[host].inputs()
    model = option.prepare(HOSTS[host].transformer(**option.config)).to(dtype)

    def asked() -> Inputs:
        """Drawn anew: diffusers takes some of it out of the dictionaries that it is given."""
        others.DRAW.manual_seed(3)
        return in_type(inputs | option.arguments(), dtype)

    expected = call(model, asked())
    sites = family(view(model)).sites(model)
    tap = Tap(tuple(site.name for site in sites))
    run = Trajectory(sites, [tap], 1).run(Call(0, 1, 1.0))
    assert others.same(call(model, asked()), expected, asked())
    assert others.same(call(model, asked(), run), expected, asked())
    skipped = tuple(f"blocks.{i}" for i in option.arguments().get("skip_layers", ()))
    assert set(tap.seen) == {site.name for site in sites if not site.name.startswith(skipped or ("-",))}
    plain = call(HOSTS[host].transformer().to(dtype), in_type(inputs, dtype))
    assert not torch.equal(plain, expected)


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Positions stay as they are."""

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: x if name.endswith("_ids") else tree_map(cast, x) for name, x in inputs.items()}
