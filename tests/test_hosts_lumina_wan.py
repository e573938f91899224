"""The views of Lumina 2, Lumina-Next and Wan equal diffusers bit for bit, and policies act on their sites."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import LuminaAttnProcessor2_0
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import DIRECT, Call, Run, Site, named
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import lumina2, lumina_next, wan
from ditkit.hosts.view import restore, running, view
from policies_for_tests import Gate, Gated, RowSelector, SelectedRows, Tap

B, C, S, DEPTH, L = 3, 4, 9, 3, 24
Inputs = dict[str, Any]
DRAW = torch.Generator()
PICTURE, CLIP, CLIP_ROWS = (B, C, 8, 12), (B, C, 2, 6, 8), 24
LORA = {"r": 2, "target_modules": ["to_q", "linear", "linear_1", "proj_out"], "init_lora_weights": False}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW)


def captions(*lengths: int) -> Tensor:
    """Mask [B, S] of captions that end in padding."""
    return (torch.arange(S) < torch.tensor(lengths)[:, None]).long()


@dataclass(frozen=True)
class Case:
    """One kind of call: a transformer's class with a small config, its view, and the inputs after the latents."""

    host: type
    module: ModuleType
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    draw: Callable[[], Inputs]
    text: tuple[int, ...] = field(default=())
    """Captions' lengths, where text is part of the sequence."""

    def transformer(self, **changed: Any) -> Any:
        """Always the same weights, none of them zero."""
        torch.manual_seed(0)
        model = self.host(**{**self.config, **changed}).eval()
        for name, p in model.named_parameters():
            if name.endswith((".gate", "pad_token")):
                nn.init.normal_(p)
        return model

    def inputs(self) -> Inputs:
        DRAW.manual_seed(1)
        return {"hidden_states": drawn(*self.shape), **self.draw()}

    def layout(self, model: Any, inputs: Inputs) -> tuple[Segment, ...]:
        known = {name: v for name, v in inputs.items() if self.text and name == "encoder_attention_mask"}
        layout: tuple[Segment, ...] = self.module.layout(model, inputs["hidden_states"].shape, **known)
        return layout

    def sites(self, model: Any) -> tuple[Site, ...]:
        sites: tuple[Site, ...] = self.module.sites(model)
        return sites


def lumina2_case(*lengths: int) -> Case:
    def draw() -> Inputs:
        return {
            "timestep": torch.tensor([0.3, 0.9, 0.5]),
            "encoder_hidden_states": drawn(B, S, 20),
            "encoder_attention_mask": captions(*lengths),
        }

    return Case(Lumina2Transformer2DModel, lumina2, LUMINA2, PICTURE, draw, lengths)


def next_inputs() -> Inputs:
    return {
        "timestep": torch.tensor([0.3, 0.9, 0.5]),
        "encoder_hidden_states": drawn(B, S, 20),
        "encoder_mask": captions(9, 4, 1),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(24, 16, 16),
        "cross_attention_kwargs": {},
    }


def wan_case(text: int = S, times: tuple[int, ...] = (), picture: bool = False, **config: Any) -> Case:
    def draw() -> Inputs:
        given = {"encoder_hidden_states_image": drawn(B, 5, 16)} if picture else {}
        t = torch.randint(0, 1000, (B, *times), generator=DRAW)
        return {"timestep": t, "encoder_hidden_states": drawn(B, text, 20), **given}

    return Case(WanTransformer3DModel, wan, WAN | config, CLIP, draw)


LUMINA = {
    "sample_size": 8,
    "in_channels": C,
    "hidden_size": 96,
    "num_layers": DEPTH,
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
WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": C,
    "out_channels": C,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": DEPTH,
    "rope_max_seq_len": 32,
}
CASES = {
    "lumina2": lumina2_case(6, 6, 6),
    "lumina2 full": lumina2_case(9, 9, 9),
    "lumina2 ragged": lumina2_case(7, 2, 4),
    "lumina-next": Case(
        LuminaNextDiT2DModel, lumina_next, LUMINA | {"cross_attention_dim": 20}, PICTURE, next_inputs
    ),
    "wan": wan_case(),
    "wan time a token": wan_case(times=(CLIP_ROWS,)),
    "wan picture": wan_case(text=512, picture=True, image_dim=16, added_kv_proj_dim=48),
    "wan plain norm": wan_case(cross_attn_norm=False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
one_each = pytest.mark.parametrize(
    "case", [CASES[name] for name in ("lumina2 ragged", "lumina-next", "wan time a token")], ids=str
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@torch.no_grad()
def call(model: Any, inputs: Inputs, run: Run = DIRECT, **changed: Any) -> Tensor:
    with running(run):
        return model(**{**inputs, **changed}, return_dict=False)[0]


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    return {name: cast(v) for name, v in inputs.items()}


def tapped(case: Case, model: Any) -> tuple[Run, dict[str, Any]]:
    """A run that passes through a handler at every site, and what it meets."""
    sites = case.sites(model)
    tap = Tap(tuple(site.name for site in sites))
    return Trajectory(sites, [tap], 1).run(Call(0, 1, 1.0)), tap.seen


def same_in_both(case: Case, model: Any, inputs: Inputs, expected: Tensor, **given: Any) -> bool:
    """Whether a viewed transformer gives `expected`, without handlers and with one at each site."""
    run, seen = tapped(case, model)
    plain, sited = call(model, inputs, **given), call(model, inputs, run, **given)
    visited = set(seen) == {site.name for site in case.sites(model)}
    return visited and torch.equal(plain, expected) and torch.equal(sited, expected)


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    if hasattr(model, "add_adapter"):
        model.add_adapter(LoraConfig(**LORA))
        return model
    return inject_adapter_in_model(LoraConfig(**LORA), model)


def blocks_of(model: Any) -> Any:
    return model.blocks if isinstance(model, WanTransformer3DModel) else model.layers


def attention_of(block: Any) -> Any:
    return block.attn1 if hasattr(block, "attn1") else block.attn


def run_steps(
    case: Case, model: Any, policies: Any, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Trajectory]:
    """Euler from noise to data in eight steps."""
    inputs = in_type(case.inputs(), dtype)
    trajectory, x = Trajectory(case.sites(model), policies, 8), inputs["hidden_states"]
    for i in range(8):
        now = Call(i, 8, 1 - i / 8, layout=case.layout(model, inputs))
        t = (inputs["timestep"] * now.t).to(inputs["timestep"].dtype)
        v = call(model, inputs, trajectory.run(now), hidden_states=x, timestep=t)
        x = x - trajectory.guided(now, trajectory.leave(now, v[:, :C])) / 8
    return x, trajectory


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


@one_each
def test_blocks_compile_without_a_break_and_once_for_all(case: Case) -> None:
    host, inputs, compiled = case.transformer(), case.inputs(), []
    expected = call(host, inputs)

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in blocks_of(view(host)):
        block.compile(fullgraph=True, backend=backend)
    assert torch.equal(call(host, inputs), expected)
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
        assert torch.equal(picture(), expected)


def test_the_pipeline_of_wan_with_two_experts() -> None:
    case = CASES["wan"]
    experts = case.transformer(), case.transformer(num_layers=2)
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


# Sites, and policies at them


def test_sites_and_layout() -> None:
    joint, alone, clip = (CASES[name] for name in ("lumina2 ragged", "lumina-next", "wan"))
    model = joint.transformer()
    inside = ("", ".attn", ".attn.kv", ".attn.core", ".mlp")
    blocks = [f"blocks.{i}{part}" for i in range(DEPTH) for part in inside]
    refiners = [f"{n}.{i}.{part}" for n in ("context", "noise") for i in range(2) for part in ("attn", "mlp")]
    assert named(lumina2.sites(model), *ALL) == ["time", "tokens", *refiners, "blocks", *blocks, "head"]
    assert {site.stream for site in lumina2.sites(model) if site.name.startswith("blocks")} == {"joint"}
    assert {tuple(site) for site in lumina2.sites(model) if site.name.endswith(".0.attn")} == {
        ("context.0.attn", "branch", "text"),
        ("noise.0.attn", "branch", "image"),
        ("blocks.0.attn", "branch", "joint"),
    }
    text, image = joint.layout(model, joint.inputs())
    assert image == Segment("image", Grid(1, 4, 6), L)
    assert text[:3] == ("text", Grid(7), 7)
    assert text.valid is not None
    assert torch.equal(text.valid, captions(7, 2, 4)[:, :7].bool())
    plain = CASES["lumina2"]
    assert plain.layout(model, plain.inputs()) == (Segment("text", Grid(6), 6), image)

    model = alone.transformer()
    assert named(lumina_next.sites(model), *ALL) == ["time", "tokens", "blocks", *blocks, "head"]
    assert {site.stream for site in lumina_next.sites(model)} == {"image"}
    assert alone.layout(model, alone.inputs()) == (image,)

    model = clip.transformer()
    inside = ("", ".attn", ".attn.kv", ".attn.core", ".cross_attn", ".mlp")
    blocks = [f"blocks.{i}{part}" for i in range(DEPTH) for part in inside]
    assert named(wan.sites(model), *ALL) == ["time", "tokens", "blocks", *blocks, "head"]
    assert {site.stream for site in wan.sites(model)} == {"image"}
    assert clip.layout(model, clip.inputs()) == (Segment("image", Grid(2, 3, 4), CLIP_ROWS),)


ALL: Any = ("time", "tokens", "stack", "block", "branch", "kv", "core", "head")


@cases
@dtypes
def test_taylorseer_that_never_skips_changes_nothing_and_one_that_does_saves(
    case: Case, dtype: torch.dtype
) -> None:
    viewed = view(case.transformer().to(dtype))
    exact = run_steps(case, viewed, [], dtype)[0]
    assert torch.equal(run_steps(case, viewed, [TaylorSeer(3, 1, 1).exact()], dtype)[0], exact)
    x, trajectory = run_steps(case, viewed, [TaylorSeer(3, 1, 1)], dtype)
    assert 0 < (x - exact).float().norm() < 0.1 * exact.float().norm()
    (receipt,) = trajectory.finish()
    branches = named(case.sites(viewed), "branch")
    assert receipt.sites == set(branches)
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0 3 6", "forecast": "1-2 4-5 7"}
    assert receipt.saved == 5 * len(branches)


@cases
def test_selected_rows_equal_the_dense_run(case: Case) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed, inputs = view(case.transformer()), case.inputs()
    layout = case.layout(viewed, inputs)

    def selected(keep_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = Trajectory(case.sites(viewed), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        first, second = (Call(i, 4, 1.0, layout=layout) for i in range(2))
        dense = trajectory.leave(first, call(viewed, inputs, trajectory.run(first)))
        trajectory.guided(first, dense)
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows)
        rows = session.active
        assert rows is not None
        return dense, call(viewed, inputs, trajectory.run(second)), rows

    def by_row(out: Tensor) -> Tensor:
        patches = out.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).transpose(-3, -2)
        return patches.movedim(1, -1).flatten(-3).flatten(1, -2)  # [B, L, P C]

    dense, sparse, rows = (x if i == 2 else by_row(x) for i, x in enumerate(selected(keep_keys=True)))
    assert len(rows) == L // 2
    assert (sparse - dense)[:, rows].abs().max() <= 2e-6 * dense.abs().max()
    assert sparse.abs().sum() == sparse[:, rows].abs().sum()
    dense, sparse, rows = (x if i == 2 else by_row(x) for i, x in enumerate(selected(keep_keys=False)))
    assert (sparse - dense)[:, rows].abs().max() > 1e-4


@cases
def test_branches_run_on_some_rows(case: Case) -> None:
    """Every argument aligned with tokens can be cut: with all keys, some queries give some of the outputs."""
    viewed, inputs = view(case.transformer()), case.inputs()
    index = torch.tensor([1, 4, 5, 17])
    kept: dict[str, Any] = {}

    def whole(name: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Any:
            if q.shape[2] > len(index):
                kept[name] = k, v, *mask
            return fn(q, *kept[name])

        return core

    def some(fn: Any, x: Tensor, *args: Any) -> Tensor:
        out = fn(x, *args)
        part = fn(x[:, index], *(a.rows("joint", index) if hasattr(a, "rows") else a for a in args))
        assert torch.allclose(part, out[:, index], rtol=1e-5, atol=1e-5)
        return out

    sites = case.sites(viewed)
    branches = [name for name in named(sites, "branch") if name.startswith("blocks")]
    handlers = dict.fromkeys(branches, some) | {name: whole(name) for name in named(sites, "core")}
    assert torch.equal(call(viewed, inputs, Run(handlers)), call(viewed, inputs))
    assert len(kept) == DEPTH


@cases
def test_keys_bring_their_positions(case: Case) -> None:
    """Attention does not depend on the order of keys, if each takes its position along."""
    viewed, inputs = view(case.transformer()), case.inputs()
    end = case.layout(viewed, inputs)[0].length if case.text else 0

    def shuffled(fn: Any, kv: Any) -> Any:
        kv = fn(kv)
        rows = torch.arange(kv.k.shape[2])
        # the mask of ragged captions tells of the text, so that only the image's keys may move
        rows[end:] = rows[end:].flip(0)
        table = kv.position
        moved = table[:, rows] if isinstance(table, Tensor) else table.rows("image", rows)
        return kv._replace(k=kv.k[:, :, rows], v=kv.v[:, :, rows], position=moved)

    out = call(viewed, inputs, Run(dict.fromkeys(named(case.sites(viewed), "kv"), shuffled)))
    assert torch.allclose(out, call(viewed, inputs), rtol=1e-4, atol=1e-5)


@cases
def test_a_gate_cuts_the_stack(case: Case) -> None:
    viewed = view(case.transformer())
    exact = run_steps(case, viewed, [])[0]
    assert torch.equal(run_steps(case, viewed, [Gate(0.0)])[0], exact)
    x, trajectory = run_steps(case, viewed, [Gate(10.0)])
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert not torch.equal(x, exact)
