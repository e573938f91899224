"""A diffusers pipeline under policies: each evaluation in its place, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from torch import Tensor

import ditkit
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConfigError
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.pipelines.accelerate import DEFAULT
from flux_support import transformer
from pipelines_support import (
    IMAGE_TO_IMAGE,
    POLICY,
    SIDE,
    STEPS,
    asked,
    computed,
    lanes,
    latents,
    pipeline,
    prompt,
)

NEGATIVE = {**prompt(seed=9, prefix="negative_"), "true_cfg_scale": 2.0}


class Heun(FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """FLUX asks by sigmas, which diffusers' Heun does not take."""

    def set_timesteps(self, device: Any = None, sigmas: Any = None, mu: float | None = None) -> None:
        super().set_timesteps(len(sigmas), device)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": Heun,
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    ),
}


@pytest.fixture(scope="module")
def first() -> Tensor:
    """What a first accelerated call draws."""
    return latents(ditkit.accelerate(pipeline(), POLICY), asked())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_neutral_equals_the_pipeline_to_the_bit(scheduler: str) -> None:
    pipe = pipeline(scheduler=SCHEDULERS[scheduler]())
    exact = latents(pipe, asked(**NEGATIVE))
    with ditkit.accelerate(pipe, TaylorSeer().exact()) as fast:
        assert torch.equal(latents(fast, asked(**NEGATIVE)), exact)
        assert torch.equal(latents(pipe, asked(**NEGATIVE)), exact)
    assert torch.equal(latents(pipe, asked(**NEGATIVE)), exact)


@pytest.mark.parametrize("kind", IMAGE_TO_IMAGE)
def test_neutral_equals_a_pipeline_that_starts_late(kind: Any) -> None:
    pipe, options = pipeline(kind), IMAGE_TO_IMAGE[kind]
    exact = latents(pipe, asked(**options))
    assert torch.equal(latents(ditkit.accelerate(pipe, POLICY.exact()), asked(**options)), exact)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_evaluation_has_its_place(scheduler: str) -> None:
    """Heun evaluates twice a step and then once; others once."""
    fast = ditkit.accelerate(pipeline(scheduler=SCHEDULERS[scheduler]()), POLICY)
    latents(fast, asked())
    total = 2 * STEPS - 1 if scheduler == "heun" else STEPS
    assert list(fast.report().cost.receipts[0].rows["cond"]) == list(range(total))
    assert computed(fast) == {"cond": "0-1 4 7 10 13" if scheduler == "heun" else "0-1 4 7"}


@pytest.mark.parametrize("kind", IMAGE_TO_IMAGE)
@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_a_late_start_is_not_the_beginning(kind: Any, scheduler: str) -> None:
    """A quarter of the timesteps is left out, in whole steps; FLUX opens no cache context here."""
    fast = ditkit.accelerate(pipeline(kind, SCHEDULERS[scheduler]()), POLICY)
    latents(fast, asked(**IMAGE_TO_IMAGE[kind]))
    done, forecast = ("6-7 10 13", "8-9 11-12 14") if scheduler == "heun" else ("2-3 6", "4-5 7")
    assert lanes(fast) == {"call0": {"computed": done, "forecast": forecast}}


def test_equals_the_loop_written_out() -> None:
    """The pipeline's Euler by hand: the same policy at known indices, lanes and times."""
    pipe, options = pipeline(), asked(**NEGATIVE)
    drawn = latents(ditkit.accelerate(pipe, POLICY), options)
    draw = torch.Generator().manual_seed(0)
    x, ids = pipe.prepare_latents(1, 4, SIDE, SIDE, torch.float32, "cpu", draw, None)
    model, scheduler = pipe.transformer, FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    trajectory = Trajectory(flux.sites(model), [POLICY], STEPS)
    positive, negative = prompt(), prompt(seed=9)
    for i, t in enumerate(scheduler.timesteps):
        v = {}
        for lane, told in (("cond", positive), ("uncond", negative)):
            text = torch.zeros(told["prompt_embeds"].shape[1], 3)
            call = Call(i, STEPS, float(t) / 1000, lane, layout=flux.layout(ids, text))
            with flux.running(trajectory.run(call)), torch.no_grad():
                out = model(
                    hidden_states=x,
                    timestep=t.expand(1) / 1000,
                    guidance=torch.full((1,), 3.5),
                    pooled_projections=told["pooled_prompt_embeds"],
                    encoder_hidden_states=told["prompt_embeds"],
                    txt_ids=text,
                    img_ids=ids,
                    return_dict=False,
                )[0]
            v[lane] = trajectory.leave(call, out)
        x = scheduler.step(v["uncond"] + 2 * (v["cond"] - v["uncond"]), t, x, return_dict=False)[0]
    assert torch.equal(drawn, x)


def test_guidance_has_two_lanes_with_a_cache_context_or_without() -> None:
    fast = ditkit.accelerate(pipeline(), POLICY)
    named = latents(fast, asked(**NEGATIVE))
    assert computed(fast) == {"cond": "0-1 4 7", "uncond": "0-1 4 7"}
    ditkit.restore(fast)
    bare = pipeline()
    fast = ditkit.accelerate(bare, POLICY)
    bare.transformer.cache_context = lambda name: nullcontext()
    assert torch.equal(latents(fast, asked(**NEGATIVE)), named)
    assert computed(fast) == {"call0": "0-1 4 7", "call1": "0-1 4 7"}


def test_an_interrupted_call_is_no_error_and_leaves_nothing(first: Tensor) -> None:
    fast = ditkit.accelerate(pipeline(), POLICY)

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 0
        return given

    latents(fast, asked(callback_on_step_end=stop))
    assert computed(fast) == {"cond": "0"}
    assert torch.equal(latents(fast, asked()), first)


@pytest.mark.parametrize("step", [0, 2])
def test_a_cancelled_call_leaves_nothing(first: Tensor, step: int) -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    with pytest.raises(KeyboardInterrupt):
        latents(fast, asked(callback_on_step_end=raising_at(step)))
    with pytest.raises(ConfigError, match="expected a finished call"):
        fast.report()
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(latents(fast, asked()), first)


def test_a_call_cancelled_inside_a_block_leaves_nothing(first: Tensor) -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    calls: list[int] = []

    def boom(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = pipe.transformer.transformer_blocks[1].register_forward_hook(boom)
    with pytest.raises(KeyboardInterrupt):
        latents(fast, asked())
    hook.remove()
    assert torch.equal(latents(fast, asked()), first)


def raising_at(last: int) -> Callable[..., Any]:
    def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise KeyboardInterrupt
        return given

    return callback


@pytest.mark.parametrize("shared", [True, False], ids=["one transformer", "two transformers"])
def test_two_threads_take_turns(shared: bool) -> None:
    net = transformer() if shared else None
    fasts = [ditkit.accelerate(pipeline(net=net), policy) for policy in (POLICY, TaylorSeer(interval=2))]
    asks = [lambda **more: asked(0, **more), lambda **more: asked(1, batch=2, steps=6, **more)]
    alone = [latents(fast, ask()) for fast, ask in zip(fasts, asks, strict=True)]
    turns, drawn = threading.Barrier(2), {}

    def turn(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step < 5:
            turns.wait(timeout=30)
        return given

    def draw(i: int) -> None:
        drawn[i] = latents(fasts[i], asks[i](callback_on_step_end=turn))

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(drawn[i], alone[i]) for i in range(2))


@pytest.mark.parametrize("inner_is_fast", [True, False])
def test_a_pipeline_inside_a_callback_of_another(first: Tensor, inner_is_fast: bool) -> None:
    """On the same transformer; the inner one, where it is not accelerated, stays exact."""
    net = transformer()
    inner = pipeline(net=net)
    exact = latents(inner, asked(3))
    fast = ditkit.accelerate(pipeline(net=net), POLICY)
    inner = ditkit.accelerate(inner, TaylorSeer(interval=2)) if inner_is_fast else inner
    expected = latents(inner, asked(3))
    seen: list[Tensor] = []

    def nest(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(latents(inner, asked(3)))
        return given

    assert torch.equal(latents(fast, asked(callback_on_step_end=nest)), first)
    assert len(seen) == STEPS and all(torch.equal(x, expected) for x in seen)
    assert torch.equal(expected, exact) != inner_is_fast


@pytest.mark.parametrize("other", [{"side": 24}, {"steps": 5}, {"batch": 2}], ids=str)
def test_a_second_call_may_ask_for_something_else(first: Tensor, other: dict[str, int]) -> None:
    fast = ditkit.accelerate(pipeline(), POLICY)
    fresh = latents(ditkit.accelerate(pipeline(), POLICY), asked(**other))
    assert torch.equal(latents(fast, asked()), first)
    assert torch.equal(latents(fast, asked(**other)), fresh)
    assert torch.equal(latents(fast, asked()), first)


def test_a_new_prompt_is_computed(first: Tensor) -> None:
    """Of another value, in place or not; the same values in another tensor are no new prompt."""
    other = prompt(seed=7)["prompt_embeds"]

    def changing(how: str) -> dict[str, str]:
        def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                text = given["prompt_embeds"]
                given["prompt_embeds"] = {"copy": text.clone, "swap": other.clone}.get(how, lambda: text)()
                if how == "in place":
                    text.copy_(other)
            return given

        fast = ditkit.accelerate(pipeline(), POLICY)
        latents(
            fast,
            asked(
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            ),
        )
        return computed(fast)

    assert changing("copy") == {"cond": "0-1 4 7"}
    assert changing("swap") == changing("in place") == {"cond": "2-3 6"}


@pytest.mark.parametrize("in_place", [True, False])
def test_latents_that_a_callback_moves_far_are_computed(in_place: bool) -> None:
    def moving(by: float) -> dict[str, str]:
        def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            x, shift = given["latents"], by if step == 1 else 0.0
            return {"latents": x.add_(shift) if in_place else x + shift}

        fast = ditkit.accelerate(pipeline(), POLICY)
        latents(fast, asked(callback_on_step_end=callback))
        return computed(fast)

    assert moving(0.0) == moving(1e-3) == {"cond": "0-1 4 7"}
    assert moving(3.0) == {"cond": "2-3 6"}


def test_a_batch_that_changes_its_size_is_computed() -> None:
    """As a callback that switches batched guidance off does."""

    def halve(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {name: x[:1] if step == 2 else x for name, x in given.items()}

    fast = ditkit.accelerate(pipeline(net=transformer(guidance_embeds=False)), POLICY)
    # FLUX keeps its pooled prompt, which broadcasts over one picture only where it has one row
    told = {**asked(batch=2), "pooled_prompt_embeds": prompt(1)["pooled_prompt_embeds"].expand(2, -1)}
    model, forward = fast.transformer, type(fast.transformer).forward

    def fitting(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = len(kwargs["hidden_states"])
        return args, {**kwargs, "pooled_projections": kwargs["pooled_projections"][:rows]}

    hook = model.register_forward_pre_hook(fitting, with_kwargs=True, prepend=True)
    try:
        latents(
            fast,
            {
                **told,
                "callback_on_step_end": halve,
                "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
            },
        )
    finally:
        hook.remove()
    assert type(model).forward is forward
    assert computed(fast) == {"cond": "3-4 7"}


def test_diffusers_own_callbacks_are_asked_what_they_want(first: Tensor) -> None:
    class Look(PipelineCallback):  # type: ignore[misc]
        tensor_inputs = ["prompt_embeds"]  # noqa: RUF012
        seen: list[str] = []  # noqa: RUF012

        def callback_fn(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            self.seen.extend(given)
            return given

    fast = ditkit.accelerate(pipeline(), POLICY)
    assert torch.equal(latents(fast, asked(callback_on_step_end=Look(None, 1))), first)
    assert Look.seen == ["prompt_embeds"] * STEPS


def test_the_default_saves_something() -> None:
    fast = ditkit.accelerate(pipeline())
    latents(fast, asked())
    (receipt,) = fast.report().cost.receipts
    assert receipt.policy == DEFAULT and receipt.saved > 0
