"""The contract of views: each equals diffusers to the bit, whatever the transformer carries."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor
from torch.utils._pytree import tree_map

from ditkit.core.run import named
from ditkit.hosts.view import restore, running, view
from hosts_support import (
    EVERY,
    FAMILIES,
    Inputs,
    attention_of,
    blocks_of,
    call,
    same_in_both,
    shared,
    sites_of,
    tapped,
    with_lora,
)

DTYPES = (torch.float32, torch.bfloat16)
every = pytest.mark.parametrize("name", EVERY)
one_each = pytest.mark.parametrize("name", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sample(inputs: Inputs, i: int) -> Inputs:
    """Inputs of one sample of the batch."""
    B = len(inputs["hidden_states"])

    def cut(v: Any) -> Any:
        return v[i : i + 1] if isinstance(v, Tensor) and v.ndim and len(v) == B else v

    return {
        name: v[i : i + 1] if isinstance(v, list) and len(v) == B else tree_map(cut, v)
        for name, v in inputs.items()
    }


@every
@dtypes
def test_without_policies_it_is_diffusers_to_the_bit(name: str, dtype: torch.dtype) -> None:
    viewed, inputs, expected = shared(name, dtype)
    assert isinstance(viewed, EVERY[name].host)
    assert view(viewed) is viewed
    assert same_in_both(viewed, inputs, expected)
    host = EVERY[name].transformer().to(dtype)
    alone = sample(inputs, 1)
    assert same_in_both(viewed, alone, call(host, alone))
    # a copy of it is a view as well
    assert torch.equal(call(pickle.loads(pickle.dumps(copy.deepcopy(viewed))), inputs), expected)


@one_each
def test_return_types_and_the_order_of_parameters(name: str) -> None:
    viewed, inputs, _ = shared(name)
    parameters = list(inspect.signature(FAMILIES[name].host.forward).parameters)[1:]
    assert list(inspect.signature(type(viewed).forward).parameters)[1:] == parameters
    last = max(parameters.index(given) for given in inputs)
    with torch.no_grad():
        as_named, plain = viewed(**inputs), viewed(**inputs, return_dict=False)
        assert "return_dict" not in parameters[:last]
        placed = viewed(*(inputs.get(parameter) for parameter in parameters[: last + 1]))
    assert type(as_named).__name__.endswith("Transformer2DModelOutput")
    assert isinstance(plain, tuple)
    assert torch.equal(as_named.sample, plain[0])
    assert torch.equal(placed.sample, plain[0])


@one_each
@dtypes
def test_lora_before_and_after_the_swap(name: str, dtype: torch.dtype) -> None:
    family, (_, inputs, plain) = FAMILIES[name], shared(name, dtype)
    host, after = with_lora(family.transformer().to(dtype)), with_lora(view(family.transformer().to(dtype)))
    scale: Inputs = {family.kwargs: {"scale": 0.3}} if hasattr(host, "add_adapter") else {}
    expected, scaled = call(host, inputs), call(host, inputs, **scale)
    assert not torch.equal(plain, expected)
    assert torch.equal(scaled, expected) == (not scale)
    for viewed in (after, view(host)):
        assert same_in_both(viewed, inputs, expected)
        assert torch.equal(call(viewed, inputs, **scale), scaled)
    if scale:
        host.delete_adapters("default")
        assert torch.equal(call(host, inputs), plain)


@every
def test_gradients(name: str) -> None:
    family, inputs = EVERY[name], EVERY[name].inputs()
    host = family.transformer().train()
    torch.manual_seed(8)  # DiT drops labels
    host(**inputs).sample.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}
    assert expected
    viewed, tolerance = view(host), family.tolerance
    for checkpointed in (False, True)[: 1 + host._supports_gradient_checkpointing]:
        host.zero_grad()
        if checkpointed:
            viewed.enable_gradient_checkpointing()
        run, seen = tapped(viewed)
        torch.manual_seed(8)
        with running(run):
            loss = viewed(**inputs).sample.square().sum()
        loss.backward()
        assert set(seen) == {site.name for site in sites_of(viewed)}
        for path, p in viewed.named_parameters():
            assert (p.grad is None) == (path not in expected), path
            if p.grad is not None:
                most = float(p.grad.abs().max())
                torch.testing.assert_close(
                    p.grad, expected[path], rtol=tolerance, atol=tolerance * max(most, 1), msg=path
                )


@one_each
def test_saved_and_restored_it_is_diffusers_own(name: str, tmp_path: Path) -> None:
    family, (_, inputs, expected) = FAMILIES[name], shared(name)
    host = family.transformer()
    classes = [type(module) for module in host.modules()]
    view(host).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family.host.__name__
    saved = family.host.from_pretrained(tmp_path).eval()
    assert type(saved) is family.host
    assert all(map(torch.equal, saved.state_dict().values(), host.state_dict().values()))
    # diffusers maps weights where they lie in the file, and products of other alignments are others
    assert torch.allclose(call(saved, inputs), expected, atol=1e-6)
    assert type(host).__module__ == family.host.__module__  # pipelines write it in model_index.json
    assert restore(host) is host
    assert [type(module) for module in host.modules()] == classes
    assert all("forward" not in vars(module) for module in host.modules())
    assert torch.equal(call(host, inputs), expected)


@one_each
def test_arguments_that_attention_does_not_know(name: str) -> None:
    family, (viewed, inputs, expected) = FAMILIES[name], shared(name)
    given: Inputs = {family.kwargs: {"nobody_knows": 1}}
    try:
        assert torch.equal(call(family.transformer(), inputs, **given), expected)
    except TypeError:
        with pytest.raises(TypeError, match="unexpected keyword"):
            call(viewed, inputs, **given)
    else:
        assert same_in_both(viewed, inputs, expected, **given)


# What the transformer carries


@one_each
def test_hooks_of_blocks_attention_and_leaves_fire(name: str) -> None:
    host, inputs = FAMILIES[name].transformer(), FAMILIES[name].inputs()
    fired: list[str] = []
    block = blocks_of(host)[1]
    attn, cross = attention_of(block), getattr(block, "attn2", None)
    # a view modulates by itself, so that an adaptive norm as a whole is not called; its layer is
    leaves = [getattr(module, "linear", module) for module in block.children()]
    for module in {
        id(m): m for m in (host, block, attn, attn.to_q, cross, *leaves) if m is not None
    }.values():
        module.register_forward_hook(lambda module, args, out: fired.append(type(module).__name__))
    call(host, inputs)
    expected = fired.copy()
    assert len(expected) > 3
    fired.clear()
    call(view(host), inputs)
    assert sorted(fired) == sorted(expected)


def offload(model: Any) -> Any:
    """accelerate keeps the weights elsewhere, and brings them for a call."""
    weights = {name: p.clone() for name, p in model.state_dict(keep_vars=True).items()}
    weights |= {name: b.clone() for name, b in model.named_buffers()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=True)
    return add_hook_to_module(model, hook)


@one_each
def test_offload_before_and_after_the_swap(name: str) -> None:
    family, (_, inputs, expected) = FAMILIES[name], shared(name)
    for viewed in (view(offload(family.transformer())), offload(view(family.transformer()))):
        assert same_in_both(viewed, inputs, expected)
        assert torch.equal(call(restore(viewed), inputs), expected)


@one_each
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(name: str, kind: str) -> None:
    (_, inputs, expected), host, cpu = shared(name), FAMILIES[name].transformer(), torch.device("cpu")
    apply_group_offloading(host, cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert same_in_both(view(host), inputs, expected)


@one_each
def test_a_processor_of_ones_own_and_fused_layers_have_no_sites_inside(name: str) -> None:
    if name == "lumina2":  # padding last, as diffusers' own processor would have it, sums in another order
        name = "lumina2 even"
    (_, inputs, expected), host = shared(name), EVERY[name].transformer()
    block = blocks_of(host)[0]
    attn = attention_of(block)
    before = len(named(sites_of(host), "core", "kv"))
    own = type("OwnProcessor", (type(attn.processor),), {})
    attn.set_processor(copy.copy(attn.processor))
    attn.processor.__class__ = own
    assert same_in_both(view(host), inputs, expected)
    cores = named(sites_of(host), "core", "kv")
    first = named(sites_of(host), "block")[0] + ".attn."
    assert len(cores) == before - 2 and not [site for site in cores if site.startswith(first)]
    try:
        restore(host).fuse_qkv_projections()
        fused = call(host, inputs)
    except (AttributeError, ValueError, RuntimeError, TypeError, NotImplementedError):
        return  # diffusers cannot fuse all
    assert same_in_both(view(host), inputs, fused)


@one_each
def test_int8_weights(name: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    host, inputs = FAMILIES[name].transformer(), FAMILIES[name].inputs()
    quantize_(host, Int8WeightOnlyConfig())
    expected = call(host, inputs)
    assert not torch.equal(expected, shared(name)[2])
    assert same_in_both(view(host), inputs, expected)


@one_each
def test_blocks_compile_without_a_break_and_as_often_as_diffusers_own(name: str) -> None:
    family, (_, inputs, expected) = FAMILIES[name], shared(name)
    host, compiled = family.transformer(), []

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in blocks_of(view(host)):
        block.compile(fullgraph=True, backend=backend)
    assert torch.equal(call(host, inputs), expected)
    assert len(compiled) == family.graphs
