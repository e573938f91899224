"""What `accelerate` takes, refuses, reports and gives back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.hooks import FirstBlockCacheConfig

import ditkit
from ditkit.caching.confident_taylor import ConfidentTaylor
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.pipelines.accelerate import Accelerated
from flux_support import transformer
from pipelines_support import IMAGE_TO_IMAGE, POLICY, STEPS, asked, computed, latents, pipeline
from policies_support import Tap


def test_restore_gives_the_pipeline_back() -> None:
    pipe = pipeline()
    exact = latents(pipe, asked())
    model, before = pipe.transformer, state_of(pipe)
    fast = ditkit.accelerate(pipe, POLICY)
    latents(fast, asked())
    assert state_of(pipe) != before
    assert type(pipe.scheduler).step is FlowMatchEulerDiscreteScheduler.step
    assert ditkit.restore(fast) is pipe and pipe.transformer is model
    assert state_of(pipe) == before
    assert torch.equal(latents(pipe, asked()), exact)
    assert ditkit.restore(fast) is pipe
    with pytest.raises(ConfigError, match=r"FluxPipeline was restored; call ditkit.accelerate again"):
        latents(fast, asked())


def state_of(pipe: Any) -> Any:
    """Classes, hooks and attributes of everything that `accelerate` may touch."""
    classes = [id(type(module)) for module in pipe.transformer.modules()]  # a view equals what it stands for
    model = pipe.transformer
    hooks = [
        len(model._forward_pre_hooks),
        len(model._forward_hooks),
        len(model._forward_hooks_always_called),
    ]
    return classes, hooks, set(vars(model)), type(pipe.scheduler), set(vars(pipe.scheduler)), set(vars(pipe))


@pytest.mark.parametrize("kind", [FluxImg2ImgPipeline, AutoPipelineForImage2Image])
@pytest.mark.parametrize("of", ["pipeline", "accelerated"])
def test_another_pipeline_of_the_same_parts_is_exact(kind: Any, of: str) -> None:
    """diffusers compares the classes of parts, and the names of pipelines' classes."""
    options = IMAGE_TO_IMAGE[FluxImg2ImgPipeline]
    exact = latents(pipeline(FluxImg2ImgPipeline), asked(**options))
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    first = latents(fast, asked())
    other = kind.from_pipe(pipe if of == "pipeline" else fast)
    assert type(other) is FluxImg2ImgPipeline and other.transformer is pipe.transformer
    assert torch.equal(latents(other, asked(**options)), exact)
    fastest = ditkit.accelerate(other, POLICY)
    assert not torch.equal(latents(fastest, asked(**options)), exact)
    assert computed(fastest) == {"call0": "2-3 6"}
    assert torch.equal(latents(fast, asked()), first)
    ditkit.restore(fastest)
    ditkit.restore(fast)
    assert torch.equal(latents(other, asked(**options)), exact)
    assert type(other.transformer) is FluxTransformer2DModel


def test_is_an_instance_of_what_the_pipeline_is() -> None:
    fast = ditkit.accelerate(pipeline(), POLICY)
    assert isinstance(fast, FluxPipeline) and isinstance(fast, Accelerated) and type(fast) is Accelerated


def test_two_accelerated_pipelines_of_one() -> None:
    pipe = pipeline()
    model = type(pipe.transformer)
    slow, fast = (ditkit.accelerate(pipe, TaylorSeer(interval=n, order=1)) for n in (2, 4))
    drawn = [latents(one, asked()) for one in (slow, fast)]
    assert not torch.equal(*drawn)
    ditkit.restore(slow)
    assert torch.equal(latents(fast, asked()), drawn[1])
    ditkit.restore(fast)
    assert type(pipe.transformer) is model


def test_copies_do_not_cling_to_the_accelerated_pipeline() -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    first = latents(fast, asked())
    twin = copy.deepcopy(pipe.transformer)
    reloaded = pickle.loads(pickle.dumps(pipe.transformer))
    for net in (twin, reloaded):
        assert torch.equal(latents(ditkit.accelerate(pipeline(net=net), POLICY), asked()), first)
    schedulers: list[Any] = []

    def keep(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        schedulers.append(copy.deepcopy(pipe.scheduler))
        return given

    latents(fast, asked(callback_on_step_end=keep))
    assert type(schedulers[0]) is FlowMatchEulerDiscreteScheduler
    assert schedulers[0].step_index == 1


def test_everything_else_is_the_pipelines() -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    assert fast.transformer is pipe.transformer and fast.components.keys() == pipe.components.keys()
    assert fast.to("cpu") is fast
    fast.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert pipe.scheduler is fast.scheduler
    latents(fast, asked())
    assert computed(fast) == {"cond": "0-1 4 7"}
    with pytest.raises(AttributeError, match="nothing"):
        fast.nothing  # noqa: B018


def test_report_has_no_error_that_was_not_measured() -> None:
    fast = ditkit.accelerate(pipeline(), "taylorseer:interval=3,order=1")
    with pytest.raises(ConfigError, match="expected a finished call"):
        fast.report()
    latents(fast, asked())
    report = fast.report()
    assert str(report).startswith("error not measured") and report.rows == ()
    assert report.cost.seconds > 0 and report.cost.policy_bytes > 0
    assert (report.cost.evaluations, report.cost.full, report.cost.forwards) == (STEPS, 4, STEPS)


def test_report_measures_against_the_same_randomness() -> None:
    """With the decoder, errors are of pictures; the generator of the call is not touched again."""
    fast = ditkit.accelerate(pipeline(FluxImg2ImgPipeline), POLICY)
    generator = torch.Generator().manual_seed(4)
    options = asked(**IMAGE_TO_IMAGE[FluxImg2ImgPipeline], generator=generator)
    latents(fast, options)
    state = generator.get_state()
    report = fast.report(exact=True, converged_steps=20)
    exact, row = report.rows
    assert torch.equal(generator.get_state(), state)
    assert (exact.macs_ratio, exact.identical, exact.full_evaluations) == (1.0, True, 6)
    assert 0.3 < row.macs_ratio < 0.7 and row.full_evaluations == 3
    assert row.psnr_db is not None and row.psnr_db > 40 and row.ssim is not None
    assert row.control_steps == round(STEPS * row.macs_ratio)
    assert row.psnr_converged_db is not None and row.control_psnr_converged_db is not None
    text = str(report)
    assert "dB to exact, of pictures" in text and "exact steps" in text and "\nto converged: " in text


def test_report_of_a_neutral_policy_says_identical() -> None:
    pipe = pipeline()
    pipe.vae = None
    fast = ditkit.accelerate(pipe, POLICY.exact())
    torch.manual_seed(0)
    latents(fast, asked(generator=None, steps=2))
    torch.manual_seed(1)
    report = fast.report(exact=True)
    assert report.rows[1].identical and report.compared == "latents"
    assert "identical to exact, of latents" in str(report)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", [autocast, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("later", [autocast, torch.inference_mode, nullcontext])
def test_report_draws_in_the_modes_of_the_call(mode: Any, later: Any) -> None:
    """Whatever modes it is asked in; callbacks are called again, as they may change what is drawn."""
    seen: list[tuple[bool, ...]] = []

    def look(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return given

    fast = ditkit.accelerate(pipeline(), POLICY)
    with mode():
        exact, drawn = latents(pipeline(), asked()), latents(fast, asked(callback_on_step_end=look))
    fast._pipe.vae = None
    with later():
        row = fast.report(exact=True).rows[1]
    control = row.control_steps or 0
    assert seen == [(mode is autocast, mode is torch.inference_mode)] * (5 * STEPS + control)
    error = (drawn - exact).double().square().mean()
    assert row.psnr_db == pytest.approx(float(10 * (4 / error).log10()), abs=1e-2)


def test_a_policy_without_effect_is_an_error() -> None:
    fast = ditkit.accelerate(pipeline(), ConfidentTaylor(1e-30))
    with pytest.raises(NoEffectError, match="saved nothing: all 4 evaluations were full") as caught:
        latents(fast, asked(steps=4))
    pipe = pipeline()
    assert torch.equal(caught.value.output.images, latents(pipe, asked(steps=4)))
    fast = ditkit.accelerate(pipe, POLICY)
    pipe.transformer = transformer()
    with pytest.raises(NoEffectError, match="none of the transformers"):
        latents(fast, asked())


def hooked() -> Any:
    pipe = pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return pipe


def with_unet() -> Any:
    pipe = pipeline()
    pipe.transformer = UNet2DConditionModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    return pipe


def without_times() -> Any:
    pipe = pipeline()
    pipe.scheduler = type("Sampler", (), {"step": lambda self, x: x})()
    return pipe


@pytest.mark.parametrize(
    ("make", "policies", "error", "quoted"),
    [
        (lambda: torch.nn.Linear(2, 2), [], ConfigError, "got Linear, expected a diffusers pipeline"),
        (with_unet, [], ConfigError, "unknown transformer 'UNet2DConditionModel'"),
        (hooked, [], ConflictError, "disable_cache()"),
        (pipeline, [Tap()], NoEffectError, "Tap: this model has no site that it can use"),
        (pipeline, [TaylorSeer(), POLICY], ConflictError, "both own"),
        (pipeline, ["taylorsear"], ConfigError, "taylorseer"),
        (without_times, [], ConfigError, "Sampler lacks set_timesteps"),
    ],
    ids=["no pipeline", "family", "hooked", "no site", "two owners", "no policy", "scheduler"],
)
def test_refused_in_one_line_and_left_as_it_was(
    make: Callable[[], Any], policies: list[Any], error: type[Exception], quoted: str
) -> None:
    pipe = make()
    before = state_of(pipe) if hasattr(pipe, "transformer") else None
    with pytest.raises(error) as caught:
        ditkit.accelerate(pipe, *policies)
    assert quoted in str(caught.value) and "\n" not in str(caught.value)
    assert before is None or state_of(pipe) == before


@pytest.mark.parametrize(
    ("policy", "given", "quoted"),
    [
        (POLICY, {"max_bytes": 10}, "max_bytes=10"),
        (TaylorSeer(warmup=9), {}, "warmup=9, expected at most total=8"),
    ],
    ids=["max_bytes", "steps"],
)
def test_refused_before_the_first_step(policy: TaylorSeer, given: dict[str, int], quoted: str) -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, policy, **given)
    steps: list[int] = []

    def count(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    exact = latents(pipe, asked())
    with pytest.raises(ConfigError) as caught:
        latents(fast, asked(callback_on_step_end=count))
    assert quoted in str(caught.value) and "\n" not in str(caught.value) and not steps
    assert torch.equal(latents(ditkit.restore(fast), asked()), exact)


def test_restore_wants_what_accelerate_gave() -> None:
    with pytest.raises(ConfigError, match=r"got FluxPipeline, expected what ditkit\.accelerate returned"):
        ditkit.restore(pipeline())  # type: ignore[arg-type]
