"""The views of Stable Diffusion 3 and of DiT equal diffusers bit for bit, whatever the transformer carries."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.core.run import named
from ditkit.hosts import dit, sd3
from ditkit.hosts.view import restore, running, view
from hosts_support import (
    FAMILIES,
    B,
    C,
    D,
    Family,
    Inputs,
    S,
    call,
    families,
    in_type,
    of_sd3,
    pictures,
    residuals,
    tapped,
    with_ip_adapter,
)

LORA = {"r": 2, "target_modules": ["to_q", "linear", "proj_out", "proj_out_1"], "init_lora_weights": False}


def same_in_both(family: Family, model: Any, inputs: Inputs, expected: Tensor, **given: Any) -> bool:
    """Whether a viewed transformer gives `expected`, without handlers and with one at each site."""
    run, seen = tapped(family, model)
    plain, sited = call(model, inputs, **given), call(model, inputs, run, **given)
    return bool(seen) and torch.equal(plain, expected) and torch.equal(sited, expected)


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    if hasattr(model, "add_adapter"):
        model.add_adapter(LoraConfig(**LORA))
        return model
    return inject_adapter_in_model(LoraConfig(**LORA), model)


# The same as diffusers


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_policies_it_is_diffusers_to_the_bit(family: Family, dtype: torch.dtype) -> None:
    host, inputs = family.transformer().to(dtype), in_type(family.inputs(), dtype)
    alone = [{name: v[i : i + 1] for name, v in inputs.items()} for i in range(B)]
    expected, one_by_one = call(host, inputs), [call(host, one) for one in alone]
    viewed = view(host)
    assert viewed is host
    assert isinstance(viewed, family.host)
    assert same_in_both(family, view(viewed), inputs, expected)
    for one, wanted in zip(alone, one_by_one, strict=True):
        assert same_in_both(family, viewed, one, wanted)
    assert same_in_both(family, copy.deepcopy(viewed), inputs, expected)
    assert same_in_both(family, pickle.loads(pickle.dumps(viewed)), inputs, expected)


@families
def test_return_types_and_the_order_of_parameters(family: Family) -> None:
    viewed, inputs = view(family.transformer()), family.inputs()
    with torch.no_grad():
        as_named, plain = viewed(**inputs), viewed(**inputs, return_dict=False)
        placed = viewed(*inputs.values())
    assert type(as_named).__name__ == "Transformer2DModelOutput"
    assert isinstance(plain, tuple)
    assert torch.equal(as_named.sample, plain[0])
    assert torch.equal(placed.sample, plain[0])


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_before_and_after_the_swap(family: Family, dtype: torch.dtype) -> None:
    host, inputs = family.transformer().to(dtype), in_type(family.inputs(), dtype)
    plain = call(host, inputs)
    after = with_lora(view(copy.deepcopy(host)))
    expected = call(with_lora(host), inputs)
    assert not torch.equal(plain, expected)
    for viewed in (after, view(host)):
        assert same_in_both(family, viewed, inputs, expected)


@of_sd3
def test_lora_scale(family: Family) -> None:
    host, inputs = with_lora(family.transformer()), family.inputs()
    given: Inputs = {"joint_attention_kwargs": {"scale": 0.3}}
    expected = call(host, inputs, **given)
    assert not torch.equal(expected, call(host, inputs))
    assert same_in_both(family, view(host), inputs, expected, **given)


@families
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(family: Family, checkpointed: bool) -> None:
    host, inputs = family.transformer().train(), family.inputs()
    torch.manual_seed(8)  # DiT drops labels
    host(**inputs).sample.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    viewed = view(host)
    if checkpointed:
        viewed.enable_gradient_checkpointing()
    run, seen = tapped(family, viewed)
    torch.manual_seed(8)
    with running(run):
        loss = viewed(**inputs).sample.square().sum()
    loss.backward()
    assert set(seen) == {site.name for site in family.view.sites(viewed)}
    assert expected
    # dual attention norms its input once a branch: the same sum of gradients in another order
    tolerance = 1e-5 if "dual_attention_layers" in family.config else 0.0
    for name, p in viewed.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@families
def test_restored_and_saved_it_is_diffusers_own(family: Family, tmp_path: Path) -> None:
    host, inputs = family.transformer(), family.inputs()
    expected, classes = call(host, inputs), [type(module) for module in host.modules()]
    view(host).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family.host.__name__
    assert torch.equal(call(family.host.from_pretrained(tmp_path).eval(), inputs), expected)
    assert restore(host) is host
    assert [type(module) for module in host.modules()] == classes
    assert torch.equal(call(host, inputs), expected)


@of_sd3
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("skip", [None, [1], [0, 2]], ids=str)
def test_control_residuals_and_skipped_layers(family: Family, count: int, skip: list[int] | None) -> None:
    host, inputs = family.transformer(), family.inputs()
    given: Inputs = {"block_controlnet_hidden_states": residuals(count, 24), "skip_layers": skip}
    expected = call(host, inputs, **given)
    assert not torch.equal(expected, call(host, inputs))
    assert same_in_both(family, view(host), inputs, expected, **given)


@of_sd3
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ip_adapter(family: Family, dtype: torch.dtype) -> None:
    inputs = in_type(family.inputs(), dtype)
    host, silent = (with_ip_adapter(family.transformer(), scale).to(dtype) for scale in (0.7, 0.0))
    given: Inputs = {"joint_attention_kwargs": in_type(pictures()["joint_attention_kwargs"], dtype)}
    expected, plain = call(host, inputs, **given), call(host, inputs)
    assert not torch.equal(plain, expected)
    assert same_in_both(family, view(host), inputs, expected, **given)
    assert same_in_both(family, host, inputs, plain)
    assert same_in_both(family, view(silent), inputs, plain, **given)
    run, seen = tapped(family, host)
    call(host, inputs, run, **given)
    assert set(seen) == {site.name for site in sd3.sites(host)}
    assert "blocks.0.attn.ip.core" in seen


@families
def test_arguments_that_attention_does_not_know(family: Family) -> None:
    host, inputs = family.transformer(), family.inputs()
    name = "cross_attention_kwargs" if family.view is dit else "joint_attention_kwargs"
    given: Inputs = {name: {"nobody_knows": 1}}
    expected = call(host, inputs, **given)
    assert same_in_both(family, view(host), inputs, expected, **given)


@of_sd3
def test_chunked_and_fused_layers_and_odd_sizes(family: Family) -> None:
    host, inputs = family.transformer(), family.inputs()
    odd: Inputs = {"hidden_states": inputs["hidden_states"][..., :-1, :]}
    cut, chunks = call(host, inputs, **odd), []
    assert cut.shape[-2:] == (6, 12)
    host.enable_forward_chunking(1, 0)
    host.transformer_blocks[0].ff.register_forward_hook(lambda module, args, out: chunks.append(len(out)))
    # chunked against chunked: the last bit of a product depends on how it is cut, and on the processor
    chunked = call(host, inputs)
    viewed = view(host)
    assert torch.equal(call(viewed, inputs), chunked)
    assert chunks == [1] * 2 * B
    viewed.disable_forward_chunking()
    assert same_in_both(family, viewed, inputs, cut, **odd)
    if family is FAMILIES["sd3"]:  # diffusers cannot fuse dual attention
        viewed.fuse_qkv_projections()
        fused = call(restore(copy.deepcopy(viewed)), inputs)
        assert same_in_both(family, viewed, inputs, fused)
        assert not named(sd3.sites(viewed), "core")


def test_dit_of_another_size() -> None:
    family = FAMILIES["dit"]
    host, inputs = family.transformer(), family.inputs()
    draw = torch.Generator().manual_seed(2)
    large: Inputs = {"hidden_states": torch.randn(B, C, 12, 12, generator=draw)}
    expected = call(host, inputs, **large)
    viewed = view(host)
    assert same_in_both(family, viewed, inputs, expected, **large)
    with pytest.raises(ShapeError, match=r"input \[2, 4, 4, 16\] should have equal sides"):
        call(viewed, inputs, hidden_states=torch.zeros(B, C, 4, 16))


def test_other_blocks_of_dits_class_stay_as_they_are() -> None:
    host = FAMILIES["dit"].transformer()
    torch.manual_seed(0)
    host.extra = BasicTransformerBlock(D, 4, 16, cross_attention_dim=32).eval()
    x, text = torch.randn(B, 5, D), torch.randn(B, S, 32)
    with torch.no_grad():
        expected = host.extra(x, encoder_hidden_states=text)
        assert torch.equal(view(host).extra(x, encoder_hidden_states=text), expected)


# What the transformer carries


@families
def test_hooks_of_blocks_attention_and_leaves_fire(family: Family) -> None:
    host, inputs, fired = family.transformer(), family.inputs(), []
    block = host.transformer_blocks[1]
    attn = block.attn1 if family.view is dit else block.attn
    for module in (host, block, attn, attn.to_q, block.norm1.linear, block.ff):
        module.register_forward_hook(lambda module, args, out: fired.append(type(module).__name__))
    call(host, inputs)
    expected = fired.copy()
    fired.clear()
    call(view(host), inputs)
    assert sorted(fired) == sorted(expected)


@families
def test_offload_before_and_after_the_swap(family: Family) -> None:
    def offload(model: Any) -> Any:
        weights = {name: p.clone() for name, p in model.state_dict(keep_vars=True).items()}
        weights |= {name: b.clone() for name, b in model.named_buffers()}
        hook = AlignDevicesHook(
            execution_device="cpu", offload=True, weights_map=weights, place_submodules=True
        )
        return add_hook_to_module(model, hook)

    host, inputs = family.transformer(), family.inputs()
    expected = call(host, inputs)
    for viewed in (view(offload(copy.deepcopy(host))), offload(view(host))):
        assert same_in_both(family, viewed, inputs, expected)
        assert torch.equal(call(restore(viewed), inputs), expected)


@of_sd3
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(family: Family, kind: str) -> None:
    host, inputs = family.transformer(), family.inputs()
    expected, cpu = call(host, inputs), torch.device("cpu")
    apply_group_offloading(host, cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert same_in_both(family, view(host), inputs, expected)


@families
def test_blocks_compile_without_a_break_and_once_for_all(family: Family) -> None:
    host, inputs = family.transformer(num_layers=4), family.inputs()
    expected, compiled = call(host, inputs), []

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in view(host).transformer_blocks:
        block.compile(fullgraph=True, backend=backend)
    assert torch.equal(call(host, inputs), expected)
    kinds = {
        "sd3": 2,
        "sd3.5": 3,
        "dit": 1,
    }  # SD3 ends in a block without text, 3.5 begins with dual attention
    assert len(compiled) == next(kinds[name] for name, member in FAMILIES.items() if member is family)


# Whole pipelines


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(6)
    return AutoencoderKL(latent_channels=C, block_out_channels=(32,), layers_per_block=1).eval()


@of_sd3
def test_a_pipeline_with_guidance_and_skipped_layers(family: Family) -> None:
    pipe = StableDiffusion3Pipeline(
        family.transformer(), FlowMatchEulerDiscreteScheduler(), autoencoder(), *[None] * 6
    )
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(7)
    text, pooled = torch.randn(2, 1, S, 32, generator=draw), torch.randn(2, 1, 24, generator=draw)

    def picture(**given: Any) -> Tensor:
        embeds = {
            "prompt_embeds": text[:1].flatten(0, 1),
            "negative_prompt_embeds": text[1:].flatten(0, 1),
            "pooled_prompt_embeds": pooled[0],
            "negative_pooled_prompt_embeds": pooled[1],
        }
        seed = torch.Generator().manual_seed(0)
        return pipe(
            **embeds, height=8, width=12, num_inference_steps=4, generator=seed, output_type="latent", **given
        ).images

    settings: tuple[Inputs, ...] = (
        {},
        {"guidance_scale": 1.0},
        {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9},
    )
    expected = [picture(**given) for given in settings]
    view(pipe.transformer)
    for given, wanted in zip(settings, expected, strict=True):
        assert torch.equal(picture(**given), wanted)


def test_the_pipeline_of_dit() -> None:
    host = FAMILIES["dit"].transformer(num_embeds_ada_norm=1000)
    pipe = DiTPipeline(host, autoencoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def picture() -> Tensor:
        seed = torch.Generator().manual_seed(0)
        return pipe([3, 5], generator=seed, num_inference_steps=3, output_type="pt").images

    expected = picture()
    view(host)
    assert torch.equal(picture(), expected)
