"""The views of CogVideoX and PixArt equal diffusers bit for bit, whatever the transformer carries."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor2_0, CogVideoXAttnProcessor2_0
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.run import Run, named
from ditkit.hosts.view import restore, running, view
from hosts_support import (
    DEPTH,
    LATER,
    ROTARY,
    SIZED,
    B,
    C,
    D,
    Family,
    Inputs,
    S,
    call,
    cogvideox_offset_inputs,
    in_type,
    pixart_sized_inputs,
    rotated,
    tapped,
)
from lumina_wan_support import with_lora

later = pytest.mark.parametrize("family", LATER.values(), ids=LATER)
EACH = ("cogvideox 1.5", "pixart")
one_each = pytest.mark.parametrize("family", [LATER[name] for name in EACH], ids=EACH)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PIXELS = (..., slice(-1), slice(-1))


def same_in_both(family: Family, model: Any, inputs: Inputs, expected: Tensor, without: str = "-") -> bool:
    """Whether a viewed transformer gives `expected`, without handlers and with one at each site.

    Args:
        without: ends of the names of sites that this call does not have.
    """
    run, seen = tapped(family, model)
    plain, sited = call(model, inputs), call(model, inputs, run)
    names = {site.name for site in family.view.sites(model)}
    visited = set(seen) == {name for name in names if not name.endswith(tuple(without.split()))}
    laid_out = plain.stride() == sited.stride() == expected.stride()
    return visited and laid_out and torch.equal(plain, expected) and torch.equal(sited, expected)


# The same as diffusers


@later
@dtypes
def test_without_policies_it_is_diffusers_to_the_bit(family: Family, dtype: torch.dtype) -> None:
    def sample(i: int, v: Any) -> Any:
        return v[i : i + 1] if isinstance(v, Tensor) and len(v) == B else v

    host, inputs = family.transformer().to(dtype), in_type(family.inputs(), dtype)
    alone = [tree_map(partial(sample, i), inputs) for i in range(B)]
    expected, one_by_one = call(host, inputs), [call(host, one) for one in alone]
    viewed = view(host)
    assert viewed is host
    assert isinstance(viewed, family.host)
    assert same_in_both(family, view(viewed), inputs, expected)
    for one, wanted in zip(alone, one_by_one, strict=True):
        assert same_in_both(family, viewed, one, wanted)
    assert same_in_both(family, pickle.loads(pickle.dumps(copy.deepcopy(viewed))), inputs, expected)


@one_each
def test_return_types_and_the_order_of_parameters(family: Family) -> None:
    viewed, inputs = view(family.transformer()), family.inputs()
    parameters = {**dict.fromkeys(inspect.signature(family.host.forward).parameters), **inputs}
    parameters.pop("self")
    parameters.pop("return_dict")
    with torch.no_grad():
        as_named, plain = viewed(**inputs), viewed(**inputs, return_dict=False)
        placed = viewed(*parameters.values())
    assert type(as_named).__name__ == "Transformer2DModelOutput"
    assert isinstance(plain, tuple)
    assert torch.equal(as_named.sample, plain[0])
    assert torch.equal(placed.sample, plain[0])


class Option(NamedTuple):
    """Arguments of a call that the first family of a kind does without, and the config that takes them."""

    arguments: Callable[[], Inputs]
    config: Mapping[str, Any] = {}
    prepare: Callable[[Any], Any] = lambda model: model
    without: str = "-"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def told_more_of_time(model: Any) -> Any:
    """diffusers' CogVideoX takes the argument, and has no layer for it."""
    torch.manual_seed(4)
    model.time_embedding.cond_proj = nn.Linear(9, D, bias=False)
    return model


def without_norms(model: Any) -> Any:
    for block in model.transformer_blocks:
        block.attn1.norm_q = block.attn1.norm_k = None
    return model


def key_bias(length: int) -> Tensor:
    return torch.zeros(B, 1, length).index_fill(2, torch.tensor([1, 4]), -1e4)


COGVIDEOX = {
    "rotary table": Option(partial(rotated(3), torch.Generator()), ROTARY),
    "offset": Option(lambda: {"ofs": torch.tensor([2.0])}, {"ofs_embed_dim": 24}),
    "offset and patches of frames": Option(
        lambda: {**cogvideox_offset_inputs(torch.Generator()), "hidden_states": drawn(B, 4, C, 8, 12)},
        LATER["cogvideox 1.5"].config,
    ),
    "condition of the time": Option(lambda: {"timestep_cond": drawn(B, 9)}, prepare=told_more_of_time),
    "mask": Option(lambda: {"attention_kwargs": {"attention_mask": key_bias(S + 72)}}),
    "scale of LoRA": Option(lambda: {"attention_kwargs": {"scale": 0.3}}, prepare=with_lora),
    # the first picture's latents
    "more channels": Option(lambda: {"hidden_states": drawn(B, 3, 2 * C, 8, 12)}, {"in_channels": 2 * C}),
    "learned positions": Option(
        partial(rotated(3), torch.Generator()), ROTARY | {"use_learned_positional_embeddings": True}
    ),
    "more frames": Option(lambda: {"hidden_states": drawn(B, 5, C, 8, 12)}),
    "a pixel too many": Option(lambda: {"hidden_states": drawn(B, 3, C, 9, 13)}),
    "one token": Option(lambda: {"hidden_states": drawn(B, 1, C, 2, 2)}),
    "no norm of queries and keys": Option(dict, prepare=without_norms),
}
PIXART = {
    "size and aspect ratio": Option(partial(pixart_sized_inputs, torch.Generator()), SIZED),
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
OPTIONS = {"cogvideox": COGVIDEOX, "pixart": PIXART}
UNSEEN = {"pixart": {"cross_attention_kwargs"}}
"""Optional inputs that change nothing: no processor of PixArt takes any."""


@pytest.mark.parametrize("name", OPTIONS)
def test_the_table_has_every_optional_input(name: str) -> None:
    """A later diffusers may add one."""
    parameters = inspect.signature(LATER[name].host.forward).parameters.values()
    optional = {p.name for p in parameters if p.default is not p.empty} - {"return_dict"}
    given = {argument for option in OPTIONS[name].values() for argument in option.arguments()}
    assert optional <= given | LATER[name].inputs().keys() | UNSEEN.get(name, set())


@dtypes
@pytest.mark.parametrize(("name", "option"), [(name, o) for name in OPTIONS for o in OPTIONS[name]])
def test_an_optional_input_changes_diffusers_and_the_view_alike(
    name: str, option: str, dtype: torch.dtype
) -> None:
    family, chosen = LATER[name], OPTIONS[name][option]
    plain = call(family.transformer().to(dtype), in_type(family.inputs(), dtype))
    host = chosen.prepare(family.transformer(**chosen.config)).to(dtype)
    inputs = in_type(family.inputs() | chosen.arguments(), dtype)
    expected = call(host, inputs)
    assert not torch.equal(expected, plain)
    assert same_in_both(family, view(host), inputs, expected, chosen.without)


@one_each
def test_arguments_that_attention_does_not_know(family: Family, caplog: Any) -> None:
    name = "attention_kwargs" if family.frames else "cross_attention_kwargs"
    host, inputs = family.transformer(), family.inputs() | {name: {"nobody_knows": 1}}
    expected = call(host, inputs)
    assert torch.equal(expected, call(host, family.inputs()))
    assert same_in_both(family, view(host), inputs, expected)


def test_pixart_asks_for_the_size_where_it_needs_it() -> None:
    family = LATER["pixart sized"]
    viewed, inputs = view(family.transformer()), family.inputs()
    with pytest.raises(ConfigError, match="added_cond_kwargs=None, expected resolution and aspect_ratio"):
        call(viewed, inputs, added_cond_kwargs=None)


@pytest.mark.parametrize("option", ["mask", "cross-attention to itself"])
def test_what_goes_with_all_rows_refuses_some(option: str) -> None:
    family, chosen = LATER["pixart"], PIXART[option]
    viewed, inputs = view(family.transformer(**chosen.config)), family.inputs() | chosen.arguments()
    some = Run({"tokens": lambda fn, *args: fn(*args).rows("image", torch.arange(4))})
    with pytest.raises(ConflictError, match="goes with all rows, not with some"):
        call(viewed, inputs, some)


@one_each
@dtypes
def test_lora_before_and_after_the_swap(family: Family, dtype: torch.dtype) -> None:
    host, inputs = family.transformer().to(dtype), in_type(family.inputs(), dtype)
    plain = call(host, inputs)
    after = with_lora(view(copy.deepcopy(host)))
    expected = call(with_lora(host), inputs)
    assert not torch.equal(plain, expected)
    for viewed in (after, view(host)):
        assert same_in_both(family, viewed, inputs, expected)


@later
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(family: Family, checkpointed: bool) -> None:
    host, inputs = family.transformer().train(), family.inputs()
    host(**inputs).sample.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    viewed = view(host)
    if checkpointed:
        viewed.enable_gradient_checkpointing()
    run, seen = tapped(family, viewed)
    with running(run):
        loss = viewed(**inputs).sample.square().sum()
    loss.backward()
    assert set(seen) == {site.name for site in family.view.sites(viewed)}
    for name, p in viewed.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        assert p.grad is None or torch.equal(p.grad, expected[name]), name


@one_each
def test_restored_and_saved_it_is_diffusers_own(family: Family, tmp_path: Path) -> None:
    host, inputs = family.transformer(), family.inputs()
    expected, classes = call(host, inputs), [type(module) for module in host.modules()]
    view(host).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family.host.__name__
    saved = family.host.from_pretrained(tmp_path).eval()
    # diffusers maps weights where they lie in the file, and products of other alignments are others
    assert torch.allclose(call(saved, inputs), expected, atol=1e-6)
    assert all(map(torch.equal, saved.state_dict().values(), host.state_dict().values()))
    assert restore(host) is host
    assert [type(module) for module in host.modules()] == classes
    assert torch.equal(call(host, inputs), expected)


# What the transformer carries


@one_each
def test_hooks_of_blocks_attention_and_leaves_fire(family: Family) -> None:
    host, inputs, fired = family.transformer(), family.inputs(), []
    block = host.transformer_blocks[1]
    cross = getattr(block, "attn2", None) or block.norm1.linear
    for module in (host, block, block.attn1, block.attn1.to_q, block.ff, cross):
        module.register_forward_hook(lambda module, args, out: fired.append(type(module).__name__))
    call(host, inputs)
    expected = fired.copy()
    fired.clear()
    call(view(host), inputs)
    assert sorted(fired) == sorted(expected)


@one_each
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


@one_each
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(family: Family, kind: str) -> None:
    host, inputs = family.transformer(), family.inputs()
    expected, cpu = call(host, inputs), torch.device("cpu")
    apply_group_offloading(host, cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert same_in_both(family, view(host), inputs, expected)


@one_each
def test_a_processor_of_ones_own_and_fused_layers_have_no_sites_inside(family: Family) -> None:
    class ClipProcessor(CogVideoXAttnProcessor2_0):  # type: ignore[misc]
        pass

    class ImageProcessor(AttnProcessor2_0):  # type: ignore[misc]
        pass

    host, inputs = family.transformer(), family.inputs()
    expected = call(host, inputs)
    host.transformer_blocks[0].attn1.set_processor((ClipProcessor if family.frames else ImageProcessor)())
    assert same_in_both(family, view(host), inputs, expected)
    cores = named(family.view.sites(host), "core", "kv")
    assert [name for name in cores if name.startswith("blocks.0")] == []
    assert len(cores) == 2 * (DEPTH - 1)
    restore(host).fuse_qkv_projections()
    fused = call(host, inputs)
    assert same_in_both(family, view(host), inputs, fused)
    assert named(family.view.sites(host), "core", "kv") == []


def test_chunked_layers_of_pixart() -> None:
    family = LATER["pixart"]
    host, inputs = family.transformer(), family.inputs()
    expected = call(host, inputs)
    for block in host.transformer_blocks:
        block.set_chunk_feed_forward(1, 0)
    assert same_in_both(family, view(host), inputs, call(restore(copy.deepcopy(host)), inputs))
    assert torch.allclose(call(host, inputs), expected, atol=1e-6)


@one_each
def test_blocks_compile_without_a_break_and_as_often_as_diffusers_own(family: Family) -> None:
    inputs = family.inputs()
    expected = call(family.transformer(), inputs)

    def graphs(model: Any) -> int:
        made = []

        def backend(graph: Any, examples: Any) -> Any:
            made.append(graph)
            return graph.forward

        torch._dynamo.reset()
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)
        assert torch.equal(call(model, inputs), expected)
        return len(made)

    # a second one for the first block, whose tokens have other strides
    assert graphs(view(family.transformer())) == graphs(family.transformer()) == 2
