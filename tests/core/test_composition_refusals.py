"""What cannot compose is refused by name before the first step, and the pipeline is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

import ditkit
from ditkit.caching import RAS, ConfidentTaylor, TaylorSeer
from ditkit.core.errors import ConfigError, ConflictError, DitkitError
from ditkit.core.policy import Policy
from flux_support import D, relative
from hosts_support import FAMILIES
from pipelines_support import POLICY, asked, computed, latents, pipeline, prompt

REGIONS = RAS(warmup=2)


class Mine(FluxAttnProcessor):  # type: ignore[misc]
    """A user's own: it may compute anything."""


def with_own_processor(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[1].attn.set_processor(Mine())


def with_ip_adapter(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(D, 32, num_tokens=(4,), scale=[1.0]))


def compiled_whole(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def wrapped_whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def wrapped_block(pipe: Any) -> None:
    blocks = pipe.transformer.transformer_blocks
    blocks[1] = torch.compile(blocks[1], backend="eager")


def compiled_attention(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].attn.compile(backend="eager")


CONFLICTS: dict[str, tuple[Callable[[Any], None], Policy, str]] = {
    "own processor": (with_own_processor, REGIONS, "RAS: transformer_blocks.1.attn attends by Mine"),
    "ip adapter": (
        with_ip_adapter,
        REGIONS,
        "transformer_blocks.0.attn attends by FluxIPAdapterAttnProcessor",
    ),
    "compiled whole": (compiled_whole, POLICY, "compiled by itself; expected compile_repeated_blocks()"),
    "wrapped whole": (wrapped_whole, POLICY, "transformer: torch.compile wrapped it"),
    "wrapped block": (wrapped_block, POLICY, "transformer_blocks.1: torch.compile wrapped it"),
    "compiled attention": (
        compiled_attention,
        POLICY,
        "single_transformer_blocks.0.attn: compiled by itself",
    ),
}
conflicts = pytest.mark.parametrize("case", CONFLICTS)


def state_of(pipe: Any) -> Any:
    """Classes, hooks and attributes of everything that `accelerate` may touch."""
    model = pipe.transformer
    modules = [(type(module), set(vars(module))) for module in model.modules()]
    hooks = [len(model._forward_pre_hooks), len(model._forward_hooks)]
    return modules, hooks, type(pipe.scheduler), set(vars(pipe.scheduler)), set(vars(pipe))


@conflicts
def test_a_conflict_is_refused_by_accelerate(case: str) -> None:
    change, policy, message = CONFLICTS[case]
    pipe = pipeline()
    change(pipe)
    before = state_of(pipe)
    with pytest.raises(ConflictError) as caught:
        ditkit.accelerate(pipe, policy)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert state_of(pipe) == before


@conflicts
def test_a_conflict_that_came_later_is_refused_before_the_first_step(case: str) -> None:
    change, policy, message = CONFLICTS[case]
    pipe, steps = pipeline(), []
    fast = ditkit.accelerate(pipe, policy)
    change(pipe)

    def count(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    with pytest.raises(ConflictError) as caught:
        latents(fast, asked(callback_on_step_end=count))
    assert message in str(caught.value) and not steps
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("policy", [POLICY, ConfidentTaylor(0.05, warmup=1)], ids=str)
def test_policies_that_do_not_look_into_attention_do_not_mind(policy: Policy) -> None:
    pipe = pipeline()
    with_own_processor(pipe)
    exact = latents(pipe, asked())
    with ditkit.accelerate(pipe, policy.exact()) as neutral:
        assert torch.equal(latents(neutral, asked()), exact)
    fast = ditkit.accelerate(pipe, policy)
    assert 0 < relative(latents(fast, asked()), exact) < 0.05
    assert computed(fast)["cond"].startswith("0-1 ")


def test_fused_layers_of_flux_compose() -> None:
    """Its default processor knows them, and keys and values come out of it apart."""
    plain, fused = pipeline(), pipeline()
    fused.transformer.fuse_qkv_projections()
    for policy in (POLICY, REGIONS):
        drawn = [latents(ditkit.accelerate(pipe, policy), asked()) for pipe in (plain, fused)]
        assert torch.allclose(*drawn, atol=1e-5)


def sd3_pipeline() -> Any:
    names = (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(
        FAMILIES["sd3.5"].transformer(), scheduler, **dict.fromkeys(names)
    )


def test_fused_layers_of_sd3_are_refused_for_rows_and_compose_with_branches() -> None:
    pipe = sd3_pipeline()
    pipe.transformer.fuse_qkv_projections()
    before = state_of(pipe)
    with pytest.raises(ConflictError, match=r"RAS: transformer_blocks\.0\.attn attends by FusedJoint"):
        ditkit.accelerate(pipe, REGIONS)
    assert state_of(pipe) == before
    with ditkit.accelerate(pipe, POLICY):
        assert state_of(pipe) != before
    assert state_of(pipe) == before
    pipe.transformer.unfuse_qkv_projections()
    ditkit.accelerate(pipe, REGIONS)


# --- bad input ---------------------------------------------------------------------------------------------


def test_a_family_that_is_not_supported_names_those_that_are_and_the_nearest() -> None:
    class FluxTransformer3DModel(torch.nn.Module):
        pass

    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 6)
    pipe.register_modules(transformer=FluxTransformer3DModel())
    with pytest.raises(ConfigError) as caught:
        ditkit.accelerate(pipe)
    assert "unknown transformer 'FluxTransformer3DModel'; did you mean 'FluxTransformer2DModel'?" in str(
        caught.value
    )
    for name in ("DiTTransformer2DModel", "Lumina2Transformer2DModel", "SD3Transformer2DModel", "Wan"):
        assert name in str(caught.value)


CACHES: dict[str, Any] = {
    "first block": FirstBlockCacheConfig(threshold=0.1),
    "mag": MagCacheConfig(num_inference_steps=8, mag_ratios=torch.ones(8)),
    "taylorseer": TaylorSeerCacheConfig(),
    "faster": FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
        is_guidance_distilled=True,
        tensor_format="BFCHW",
    ),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    ),
}
caches = pytest.mark.parametrize("kind", CACHES)


@caches
def test_a_transformer_hooked_by_another_cache_is_refused(kind: str) -> None:
    pipe = pipeline()
    pipe.transformer.enable_cache(CACHES[kind])
    before = state_of(pipe)
    with pytest.raises(ConflictError, match=r"already replaces it; call disable_cache\(\)"):
        ditkit.accelerate(pipe, POLICY)
    assert state_of(pipe) == before
    pipe.transformer.disable_cache()
    assert torch.equal(
        latents(ditkit.accelerate(pipe, POLICY), asked()),
        latents(ditkit.accelerate(pipeline(), POLICY), asked()),
    )


@caches
def test_a_cache_that_came_later_is_refused(kind: str) -> None:
    """By us, or by diffusers, whose caches look blocks up by their class."""
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    with pytest.raises((ConflictError, ValueError), match=r"already replaces it|not registered"):
        pipe.transformer.enable_cache(CACHES[kind])
        latents(fast, asked())


def test_a_scheduler_that_cannot_say_its_timesteps() -> None:
    class Silent(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, device: Any = None, sigmas: Any = None, mu: float | None = None) -> None:
            super().set_timesteps(len(sigmas), device, sigmas)
            self.timesteps = self.timesteps[:0]

    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    pipe.scheduler = Silent()
    with pytest.raises(ConfigError, match=r"Silent: timesteps=tensor\(\[\]\) after set_timesteps"):
        latents(fast, asked())
    assert type(pipe.scheduler) is Silent


def refused_and_then_as_before(fast: Any, good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    first = latents(fast, asked(**good))
    steps: list[int] = []

    def count(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    with pytest.raises(DitkitError, match=message) as caught:
        latents(fast, asked(callback_on_step_end=count, **bad))
    assert "\n" not in str(caught.value) and not steps
    assert torch.equal(latents(fast, asked(**good)), first)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (TaylorSeer(warmup=4), "TaylorSeer: warmup=4, expected at most total=3"),
        (RAS(warmup=4), "RAS: warmup=4, expected at most total=3"),
    ],
    ids=["taylorseer", "ras"],
)
def test_a_changed_number_of_steps_that_does_not_fit(policy: Policy, message: str) -> None:
    fast = ditkit.accelerate(pipeline(), policy)
    refused_and_then_as_before(fast, {}, {"steps": 3}, message)


def test_a_batch_that_outgrows_its_memory() -> None:
    """A prompt batch of another size is computed anew, and must fit the budget anew."""
    fast = ditkit.accelerate(pipeline(), POLICY)
    latents(fast, asked())
    need = fast.report().cost.policy_bytes
    fast = ditkit.accelerate(ditkit.restore(fast), POLICY, max_bytes=need)
    refused_and_then_as_before(
        fast, {}, {"batch": 2}, f"max_bytes={need:,}: .* would hold {2 * need:,} bytes"
    )


@pytest.mark.parametrize(
    "policy", [POLICY, ConfidentTaylor(0.05, warmup=1), REGIONS], ids=["taylorseer", "confident", "ras"]
)
def test_too_small_a_budget_is_refused_before_the_first_step(policy: Policy) -> None:
    """By one byte, with both lanes of guidance; what suffices is enough to the end."""
    guided = {**prompt(seed=9, prefix="negative_"), "true_cfg_scale": 2.0}
    fast = ditkit.accelerate(pipeline(), policy)
    drawn = latents(fast, asked(**guided))
    need = fast.report().cost.policy_bytes
    pipe, steps = ditkit.restore(fast), []

    def count(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    with ditkit.accelerate(pipe, policy, max_bytes=need) as fast:
        assert torch.equal(latents(fast, asked(**guided)), drawn)
    with ditkit.accelerate(pipe, policy, max_bytes=need - 1) as fast:
        with pytest.raises(ConfigError, match=f"max_bytes={need - 1:,}: .* would hold {need:,} bytes"):
            latents(fast, asked(callback_on_step_end=count, **guided))
        assert not steps
