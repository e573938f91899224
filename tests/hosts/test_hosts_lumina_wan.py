"""The views of Lumina 2, Lumina-Next and Wan equal diffusers bit for bit, whatever the transformer carries."""

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
    FlowMatchEulerDiscreteScheduler,
    LuminaPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import LuminaAttnProcessor2_0
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline
from torch import Tensor

from ditkit.core.run import named
from ditkit.hosts.view import restore, running, view
from lumina_wan_support import (
    CASES,
    DEPTH,
    DRAW,
    EACH,
    PICTURE,
    B,
    C,
    Case,
    Inputs,
    S,
    attention_of,
    blocks_of,
    call,
    captions,
    cases,
    drawn,
    dtypes,
    in_type,
    one_each,
    same,
    same_in_both,
    tapped,
    with_lora,
)

# The same as diffusers


@cases
@dtypes
def test_without_policies_it_is_diffusers_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    host, inputs = case.transformer().to(dtype), in_type(case.inputs(), dtype)
    alone = [
        {n: v[i : i + 1] if isinstance(v, Tensor) and len(v) == B else v for n, v in inputs.items()}
        for i in range(B)
    ]
    expected, one_by_one = call(host, inputs), [call(host, one) for one in alone]
    viewed = view(host)
    assert viewed is host
    assert isinstance(viewed, case.host)
    assert same_in_both(case, view(viewed), inputs, expected)
    for one, wanted in zip(alone, one_by_one, strict=True):
        assert same_in_both(case, viewed, one, wanted)
    assert same_in_both(case, pickle.loads(pickle.dumps(copy.deepcopy(viewed))), inputs, expected)


@one_each
def test_a_picture_or_clip_of_one_token(case: Case) -> None:
    host, inputs = case.transformer(), case.inputs()
    given: Inputs = {"hidden_states": drawn(B, C, *(1,) * (len(case.shape) - 4), 2, 2)}
    if host.__class__ is WanTransformer3DModel:
        given["timestep"] = inputs["timestep"][:, :1]
    expected = call(host, inputs, **given)
    assert same_in_both(case, view(host), inputs, expected, **given)


@pytest.mark.parametrize("lengths", [(1, 9, 5), (8, 8, 7), (3, 1, 2), (0, 4, 9)], ids=str)
@dtypes
def test_ragged_captions_of_many_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    case = CASES["lumina2"]
    for latents in (PICTURE, (B, C, 2, 2), (B, C, 10, 14)):
        host, inputs = case.transformer().to(dtype), in_type(case.inputs(), dtype)
        if 0 in lengths:  # an empty caption's refiner sees nothing, which is not a number in diffusers either
            inputs["encoder_hidden_states"][lengths.index(0)] = 0
        given: Inputs = {
            "hidden_states": drawn(*latents).to(dtype),
            "encoder_attention_mask": captions(*lengths),
        }
        expected = call(host, inputs, **given)
        assert same_in_both(case, view(host), inputs, expected, **given)


def test_a_mask_with_holes() -> None:
    """diffusers counts its ones, and takes so many rows from the start."""
    case = CASES["lumina2"]
    host, inputs = case.transformer(), case.inputs()
    given: Inputs = {"encoder_attention_mask": captions(7, 9, 3).flip(1).roll(1, 1)}
    expected = call(host, inputs, **given)
    assert same_in_both(case, view(host), inputs, expected, **given)


def test_proportional_attention_and_unknown_arguments() -> None:
    case = CASES["lumina-next"]
    host, inputs = case.transformer(), case.inputs()
    plain = call(host, inputs)
    for kwargs in ({"base_sequence_length": 16}, {"nobody_knows": 1}):
        given: Inputs = {"cross_attention_kwargs": kwargs}
        expected = call(restore(host), inputs, **given)
        assert torch.equal(expected, plain) == ("nobody_knows" in kwargs)
        assert same_in_both(case, view(host), inputs, expected, **given)


def test_a_clip_that_does_not_fill_its_patches_and_fused_layers() -> None:
    case = CASES["wan picture"]
    host, inputs = case.transformer(), case.inputs()
    odd: Inputs = {"hidden_states": inputs["hidden_states"][..., :-1, :-1]}
    expected = call(host, inputs, **odd)
    assert expected.shape[-2:] == (4, 6)
    assert same_in_both(case, view(host), inputs, expected, **odd)
    restore(host).fuse_qkv_projections()
    fused = call(host, inputs)
    assert same_in_both(case, view(host), inputs, fused)


def test_wan_with_some_layers_in_float32(tmp_path: Path) -> None:
    """diffusers keeps norms and times in float32 when it loads the model in bfloat16."""
    case = CASES["wan time a token"]
    case.transformer().save_pretrained(tmp_path)
    host = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert host.scale_shift_table.dtype == torch.float32
    inputs = in_type(case.inputs(), torch.bfloat16)
    expected = call(host, inputs)
    assert same_in_both(case, view(host), inputs, expected)


@one_each
def test_return_types_and_the_order_of_parameters(case: Case) -> None:
    viewed, inputs = view(case.transformer()), case.inputs()
    with torch.no_grad():
        as_named, plain = viewed(**inputs), viewed(**inputs, return_dict=False)
        placed = viewed(*inputs.values())
    assert type(as_named).__name__ == "Transformer2DModelOutput"
    assert isinstance(plain, tuple)
    assert torch.equal(as_named.sample, plain[0])
    assert torch.equal(placed.sample, plain[0])


@one_each
@dtypes
def test_lora_before_and_after_the_swap(case: Case, dtype: torch.dtype) -> None:
    host, inputs = case.transformer().to(dtype), in_type(case.inputs(), dtype)
    plain = call(host, inputs)
    after = with_lora(view(copy.deepcopy(host)))
    expected = call(with_lora(host), inputs)
    assert not torch.equal(plain, expected)
    scale: Inputs = {"attention_kwargs": {"scale": 0.3}} if hasattr(host, "add_adapter") else {}
    scaled = call(host, inputs, **scale)
    assert torch.equal(scaled, expected) == (not scale)
    for viewed in (after, view(host)):
        assert same_in_both(case, viewed, inputs, expected)
        assert same_in_both(case, viewed, inputs, scaled, **scale)


@one_each
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(case: Case, checkpointed: bool) -> None:
    host, inputs = case.transformer().train(), case.inputs()
    if checkpointed and not host._supports_gradient_checkpointing:
        pytest.skip("diffusers does not checkpoint Lumina-Next")
    host(**inputs).sample.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    viewed = view(host)
    if checkpointed:
        viewed.enable_gradient_checkpointing()
    run, seen = tapped(case, viewed)
    with running(run):
        loss = viewed(**inputs).sample.square().sum()
    loss.backward()
    assert set(seen) == {site.name for site in case.sites(viewed)}
    # ragged captions: padding lies elsewhere in the sequence, so sums over rows have another order
    tolerance = 1e-5 if case.text else 0.0
    for name, p in viewed.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, expected[name], rtol=tolerance, atol=tolerance * float(p.grad.abs().max()), msg=name
            )


@one_each
def test_restored_and_saved_it_is_diffusers_own(case: Case, tmp_path: Path) -> None:
    host, inputs = case.transformer(), case.inputs()
    expected, classes = call(host, inputs), [type(module) for module in host.modules()]
    view(host).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == case.host.__name__
    assert torch.equal(call(case.host.from_pretrained(tmp_path).eval(), inputs), expected)  # type: ignore[attr-defined]
    assert restore(host) is host
    assert [type(module) for module in host.modules()] == classes
    assert torch.equal(call(host, inputs), expected)


# What the transformer carries


@one_each
def test_hooks_of_blocks_attention_and_leaves_fire(case: Case) -> None:
    host, inputs, fired = case.transformer(), case.inputs(), []
    block = blocks_of(host)[1]
    cross = getattr(block, "attn2", block.norm2)
    for module in (host, block, attention_of(block), attention_of(block).to_q, cross, block.norm2):
        module.register_forward_hook(lambda module, args, out: fired.append(type(module).__name__))
    call(host, inputs)
    expected = fired.copy()
    fired.clear()
    call(view(host), inputs)
    assert sorted(fired) == sorted(expected)


@one_each
def test_offload_before_and_after_the_swap(case: Case) -> None:
    def offload(model: Any) -> Any:
        weights = {name: p.clone() for name, p in model.state_dict(keep_vars=True).items()}
        weights |= {name: b.clone() for name, b in model.named_buffers()}
        hook = AlignDevicesHook(
            execution_device="cpu", offload=True, weights_map=weights, place_submodules=True
        )
        return add_hook_to_module(model, hook)

    host, inputs = case.transformer(), case.inputs()
    expected = call(host, inputs)
    for viewed in (view(offload(copy.deepcopy(host))), offload(view(host))):
        assert same_in_both(case, viewed, inputs, expected)
        assert torch.equal(call(restore(viewed), inputs), expected)


@one_each
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(case: Case, kind: str) -> None:
    host, inputs = case.transformer(), case.inputs()
    expected, cpu = call(host, inputs), torch.device("cpu")
    apply_group_offloading(host, cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert same_in_both(case, view(host), inputs, expected)


def test_a_processor_of_ones_own_has_no_sites_inside() -> None:
    class JointProcessor(Lumina2AttnProcessor2_0):  # type: ignore[misc]
        pass

    class ImageProcessor(LuminaAttnProcessor2_0):  # type: ignore[misc]
        pass

    class ClipProcessor(WanAttnProcessor):  # type: ignore[misc]
        pass

    for name, processor in (
        ("lumina2", JointProcessor),
        ("lumina-next", ImageProcessor),
        ("wan", ClipProcessor),
    ):
        case = CASES[name]
        host, inputs = case.transformer(), case.inputs()
        expected = call(host, inputs)
        attention_of(blocks_of(host)[0]).set_processor(processor())
        assert same_in_both(case, view(host), inputs, expected)
        cores = named(case.sites(host), "core", "kv")
        assert [n for n in cores if n.startswith("blocks.0")] == []
        assert len(cores) == 2 * (DEPTH - 1)


@pytest.mark.parametrize("case", [CASES[name] for name in EACH[::2]], ids=EACH[::2])
def test_blocks_compile_without_a_break_and_once_for_all(case: Case) -> None:
    host, inputs, compiled = case.transformer(), case.inputs(), []
    expected = call(host, inputs)

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in blocks_of(view(host)):
        block.compile(fullgraph=True, backend=backend)
    assert same(call(host, inputs), expected, inputs)
    assert len(compiled) == 1


# Whole pipelines


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(6)
    return AutoencoderKL(latent_channels=C, block_out_channels=(32,), layers_per_block=1).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipelines_of_both_luminas() -> None:
    DRAW.manual_seed(7)
    text, none = drawn(2, S, 20), drawn(2, S, 20)
    masks = {"prompt_attention_mask": captions(7, 3), "negative_prompt_attention_mask": captions(2, 5)}
    for name, kind in (("lumina2", Lumina2Pipeline), ("lumina-next", LuminaPipeline)):
        host = CASES[name].transformer()
        parts = {"vae": autoencoder(), "text_encoder": None, "tokenizer": None}
        pipe = quiet(kind(transformer=host, scheduler=FlowMatchEulerDiscreteScheduler(), **parts))

        def picture(pipe: Any = pipe) -> Tensor:
            return pipe(
                prompt_embeds=text,
                negative_prompt_embeds=none,
                **masks,
                height=16,
                width=16,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images

        expected = picture()
        view(host)
        ragged = {"encoder_attention_mask": masks["prompt_attention_mask"]} if name == "lumina2" else {}
        assert same(picture(), expected, ragged)


def test_the_pipeline_of_wan_with_two_experts() -> None:
    case = CASES["wan"]
    experts = case.transformer(), case.transformer(num_layers=1)
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), *experts, boundary_ratio=0.6)
    DRAW.manual_seed(7)
    text, none = drawn(1, S, 20), drawn(1, S, 20)

    def clip() -> Tensor:
        return quiet(pipe)(
            prompt_embeds=text,
            negative_prompt_embeds=none,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    expected = clip()
    for expert in experts:
        view(expert)
    assert torch.equal(clip(), expected)
