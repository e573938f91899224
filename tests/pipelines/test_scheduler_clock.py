"""The clock on diffusers' schedulers, and what a family's layout asks for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ditkit.core.errors import ConfigError
from ditkit.hosts.family import Family, families, transformers
from ditkit.pipelines.scheduler_clock import Clock, instrumented


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
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
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
    with pytest.raises(KeyboardInterrupt), instrumented(scheduler):
        assert isinstance(scheduler, own) and type(scheduler).__name__ == own.__name__
        assert [inspect.signature(getattr(scheduler, n)) for n in ("set_timesteps", "step")] == signatures
        raise KeyboardInterrupt
    assert type(scheduler) is own


def test_a_scheduler_without_timesteps_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps = None
    with pytest.raises(ConfigError, match="timesteps=None after set_timesteps"):
        Clock().begin(scheduler)
