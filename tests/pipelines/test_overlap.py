"""Calls of accelerated pipelines that overlap, in threads and inside callbacks (found.md, cases 1 and 35)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import ditkit
from ditkit.core.errors import ConflictError
from ditkit.pipelines.scheduler_clock import LISTENER, OWNERS
from family_pipelines_support import dit
from pipelines_support import POLICY, STEPS, asked, latents, pipeline

Draw = Callable[..., Tensor]


def staggered(first: Draw, second: Draw, begins: int) -> tuple[Tensor, Tensor]:
    """Draw in two threads: the second begins after `begins` steps of the first, and awaits its end at step 2."""
    halfway, inside, ended, drawn = threading.Event(), threading.Event(), threading.Event(), {}

    def early(step: int) -> None:
        if step == begins:
            halfway.set()
            assert inside.wait(timeout=30)

    def late(step: int) -> None:
        if step == 2:
            inside.set()
            assert ended.wait(timeout=30)

    def run_first() -> None:
        drawn["first"] = first(early)
        ended.set()

    def run_second() -> None:
        assert halfway.wait(timeout=30)
        drawn["second"] = second(late)

    threads = [threading.Thread(target=run) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return drawn["first"], drawn["second"]


def dit_draw(fast: Any, told: dict[str, Any], seed: int) -> Draw:
    """DiT's pipeline takes no callback: its transformer's own calls count the steps."""

    def draw(on_step: Callable[[int], None]) -> Tensor:
        here, steps = threading.get_ident(), []

        def count(*_: Any) -> None:
            if threading.get_ident() == here:
                on_step(len(steps))
                steps.append(1)

        hook = fast.transformer.register_forward_hook(count)
        try:
            out = fast(**told, num_inference_steps=8, generator=torch.Generator().manual_seed(seed))[0]
        finally:
            hook.remove()
        return torch.as_tensor(out)

    return draw


@pytest.mark.parametrize("policy", [(), (POLICY,)], ids=["default", "taylorseer"])
def test_found_1_a_call_that_begins_inside_another_on_a_scheduler_that_counts_no_steps(policy: Any) -> None:
    """Each picture is that of the same call alone, to the bit, and the scheduler has its class again."""
    torch.manual_seed(0)
    pipe, told = dit()
    pipe.transformer.eval()  # in training it drops labels by the global generator
    pipe.set_progress_bar_config(disable=True)
    fast = ditkit.accelerate(pipe, *policy)
    draws = dit_draw(fast, told, 0), dit_draw(fast, told, 1)
    alone = [draw(lambda step: None) for draw in draws]
    drawn = staggered(*draws, begins=4)
    assert all(torch.equal(a, b) for a, b in zip(drawn, alone, strict=True))
    assert type(pipe.scheduler) is DDIMScheduler and not OWNERS and LISTENER.get() is None
    assert type(ditkit.restore(fast).scheduler) is DDIMScheduler


@pytest.mark.parametrize("shared", ["pipeline", "scheduler"])
def test_found_1_what_two_calls_share_is_a_calls_own(shared: str) -> None:
    """Euler counts its steps on itself, and FLUX keeps guidance and prompt arguments on the pipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    one = ditkit.accelerate(pipeline(scheduler=scheduler), POLICY)
    other = one if shared == "pipeline" else ditkit.accelerate(pipeline(scheduler=scheduler), POLICY)
    more: list[dict[str, Any]] = [{"guidance_scale": 1.0}, {"guidance_scale": 9.0, "steps": 6}]

    def draw(i: int, fast: Any) -> Draw:
        def drawing(on_step: Callable[[int], None]) -> Tensor:
            def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
                on_step(step)
                return given

            return latents(fast, asked(i, callback_on_step_end=callback, **more[i]))

        return drawing

    draws = draw(0, one), draw(1, other)
    alone = [each(lambda step: None) for each in draws]
    assert all(torch.equal(a, b) for a, b in zip(staggered(*draws, begins=3), alone, strict=True))
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler


def test_found_35_a_call_of_the_pipeline_from_its_own_callback() -> None:
    fast = ditkit.accelerate(pipeline(), POLICY)
    alone, inner = latents(fast, asked(0)), latents(fast, asked(3))
    seen: list[Tensor] = []

    def nest(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            seen.append(latents(fast, asked(3)))
        return given

    assert torch.equal(latents(fast, asked(0, callback_on_step_end=nest)), alone)
    assert len(seen) == 1 and torch.equal(seen[0], inner)


def test_found_35_an_exact_call_on_the_scheduler_of_one_under_way_is_said() -> None:
    """The exact pipeline is diffusers' own: it sets the timesteps of the scheduler that the other is stepping."""
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)

    def nest(inner: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents(pipe, asked(3, steps=STEPS - 2))
        return given

    with pytest.raises(ConflictError, match="another call set its timesteps while this one was under way"):
        latents(fast, asked(callback_on_step_end=nest))
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and not OWNERS


def test_found_1_the_class_is_back_after_an_exception_in_an_overlapping_call() -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)

    def nest(inner: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    def outer(outer_pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(KeyboardInterrupt):
            latents(fast, asked(callback_on_step_end=nest))
        return given

    alone = latents(fast, asked())
    assert torch.equal(latents(fast, asked(callback_on_step_end=outer)), alone)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and not OWNERS
