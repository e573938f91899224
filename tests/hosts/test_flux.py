"""The FLUX view equals diffusers bit for bit, whatever the transformer carries."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, apply_group_offloading
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers import transformer_flux

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from flux_support import (
    SINGLE,
    B,
    D,
    Inputs,
    L,
    S,
    at,
    call,
    call_inputs,
    controls,
    in_type,
    run_steps,
    transformer,
    visited,
    with_lora,
)
from policies_support import Tap


@pytest.fixture
def host() -> Any:
    """A transformer of diffusers, ours to change."""
    return transformer()


@pytest.fixture
def inputs() -> Inputs:
    return call_inputs()


def with_ip_adapter(model: Any) -> Any:
    torch.manual_seed(4)
    for block in model.transformer_blocks:
        block.attn.set_processor(transformer_flux.FluxIPAdapterAttnProcessor(D, 32, scale=0.7).eval())
    project = ImageProjection(cross_attention_dim=32, image_embed_dim=20, num_image_text_embeds=4)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([project])
    return model


def every_block(model: Any) -> list[Any]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def offload(model: Any, whole: bool = False) -> Any:
    """accelerate keeps the weights of each block (or of the model) elsewhere, and brings them for a call."""
    for module in [model] if whole else every_block(model):
        weights = {name: p.clone() for name, p in module.state_dict().items()}
        hook = AlignDevicesHook(
            execution_device="cpu", offload=True, weights_map=weights, place_submodules=True
        )
        add_hook_to_module(module, hook)
    return model


def offload_groups(model: Any, kind: str = "block_level") -> Any:
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_policies_it_is_diffusers_to_the_bit(host: Any, inputs: Inputs, dtype: torch.dtype) -> None:
    host, inputs = host.to(dtype), in_type(inputs, dtype)
    expected = call(host, inputs)
    viewed = flux.view(host)
    assert viewed is host
    assert isinstance(viewed, FluxTransformer2DModel)
    assert torch.equal(call(viewed, inputs), expected)
    assert torch.equal(call(flux.view(viewed), inputs), expected)
    assert torch.equal(call(copy.deepcopy(viewed), inputs), expected)
    assert torch.equal(call(pickle.loads(pickle.dumps(viewed)), inputs), expected)


def test_clips_half_precision_as_diffusers_does(host: Any) -> None:
    double, single = host.half().transformer_blocks[0], host.single_transformer_blocks[0]
    with torch.no_grad():
        for norm, out in ((double.norm1_context, double.ff_context.net[2]), (single.norm, single.proj_out)):
            norm.linear.bias.fill_(1)
            out.bias.fill_(6e4)
        big = torch.full((B, S, D), 6e4, dtype=torch.float16)
        args = (torch.zeros(B, L, D).half(), big, torch.zeros(B, D).half())
        expected = [block(*args) for block in (double, single)]
        flux.view(host)
        got = [block(*args) for block in (double, single)]
    for ours, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours[0].max() == 65504


def test_return_types(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    with torch.no_grad():
        named, plain = viewed(**inputs), viewed(**inputs, return_dict=False)
        placed = viewed(*inputs.values())  # the order of diffusers' parameters
    assert type(named).__name__ == "Transformer2DModelOutput"
    assert isinstance(plain, tuple)
    assert torch.equal(named.sample, plain[0])
    assert torch.equal(placed.sample, plain[0])


def test_without_a_guidance_embedding(inputs: Inputs) -> None:
    torch.manual_seed(0)
    host = transformer(guidance_embeds=False)
    expected = call(host, inputs, guidance=None)
    assert torch.equal(call(flux.view(host), inputs, guidance=None), expected)


def test_ids_with_a_batch_axis(host: Any, inputs: Inputs) -> None:
    batched = {name: inputs[name].expand(B, -1, -1) for name in ("img_ids", "txt_ids")}
    expected = call(host, inputs, **batched)
    assert torch.equal(call(flux.view(host), inputs, **batched), expected)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("double", "single"), [(2, 3), (1, 2), (2, 0), (0, 1)])
def test_control_residuals(host: Any, inputs: Inputs, double: int, single: int, repeat: bool) -> None:
    given = {
        "controlnet_block_samples": controls(double, 5) or None,
        "controlnet_single_block_samples": controls(single, 6) or None,
        "controlnet_blocks_repeat": repeat,
    }
    plain, expected = call(host, inputs), call(host, inputs, **given)
    assert not torch.equal(plain, expected)
    assert torch.equal(call(flux.view(host), inputs, **given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_before_and_after_the_swap(host: Any, inputs: Inputs, dtype: torch.dtype) -> None:
    host, inputs = host.to(dtype), in_type(inputs, dtype)
    plain = call(host, inputs)
    after = with_lora(flux.view(copy.deepcopy(host)))
    expected = call(with_lora(host), inputs)
    scaled = call(host, inputs, joint_attention_kwargs={"scale": 0.3})
    assert not torch.equal(plain, expected)
    assert not torch.equal(scaled, expected)
    for viewed in (after, flux.view(host)):
        assert torch.equal(call(viewed, inputs), expected)
        assert torch.equal(call(viewed, inputs, joint_attention_kwargs={"scale": 0.3}), scaled)
        viewed.delete_adapters("default")
        assert torch.equal(call(viewed, inputs), plain)


def test_ip_adapter(host: Any, inputs: Inputs) -> None:
    plain = call(host, inputs)
    host = with_ip_adapter(host)
    draw = torch.Generator().manual_seed(2)

    def given() -> Inputs:
        return {"ip_adapter_image_embeds": [torch.randn(B, 1, 20, generator=draw.manual_seed(2))]}

    expected = call(host, inputs, joint_attention_kwargs=given())
    assert not torch.equal(plain, expected)
    viewed = flux.view(host)
    assert torch.equal(call(viewed, inputs, joint_attention_kwargs=given()), expected)
    cores = [site.name for site in flux.sites(viewed) if site.kind == "core"]
    assert cores == [f"single.{i}.attn.core" for i in range(SINGLE)]
    x = run_steps(viewed, inputs, [TaylorSeer(3, 1, 1)], joint_attention_kwargs=given())[0]
    assert x.isfinite().all()


def test_attention_mask_and_unknown_arguments(host: Any, inputs: Inputs) -> None:
    mask = torch.ones(B, 1, S + L, S + L, dtype=torch.bool)
    mask[..., S - 3 : S] = False
    given = {"attention_mask": mask, "nobody_knows": 1}
    expected = call(host, inputs, joint_attention_kwargs=given)
    assert not torch.equal(expected, call(host, inputs))
    assert torch.equal(call(flux.view(host), inputs, joint_attention_kwargs=given), expected)


@pytest.mark.parametrize("swap_first", [False, True])
def test_fused_projections(host: Any, inputs: Inputs, swap_first: bool) -> None:
    model = flux.view(copy.deepcopy(host)) if swap_first else host
    host.fuse_qkv_projections()
    expected = call(host, inputs)
    model.fuse_qkv_projections()
    assert torch.equal(call(flux.view(model), inputs), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(host: Any, inputs: Inputs, checkpointed: bool) -> None:
    host.train()
    host(**inputs).sample.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    viewed = flux.view(host)
    if checkpointed:
        viewed.enable_gradient_checkpointing()
    tap = Tap(("blocks.0.attn",))
    with flux.running(Trajectory(flux.sites(viewed), [tap], 1).run(at(0, 1))):
        loss = viewed(**inputs).sample.square().sum()
    loss.backward()
    assert "blocks.0.attn" in tap.seen
    assert expected
    for name, p in viewed.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        assert p.grad is None or torch.equal(p.grad, expected[name]), name


def test_blocks_can_be_called_as_diffusers_calls_them(host: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    image, text, temb = (torch.randn(B, *n, D, generator=draw) for n in ((L,), (S,), ()))
    table = host.pos_embed(torch.arange(3.0 * (S + L)).reshape(-1, 3))
    blocks = host.transformer_blocks[0], host.single_transformer_blocks[0]
    given = [(image, text, temb, rope) for rope in (table, None)]
    with torch.no_grad():
        expected = [block(*args) for block in blocks for args in given]
        flux.view(host)
        got = [block(*args) for block in blocks for args in given]
    assert all(
        torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True)
    )


# What the transformer carries


def test_hooks_of_blocks_attention_and_leaves_fire(host: Any, inputs: Inputs) -> None:
    fired = []
    block = host.transformer_blocks[1]
    for module in (
        host,
        block,
        block.attn,
        block.attn.to_q,
        block.norm1.linear,
        host.single_transformer_blocks[0],
    ):
        module.register_forward_hook(lambda module, args, out: fired.append(module))
    block.register_forward_pre_hook(lambda module, args, kw: fired.append(kw["temb"]), with_kwargs=True)
    call(host, inputs)
    expected = [type(x).__name__ for x in fired]
    fired.clear()
    call(flux.view(host), inputs)
    assert sorted(type(x).__name__ for x in fired) == sorted(expected)


OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "blocks": offload,
    "model": lambda model: offload(model, whole=True),
    "groups": offload_groups,
    "leaves": lambda model: offload_groups(model, "leaf_level"),
}


@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_before_and_after_the_swap(host: Any, inputs: Inputs, how: str) -> None:
    expected, sites = call(host, inputs), flux.sites(host)
    before = flux.view(OFFLOADS[how](copy.deepcopy(host)))
    after = OFFLOADS[how](flux.view(host))
    for viewed in (before, after):
        assert torch.equal(call(viewed, inputs), expected)
        assert len(visited(viewed, inputs)) == len(sites)
        restored = flux.restore(viewed)
        assert torch.equal(call(restored, inputs), expected)
        assert visited(restored, inputs) == set()


def test_offload_that_is_removed_after_the_swap(host: Any, inputs: Inputs) -> None:
    expected = call(host, inputs)
    viewed = flux.view(offload(host))
    remove_hook_from_module(viewed, recurse=True)
    assert torch.equal(call(viewed, inputs), expected)
    assert len(visited(viewed, inputs)) == len(flux.sites(viewed))
    assert torch.equal(call(flux.restore(viewed), inputs), expected)


def test_layerwise_casting_with_lora(host: Any, inputs: Inputs) -> None:
    host, inputs = with_lora(host.bfloat16()), in_type(inputs, torch.bfloat16)
    host.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = call(host, inputs)
    assert torch.equal(call(flux.view(host), inputs), expected)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FirstBlockCacheConfig(threshold=0.1), "fbc_leader_block_hook"),
        (
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                current_timestep_callback=lambda: 500,
                spatial_attention_block_identifiers=("transformer_blocks",),
            ),
            "pyramid_attention_broadcast",
        ),
    ],
    ids=["first block", "pyramid"],
)
def test_a_cache_of_diffusers_is_refused_by_name(host: Any, config: Any, name: str) -> None:
    host.enable_cache(config)
    before = [type(module) for module in host.modules()]
    with pytest.raises(ConflictError, match=name):
        flux.view(host)
    assert [type(module) for module in host.modules()] == before
    host.disable_cache()
    flux.view(host)


def test_a_foreign_forward_or_class_is_refused_and_nothing_changes(host: Any, inputs: Inputs) -> None:
    class Mine(transformer_flux.FluxSingleTransformerBlock):
        pass

    expected = call(host, inputs)
    block = host.single_transformer_blocks[-1]
    block.forward = lambda *args, **kwargs: transformer_flux.FluxSingleTransformerBlock.forward(
        block, *args, **kwargs
    )
    with pytest.raises(ConflictError, match=r"single_transformer_blocks\.2: its forward was replaced"):
        flux.view(host)
    del block.forward
    block.__class__ = Mine
    with pytest.raises(ConflictError, match=r"single_transformer_blocks\.2: .*Mine is a subclass"):
        flux.view(host)
    block.__class__ = transformer_flux.FluxSingleTransformerBlock
    assert type(host) is FluxTransformer2DModel
    assert torch.equal(call(host, inputs), expected)
    with pytest.raises(ConfigError, match="unknown transformer 'Linear'"):
        flux.view(torch.nn.Linear(1, 1))


def test_saved_model_is_diffusers_own(host: Any, inputs: Inputs, tmp_path: Path) -> None:
    expected = call(host, inputs)
    flux.view(host).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "FluxTransformer2DModel"
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is FluxTransformer2DModel
    assert torch.equal(call(loaded, inputs), expected)
    assert (
        type(host).__module__ == FluxTransformer2DModel.__module__
    )  # pipelines write it in model_index.json


def test_restore_gives_the_original_back(host: Any, inputs: Inputs) -> None:
    expected, classes = call(host, inputs), [type(module) for module in host.modules()]
    restored = flux.restore(flux.view(host))
    assert restored is host
    assert [type(module) for module in host.modules()] == classes
    assert all("forward" not in vars(module) for module in host.modules())
    assert torch.equal(call(restored, inputs), expected)


def test_blocks_compile_without_a_break_and_once_for_all(inputs: Inputs) -> None:
    host = transformer(num_layers=3, num_single_layers=1)
    expected = call(host, inputs)
    viewed = flux.view(host)
    compiled = []

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    viewed.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert torch.equal(call(viewed, inputs), expected)
    assert len(compiled) == 2  # the double blocks share one
