"""The views of Stable Diffusion 3 and of DiT equal diffusers bit for bit, and policies act on their sites."""

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
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call, Run, named
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import dit, sd3
from ditkit.hosts.view import restore, running, view
from hosts_for_tests import (
    DEPTH,
    FAMILIES,
    PATCH,
    B,
    C,
    D,
    Family,
    Inputs,
    S,
    call,
    in_type,
    run_steps,
    tapped,
)
from policies_for_tests import Gate, Gated, RowSelector, SelectedRows

LORA = {"r": 2, "target_modules": ["to_q", "linear", "proj_out", "proj_out_1"], "init_lora_weights": False}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_sd3 = pytest.mark.parametrize("family", [FAMILIES["sd3"], FAMILIES["sd3.5"]], ids=["sd3", "sd3.5"])


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


def residuals(count: int, rows: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [0.1 * torch.randn(B, rows, D, generator=draw) for _ in range(count)]


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
    given = {"joint_attention_kwargs": {"scale": 0.3}}
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
    for name, p in viewed.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        assert p.grad is None or torch.equal(p.grad, expected[name]), name


@families
def test_restored_and_saved_it_is_diffusers_own(family: Family, tmp_path: Path) -> None:
    host, inputs = family.transformer(), family.inputs()
    expected, classes = call(host, inputs), [type(module) for module in host.modules()]
    view(host).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family.host.__name__
    assert torch.equal(call(family.host.from_pretrained(tmp_path).eval(), inputs), expected)  # type: ignore[attr-defined]
    assert restore(host) is host
    assert [type(module) for module in host.modules()] == classes
    assert torch.equal(call(host, inputs), expected)


@of_sd3
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("skip", [None, [1], [0, 2]], ids=str)
def test_control_residuals_and_skipped_layers(family: Family, count: int, skip: list[int] | None) -> None:
    host, inputs = family.transformer(), family.inputs()
    given = {"block_controlnet_hidden_states": residuals(count, 24), "skip_layers": skip}
    expected = call(host, inputs, **given)
    assert not torch.equal(expected, call(host, inputs))
    assert same_in_both(family, view(host), inputs, expected, **given)


@of_sd3
def test_ip_adapter(family: Family) -> None:
    host, inputs = family.transformer(), family.inputs()
    plain = call(host, inputs)
    torch.manual_seed(4)
    for block in host.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(D, D, D // 4, 32, scale=0.7).eval())
    host.image_proj = IPAdapterTimeImageProjection(20, D, 32, 1, 16, 2, 4, timestep_in_dim=16).eval()

    def given() -> Inputs:
        picture = torch.randn(B, 5, 20, generator=torch.Generator().manual_seed(2))
        return {"joint_attention_kwargs": {"ip_adapter_image_embeds": picture}}

    expected = call(host, inputs, **given())
    assert not torch.equal(plain, expected)
    viewed = view(host)
    assert same_in_both(family, viewed, inputs, expected, **given())
    cores = named(sd3.sites(viewed), "core")
    assert cores == [f"blocks.{i}.attn2.core" for i in family.config.get("dual_attention_layers", ())]
    x = run_steps(family, viewed, inputs, [TaylorSeer(3, 1, 1)], **given())[0]
    assert x.isfinite().all()


@families
def test_arguments_that_attention_does_not_know(family: Family) -> None:
    host, inputs = family.transformer(), family.inputs()
    name = "cross_attention_kwargs" if family.view is dit else "joint_attention_kwargs"
    given = {name: {"nobody_knows": 1}}
    expected = call(host, inputs, **given)
    assert same_in_both(family, view(host), inputs, expected, **given)


@of_sd3
def test_chunked_and_fused_layers_and_odd_sizes(family: Family) -> None:
    host, inputs = family.transformer(), family.inputs()
    odd = {"hidden_states": inputs["hidden_states"][..., :-1, :]}
    expected, cut = call(host, inputs), call(host, inputs, **odd)
    assert cut.shape[-2:] == (6, 12)
    host.enable_forward_chunking(1, 0)
    viewed = view(host)
    assert torch.equal(call(viewed, inputs), expected)
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
    large = {"hidden_states": torch.randn(B, C, 12, 12, generator=draw)}
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
    kinds = {"sd3": 2, "sd3.5": 3, "dit": 1}  # SD3 ends in a block without text, 3.5 begins with dual attention
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

    settings = ({}, {"guidance_scale": 1.0}, {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9})
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


# Sites, and policies at them


def test_sites_and_layout() -> None:
    joint, alone = FAMILIES["sd3.5"], FAMILIES["dit"]
    viewed = view(joint.transformer())
    first = ["attn", "attn.kv", "attn.core", "attn2", "attn2.kv", "attn2.core", "mlp", "text.mlp"]
    last = ["attn", "attn.kv", "attn.core", "mlp"]
    inside = [first, first, last]
    blocks = [
        name for i in range(DEPTH) for name in (f"blocks.{i}", *(f"blocks.{i}.{part}" for part in inside[i]))
    ]
    assert [site.name for site in sd3.sites(viewed)] == ["tokens", "time", "blocks", *blocks, "head"]
    assert {tuple(site) for site in sd3.sites(viewed) if site.name.startswith("blocks.1")} == {
        ("blocks.1", "block", "joint"),
        ("blocks.1.attn", "branch", "joint"),
        ("blocks.1.attn.kv", "kv", "image"),
        ("blocks.1.attn.core", "core", "joint"),
        ("blocks.1.attn2", "branch", "image"),
        ("blocks.1.attn2.kv", "kv", "image"),
        ("blocks.1.attn2.core", "core", "image"),
        ("blocks.1.mlp", "branch", "image"),
        ("blocks.1.text.mlp", "branch", "text"),
    }
    assert joint.layout(viewed) == (Segment("image", Grid(1, 4, 6), 24), Segment("text", Grid(S), S))
    viewed = view(alone.transformer())
    blocks = [
        f"blocks.{i}{part}" for i in range(DEPTH) for part in ("", ".attn", ".attn.kv", ".attn.core", ".mlp")
    ]
    assert [site.name for site in dit.sites(viewed)] == ["tokens", "blocks", *blocks, "time", "head"]
    assert {site.stream for site in dit.sites(viewed)} == {"image"}
    assert alone.layout(viewed) == (Segment("image", Grid(1, 4, 4), 16),)
    for family in FAMILIES.values():
        viewed = view(family.transformer())
        run, seen = tapped(family, viewed)
        call(viewed, family.inputs(), run)
        assert set(seen) == {site.name for site in family.view.sites(viewed)}


def branch_rows(family: Family) -> int:
    """Rows of the outputs of all branches: those that a cache keeps."""
    if family.view is dit:
        return DEPTH * 2 * 16
    return DEPTH * 2 * 24 + (DEPTH - 1) * 2 * S + 24 * len(family.config.get("dual_attention_layers", ()))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taylorseer(family: Family, dtype: torch.dtype) -> None:
    viewed, inputs = view(family.transformer().to(dtype)), in_type(family.inputs(), dtype)
    exact = run_steps(family, viewed, inputs, [])[0]
    assert torch.equal(run_steps(family, viewed, inputs, [TaylorSeer(3, 1, 1).exact()])[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [TaylorSeer(3, 1, 1)])
    assert 0 < (x - exact).float().norm() / exact.float().norm() < 0.1
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0 3 6", "forecast": "1-2 4-5 7"}
    assert set(receipt.sites) == set(named(family.view.sites(viewed), "branch"))
    assert trajectory.sessions[0].bytes() == 2 * 4 * B * D * branch_rows(family)


@families
def test_selected_rows_equal_the_dense_run(family: Family) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed, inputs = view(family.transformer()), family.inputs()
    layout = family.layout(viewed)
    given = {"block_controlnet_hidden_states": residuals(2, 24)} if family.view is sd3 else {}

    def selected(keep_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = Trajectory(family.view.sites(viewed), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        first, second = (Call(i, 4, 1 - i / 4, layout=layout) for i in range(2))
        dense = trajectory.leave(first, call(viewed, inputs, trajectory.run(first), **given))
        trajectory.guided(first, dense)
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows)
        rows = session.active
        assert rows is not None
        active = torch.zeros(layout[0].length, dtype=torch.bool).index_fill(0, rows, True)
        cells = active.reshape(layout[0].grid.shape[1:])
        mask = cells.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        return dense, call(viewed, inputs, trajectory.run(second), **given), mask

    dense, sparse, mask = selected(keep_keys=True)
    assert 2 * mask.sum() == mask.numel()
    assert ((sparse - dense) * mask).abs().max() <= 1e-6 * dense.abs().max()
    assert (sparse * ~mask).abs().max() == 0
    dense, sparse, mask = selected(keep_keys=False)
    assert ((sparse - dense) * mask).abs().max() > 1e-4


@of_sd3
def test_joint_branches_run_on_some_rows(family: Family) -> None:
    """With all keys, some queries give some of the outputs, and all of the text's."""
    viewed, inputs, index = view(family.transformer()), family.inputs(), torch.tensor([1, 4, 5, 20])
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def whole(name: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = kept.setdefault(name, (k, v))
            return fn(q, k, v)

        return core

    def some(fn: Any, x: Any, *args: Any) -> Any:
        out = fn(x, *args)
        image, *text = fn(x.rows("image", index), *args)
        assert torch.allclose(image, out[0][:, index], rtol=1e-5, atol=1e-6)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(text, out[1:], strict=True))
        return out

    names = [f"blocks.{i}.attn" for i in range(DEPTH)]
    handlers = dict.fromkeys(names, some) | {f"{name}.core": whole(f"{name}.core") for name in names}
    assert torch.equal(call(viewed, inputs, Run(handlers)), call(viewed, inputs))
    assert len(kept) == DEPTH


@families
def test_a_gate_cuts_the_stack(family: Family) -> None:
    viewed, inputs = view(family.transformer()), family.inputs()
    exact = run_steps(family, viewed, inputs, [])[0]
    assert torch.equal(run_steps(family, viewed, inputs, [Gate(0.0)])[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [Gate(10.0)])
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert 0 < (x - exact).norm() / exact.norm() < 0.1
