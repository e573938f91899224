"""What a sceptic tried on accelerated pipelines, and what held only after a repair."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

import ditkit
from ditkit.caching import RAS, ConfidentTaylor, TaylorSeer
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.policy import Policy
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.hosts.view import view
from ditkit.pipelines.call import PipelineCall
from ditkit.pipelines.replay import CallSnapshot
from flux_support import at, call, call_inputs, transformer
from pipelines_support import POLICY, STEPS, asked, computed, latents, pipeline, pixart

Callback = Callable[..., dict[str, Any]]


def counting(steps: list[int]) -> Callback:
    def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    return callback


def is_bare(pipe: Any) -> bool:
    """Whether nothing of ours is on its transformer."""
    model = pipe.transformer
    hooks = (
        model._forward_pre_hooks,
        model._forward_pre_hooks_with_kwargs,
        model._forward_hooks,
        model._forward_hooks_always_called,
    )
    return type(model) is FluxTransformer2DModel and not any(hooks) and "cache_context" not in vars(model)


def test_an_accelerated_pipeline_is_not_accelerated_again() -> None:
    """The inner one would act, and the outer one would say that nothing happened."""
    fast = ditkit.accelerate(pipeline(), POLICY)
    first = latents(fast, asked())
    with pytest.raises(ConflictError, match=r"got Accelerated\(FluxPipeline, .*expected the pipeline that"):
        ditkit.accelerate(fast, TaylorSeer(interval=2))
    assert torch.equal(latents(fast, asked()), first)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_an_accelerated_pipeline_is_one_of_its_own(copied: Callable[[Any], Any]) -> None:
    fast = ditkit.accelerate(pipeline(), POLICY)
    first = latents(fast, asked())
    twin = copied(fast)
    assert torch.equal(latents(twin, asked()), first) and computed(twin) == {"cond": "0-1 4 7"}
    assert twin.transformer is not fast.transformer and is_bare(ditkit.restore(twin))
    assert torch.equal(latents(fast, asked()), first) and computed(fast) == {"cond": "0-1 4 7"}


def test_a_copy_of_the_pipeline_can_be_rid_of_all_that_is_ours() -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    twin = copy.deepcopy(pipe)
    assert is_bare(ditkit.restore(ditkit.accelerate(twin, POLICY)))
    assert is_bare(ditkit.restore(fast))


def test_what_nobody_can_restore_leaves_no_hook() -> None:
    pipe = pipeline()
    for _ in range(3):
        fast = ditkit.accelerate(pipe, POLICY)
    assert len(pipe.transformer._forward_hooks) == 1
    assert is_bare(ditkit.restore(fast))


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("last", [0, 1, 4])
def test_an_interrupted_call_frees_its_state_at_once(no_collector: None, last: int) -> None:
    """Not when the garbage collector comes by: a ladder is gigabytes of a card."""

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise KeyboardInterrupt
        return given

    fast = ditkit.accelerate(pipeline(), POLICY)
    with pytest.raises(KeyboardInterrupt) as caught:
        latents(fast, asked(callback_on_step_end=stop))
    del caught
    assert not [one for one in gc.get_objects() if type(one) is Trajectory]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [True, False])
def test_latents_that_are_moved_far_are_computed_in_every_mode(mode: Any, in_place: bool) -> None:
    """Tensors of inference mode count no versions."""

    def move(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        x, by = given["latents"], 3.0 if step == 1 else 0.0
        return {"latents": x.add_(by) if in_place else x + by}

    fast = ditkit.accelerate(pipeline(), POLICY)
    with mode():
        latents(fast, asked(callback_on_step_end=move))
    assert computed(fast) == {"cond": "2-3 6"}


@pytest.mark.parametrize("policy", [TaylorSeer(interval=2, order=2), ConfidentTaylor(schedule=(0, 2, 4, 6))])
@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_a_ladder_outlives_the_inference_mode_it_began_in(policy: Policy, modes: tuple[Any, Any]) -> None:
    """Outside of it, its tensors can be read and not written."""
    net, x, sites = view(transformer()), call_inputs(), flux.sites(view(transformer()))
    drawn = []
    for first, second in (modes, (torch.no_grad, torch.no_grad)):
        trajectory, outs = Trajectory(sites, [policy], STEPS), []
        for i in range(STEPS):
            with second() if i >= STEPS // 2 else first():
                outs.append(trajectory.leave(at(i, STEPS), call(net, x, trajectory.run(at(i, STEPS)))))
        drawn.append(torch.stack(outs))
        assert trajectory.receipts[0].saved
    assert torch.equal(*drawn)


def test_a_step_that_was_replaced_on_the_scheduler_itself_is_refused() -> None:
    """It hides the class that tells the clock: every evaluation would be the first, and all be kept."""
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, POLICY)
    own = pipe.scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:
        return own(model_output, timestep, sample, **more)

    pipe.scheduler.step = step
    quoted = "FlowMatchEulerDiscreteScheduler: step was replaced on the object itself"
    with pytest.raises(ConfigError, match=quoted):
        latents(fast, asked())
    with pytest.raises(ConfigError, match=quoted):
        ditkit.accelerate(pipe, POLICY)
    del pipe.scheduler.step
    latents(fast, asked())
    assert computed(fast) == {"cond": "0-1 4 7"}


def test_another_transformer_is_refused_before_the_first_step() -> None:
    pipe = pipeline()
    fast, steps = ditkit.accelerate(pipe, POLICY), []
    pipe.transformer = transformer()
    with pytest.raises(NoEffectError, match="transformer is none of the transformers that it had before"):
        latents(fast, asked(callback_on_step_end=counting(steps)))
    assert not steps and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_one_generator_may_serve_several_samples() -> None:
    """Drawn anew, they would otherwise all begin from the same noise."""
    shared, other = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    again = CallSnapshot(pipeline(), (), asked(batch=3, generator=[shared, other, shared]))
    expected = [torch.randn(3, generator=g) for g in (shared, other, shared)]
    with again.again() as given:
        drawn = [torch.randn(3, generator=g) for g in given["generator"]]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_converged_steps_are_refused_before_anything_is_drawn() -> None:
    fast, steps = ditkit.accelerate(pipeline(), POLICY), []
    latents(fast, asked(callback_on_step_end=counting(steps)))
    with pytest.raises(ConfigError, match="converged_steps=20 without exact=True"):
        fast.report(converged_steps=20)
    with pytest.raises(ConfigError, match="converged_steps=0 should be at least 1"):
        fast.report(exact=True, converged_steps=0)
    assert len(steps) == STEPS
    sigmas = [1 - i / STEPS for i in range(STEPS)]
    latents(fast, asked(sigmas=sigmas, callback_on_step_end=counting(steps)))
    with pytest.raises(ConfigError, match="converged_steps=20: the call was asked for its own list"):
        fast.report(exact=True, converged_steps=20)
    assert len(steps) == 2 * STEPS


@pytest.mark.parametrize("policy", [POLICY, RAS(warmup=2), ConfidentTaylor(threshold=0.5)], ids=str)
def test_the_reported_errors_are_those_computed_by_hand(policy: Any) -> None:
    pipe = pipeline()
    fast = ditkit.accelerate(pipe, policy)

    def drawn(pipe: Any, **more: Any) -> Tensor:
        return torch.as_tensor(pipe(**asked(output_type="np", **more))[0])

    def psnr_db(x: Tensor) -> float:
        return -10 * math.log10((x - exact).double().square().mean())

    exact, ours = drawn(pipe), drawn(fast)
    cost, row = fast.report().cost, fast.report(exact=True).rows[1]
    assert row.psnr_db == pytest.approx(psnr_db(ours), rel=1e-3)
    assert row.control_psnr_db == pytest.approx(psnr_db(drawn(pipe, steps=row.control_steps)), rel=1e-3)
    full = cost.receipts[0].full("cond")
    assert row.full_evaluations == cost.full == len(full) < row.evaluations == STEPS


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
        (RAS, {"ratio": "0.5"}, "RAS: ratio='0.5' should be a number in .0, 1]"),
        (RAS, {"ratio": None}, "RAS: ratio=None should be a number in .0, 1]"),
        (RAS, {"high_ratio": True}, "RAS: high_ratio=True should be a number in .0, 1]"),
        (RAS, {"starvation": math.inf}, "RAS: starvation=inf should be at least 0 and finite"),
        (RAS, {"slope": 1.5}, "RAS: slope=1.5 should be an integer"),
        (RAS, {"slope": "1"}, "RAS: slope='1' should be an integer"),
        (RAS, {"resets": 12}, "RAS: resets=12 should be a tuple of integers"),
        (RAS, {"resets": [12, 22]}, r"RAS: resets=\[12, 22\] should be a tuple of integers"),
        (ConfidentTaylor, {"schedule": 5}, "ConfidentTaylor: schedule=5 should be a tuple of integers"),
        (ConfidentTaylor, {"schedule": [0, 3]}, r"schedule=\[0, 3\] should be a tuple of integers"),
    ],
    ids=str,
)
def test_fields_of_another_type_are_refused_in_one_line(policy: Any, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(**fields)


def test_a_call_that_draws_at_two_sizes_is_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a high-resolution fix does: the schedule begins again, and the latents are larger."""
    pipe, told = pixart()

    class Twice(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, height: int, width: int, **kwargs: Any) -> Any:
            super().__call__(*args, height=height, width=width, **kwargs)
            return super().__call__(*args, height=2 * height, width=2 * width, **kwargs)

    pipe.__class__, seen = Twice, set()
    laid_out = PipelineCall._layout

    def noted(self: PipelineCall, key: Any, net: Any, arguments: Any) -> Any:
        layout = laid_out(self, key, net, arguments)
        seen.add((tuple(arguments["hidden_states"].shape[2:]), layout[-1].grid.shape))
        return layout

    monkeypatch.setattr(PipelineCall, "_layout", noted)
    ditkit.accelerate(pipe, TaylorSeer(interval=2))(**told)
    assert len(seen) == 2
    assert all(grid == (1, rows // 2, columns // 2) for (rows, columns), grid in seen)
