"""The clock on diffusers' schedulers, and every family that has a view as a whole pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import ditkit
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConfigError
from ditkit.hosts.clock import Clock, wound
from ditkit.hosts.family import Family, families, transformers
from pipelines_for_tests import computed, vae

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sd3(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    net = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=96,
    )
    parts = (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    pipe = diffusers.StableDiffusion3Pipeline(net, scheduler, **dict.fromkeys(parts))
    told = {
        "prompt_embeds": drawn(1, 5, 32),
        "pooled_prompt_embeds": drawn(1, 24),
        "negative_prompt_embeds": drawn(1, 5, 32, seed=1),
        "negative_pooled_prompt_embeds": drawn(1, 24, seed=1),
    }
    return pipe, {**told, "height": 64, "width": 64, "output_type": "latent"}


def wan() -> tuple[Any, dict[str, Any]]:
    """Two experts; the first one has the timesteps above nine tenths."""
    experts = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        )
        for _ in range(2)
    ]
    pipe = diffusers.WanPipeline(
        None, None, None, UniPCMultistepScheduler(**FLOW, flow_shift=3.0), *experts, boundary_ratio=0.9
    )
    told = {"prompt_embeds": drawn(1, 5, 32), "negative_prompt_embeds": drawn(1, 5, 32, seed=1)}
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 16}
    return pipe, {**told, **size, "output_type": "latent"}


def lumina2() -> tuple[Any, dict[str, Any]]:
    """Guided in the first half of the steps only."""
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=8,
    )
    pipe = diffusers.Lumina2Pipeline(net, FlowMatchEulerDiscreteScheduler(), None, None, None)
    told = {
        "prompt_embeds": drawn(1, 5, 8),
        "prompt_attention_mask": torch.ones(1, 5).bool(),
        "negative_prompt_embeds": drawn(1, 5, 8, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 5).bool(),
    }
    return pipe, {**told, "height": 32, "width": 32, "cfg_trunc_ratio": 0.5, "output_type": "latent"}


def dit(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    net = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    pipe = diffusers.DiTPipeline(net, vae(), scheduler)
    return pipe, {"class_labels": [1, 2], "guidance_scale": 4.0, "output_type": "np"}


CASES: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "sd3": (lambda: sd3(FlowMatchEulerDiscreteScheduler()), {"call0": "0-1 4 7"}),
    "sd3 heun": (lambda: sd3(FlowMatchHeunDiscreteScheduler()), {"call0": "0-1 4 7 10 13"}),
    "dit": (lambda: dit(DDIMScheduler()), {"call0": "0-1 4 7"}),
    "dit dpm++": (lambda: dit(DPMSolverMultistepScheduler()), {"call0": "0-1 4 7"}),
    "lumina2": (lumina2, {"call0": "0-1 4 7", "call1": "0-1"}),
    "wan": (
        wan,
        {
            "transformer/cond": "0-1 4",
            "transformer/uncond": "0-1 4",
            "transformer_2/cond": "5-6 9 12 15",
            "transformer_2/uncond": "5-6 9 12 15",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_exact_when_neutral_and_saves_by_default(case: str) -> None:
    torch.manual_seed(0)
    make, receipt = CASES[case]
    pipe, told = make()
    pipe.set_progress_bar_config(disable=True)
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()  # as from_pretrained does; DiT drops labels in training

    def draw(one: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(one(**{"num_inference_steps": 8, **told}, generator=generator)[0])

    exact = draw(pipe)
    with ditkit.accelerate(pipe, TaylorSeer().exact()) as neutral:
        assert torch.equal(draw(neutral), exact)
        assert neutral.report().took.full == neutral.report().took.evaluations
    fast = ditkit.accelerate(pipe)
    assert not torch.equal(draw(fast), exact)
    assert computed(fast) == receipt


def test_layouts_ask_for_what_a_call_tells() -> None:
    modules = families()
    assert len(modules) >= 5
    for module in modules:
        views = [cls for cls in vars(module).values() if cls in transformers()]
        asks = set(Family(module.sites, module.layout).asks())
        for cls in views:
            known = {"model", "shape", "text", *inspect.signature(cls.forward).parameters}
            assert asks <= known, f"{module.__name__}: layout asks for {sorted(asks - known)}"


def ran(scheduler: Any, steps: int, start: int, begin: bool) -> Clock:
    """A clock that has seen a start."""
    clock = Clock()
    scheduler.set_timesteps(steps)
    clock.begin(scheduler)
    if begin:
        scheduler.set_begin_index(start)
        clock.locate(scheduler)
    else:
        clock.locate(scheduler, scheduler.timesteps[start])
    return clock


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("begin", [True, False], ids=["begin_index", "first timestep"])
def test_the_offset_is_told_or_seen(start: int, begin: bool) -> None:
    """DDIM has no begin_index: its pipelines show the timestep to scale_model_input first."""
    scheduler = FlowMatchEulerDiscreteScheduler() if begin else DDIMScheduler()
    clock = ran(scheduler, 10, start, begin)
    seen = []
    for t in scheduler.timesteps[start:]:
        seen.append(clock.index)
        clock.check(t if begin else int(t))
        clock.advance()
    assert seen == list(range(start, 10)) and clock.age == 1 and clock.is_over


def test_heun_repeats_a_timestep_and_the_clock_does_not() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    for copied in (False, True):
        clock = ran(scheduler, 4, 0, True)
        seen = []
        for t in scheduler.timesteps:
            seen.append(clock.index)
            clock.check(t.clone() if copied else t)
            clock.advance()
        assert seen == list(range(7)) and clock.age == 1


def test_a_jump_voids_what_was_kept() -> None:
    """RePaint goes back in time; some pipelines skip."""
    scheduler = DDIMScheduler()
    clock = ran(scheduler, 10, 0, False)
    for place, age in ((0, 1), (1, 1), (5, 2), (6, 2), (2, 3), (3, 3)):
        clock.check(scheduler.timesteps[place])
        assert (clock.index, clock.age) == (place, age)
        clock.advance()
    clock.check(123.4)
    assert (clock.index, clock.age) == (4, 4)


def test_a_late_start_that_nobody_told_is_corrected_at_the_first_step() -> None:
    scheduler = UniPCMultistepScheduler(**FLOW)
    scheduler.set_timesteps(10)
    clock = Clock()
    clock.begin(scheduler)
    clock.locate(scheduler)
    assert clock.index == 0
    clock.check(scheduler.timesteps[4])
    clock.advance()
    assert (clock.index, clock.age) == (5, 2)


def test_a_scheduler_keeps_its_signatures_and_gets_its_class_back() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    own = type(scheduler)
    signatures = [inspect.signature(getattr(scheduler, name)) for name in ("set_timesteps", "step")]
    with pytest.raises(KeyboardInterrupt), wound(scheduler):
        assert isinstance(scheduler, own) and type(scheduler).__name__ == own.__name__
        assert [inspect.signature(getattr(scheduler, n)) for n in ("set_timesteps", "step")] == signatures
        raise KeyboardInterrupt
    assert type(scheduler) is own


def test_a_scheduler_without_timesteps_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps = None
    with pytest.raises(ConfigError, match="timesteps=None after set_timesteps"):
        Clock().begin(scheduler)
