"""FLUX: half precision, ControlNets, IP-Adapters, offload that comes and goes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.transformers import transformer_flux
from torch import Tensor

from adapters_support import flux_adapters, flux_pictures
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.grid import Grid, Segment
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from flux_support import (
    COLUMNS,
    DOUBLE,
    LAYOUT,
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
    relative,
    run_steps,
    transformer,
    visited,
    with_lora,
)
from policies_support import BandReuse, Gate, Gated, RowSelector, SelectedRows, Tap


@pytest.fixture
def host() -> Any:
    """A transformer of diffusers, ours to change."""
    return transformer()


@pytest.fixture
def inputs() -> Inputs:
    return call_inputs()


def offload(model: Any) -> Any:
    """accelerate keeps the weights of each block elsewhere, and brings them for a call."""
    for module in (*model.transformer_blocks, *model.single_transformer_blocks):
        weights = {name: p.clone() for name, p in module.state_dict().items()}
        hook = AlignDevicesHook(
            execution_device="cpu", offload=True, weights_map=weights, place_submodules=True
        )
        add_hook_to_module(module, hook)
    return model


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


def test_layouts(inputs: Inputs) -> None:
    assert flux.layout(inputs["img_ids"], inputs["txt_ids"]) == LAYOUT
    reference = inputs["img_ids"][: 2 * COLUMNS] + torch.tensor([1.0, 0.0, 0.0])
    kontext = flux.layout(torch.cat([inputs["img_ids"], reference]), inputs["txt_ids"])
    assert kontext == (*LAYOUT, Segment("context", Grid(1, 2, COLUMNS), 2 * COLUMNS))
    assert flux.layout(inputs["img_ids"][:-1], inputs["txt_ids"])[1] == Segment("image", Grid(L - 1), L - 1)


def test_an_ip_adapter_leaves_the_single_blocks_cores(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(flux_adapters(host, 1))
    cores = [site.name for site in flux.sites(viewed) if site.kind == "core"]
    assert cores == [f"single.{i}.attn.core" for i in range(SINGLE)]
    x = run_steps(viewed, inputs, [TaylorSeer(3, 1, 1)], **flux_pictures(1))[0]
    assert x.isfinite().all()


def test_selected_rows_take_their_residuals_along(host: Any, inputs: Inputs) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed, given = flux.view(host), {"controlnet_block_samples": controls(2, 5)}
    trajectory = Trajectory(flux.sites(viewed), [RowSelector(0.5, 1)], 4)
    dense = trajectory.leave(at(0, 4), call(viewed, inputs, trajectory.run(at(0, 4)), **given))
    trajectory.guided(at(0, 4), dense)
    (session,) = trajectory.sessions
    assert isinstance(session, SelectedRows) and session.active is not None
    sparse: Tensor = call(viewed, inputs, trajectory.run(at(1, 4)), **given)
    assert (sparse - dense)[:, session.active].abs().max() <= 1e-6 * dense.abs().max()
    assert sparse.abs().sum() == sparse[:, session.active].abs().sum()


def test_taylorseer_of_higher_order_is_closer(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    exact = run_steps(viewed, inputs, [])[0]
    errors = [relative(run_steps(viewed, inputs, [TaylorSeer(3, order, 2)])[0], exact) for order in (0, 1)]
    assert 0 < errors[1] < errors[0] < 0.05


def test_reused_statistics_are_exact_on_constant_attention(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    dense = call(viewed, inputs)
    trajectory = Trajectory(flux.sites(viewed), [BandReuse(0.2, warmup=0, every=4)], 4)
    for i in range(3):
        out = trajectory.leave(at(i, 4), call(viewed, inputs, trajectory.run(at(i, 4))))
        assert (out - dense).abs().max() <= 1e-5 * dense.abs().max()
    assert trajectory.finish()[0].saved == 2 * (DOUBLE + SINGLE)


def test_a_gate_cuts_the_stack(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    given = {"controlnet_block_samples": controls(2, 5), "controlnet_single_block_samples": controls(3, 6)}
    exact = run_steps(viewed, inputs, [], **given)[0]
    assert torch.equal(run_steps(viewed, inputs, [Gate(0.0)], **given)[0], exact)
    x, trajectory = run_steps(viewed, inputs, [Gate(10.0)], **given)
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert 0 < relative(x, exact) < 0.1


def test_methods_compose(host: Any, inputs: Inputs) -> None:
    tap = Tap(("blocks.1.attn.core", "blocks.1.attn.kv", "single.2.fused"))
    viewed = flux.view(host)
    x, _trajectory = run_steps(viewed, inputs, [TaylorSeer(3, 1, 1), BandReuse(0.25), tap])
    assert x.isfinite().all()
    q, k, v = tap.seen["blocks.1.attn.core"][0]
    assert q.shape == k.shape == v.shape == (B, D // 16, S + L, 16)
    (kv,), _ = tap.seen["blocks.1.attn.kv"]
    assert kv.k.shape == kv.v.shape == (B, D // 16, L, 16)
    assert [table.shape for table in kv.position] == [(L, 16)] * 2
    assert tap.seen["single.2.fused"][1].shape == (B, S + L, D)
