"""Schedulers of diffusers as solvers, on a Gaussian mixture whose prediction at any (x, t) is known in closed form."""

from __future__ import annotations

import diffusers
import pytest
import torch
from test_mixture import assert_same_moments, draw, model_of

from ditkit.core.errors import ConfigError
from ditkit.sample import Ddim, DiffusersScheduler, Euler

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
UNCLIPPED = {**BETAS, "clip_sample": False}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "path", "steps", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", "linear", 100, {"shift": 1.0}),
        ("FlowMatchEulerDiscreteScheduler", "linear", 100, {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", "linear", 50, {}),
        ("DPMSolverMultistepScheduler", "linear", 50, FLOW),
        ("UniPCMultistepScheduler", "linear", 50, FLOW),
        ("DDIMScheduler", "ddpm", 100, UNCLIPPED),
        ("DDIMScheduler", "ddpm", 100, {**UNCLIPPED, "prediction_type": "v_prediction"}),
        ("DDPMScheduler", "ddpm", 500, {**UNCLIPPED, "prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", "ddpm", 50, BETAS),
        ("DPMSolverMultistepScheduler", "ddpm", 100, {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", "ddpm", 50, BETAS),
        ("EulerDiscreteScheduler", "ddpm", 100, {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerAncestralDiscreteScheduler", "ddpm", 500, TRAILING),
        ("HeunDiscreteScheduler", "ddpm", 50, TRAILING),
        ("PNDMScheduler", "ddpm", 50, BETAS),
    ],
)
def test_diffusers_schedulers_reproduce_the_moments(
    name: str, path: str, steps: int, config: dict[str, object]
) -> None:
    """Order-1 stochastic schedulers take more steps, so that their bias is below the statistical error."""
    model = model_of(path)
    solver = DiffusersScheduler(getattr(diffusers, name)(**config))
    assert_same_moments(model, draw(model, solver, steps))


def test_flow_match_euler_is_our_euler() -> None:
    """With num_train_timesteps equal to the steps, the scheduler's lowest sigma is 1 / steps: even times."""
    model = model_of("linear", 500)
    theirs = DiffusersScheduler(diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=1.0))
    torch.testing.assert_close(theirs.times(model.path, 50), Euler().times(model.path, 50), rtol=0, atol=1e-7)
    torch.testing.assert_close(draw(model, theirs, 50), draw(model, Euler(), 50), rtol=0, atol=2e-6)


def test_diffusers_ddim_is_ours() -> None:
    """With leading spacing, offset 0 and alpha = 1 after the last step, the timesteps are 980, 960 ... 0.

    The scheduler works in float32 and divides by alpha, which bounds what can be asked of the comparison.
    """
    model = model_of("ddpm", 500)
    config = {**UNCLIPPED, "timestep_spacing": "leading", "set_alpha_to_one": True, "steps_offset": 0}
    theirs = DiffusersScheduler(diffusers.DDIMScheduler(**config))
    times = theirs.times(model.path, 50)
    assert torch.equal(times, Ddim().times(model.path, 50))
    ours = draw(model, Ddim(), 50)
    rounding = torch.finfo(torch.float32).eps * ours.abs().max() / model.path.at(times[:1]).alpha
    torch.testing.assert_close(draw(model, theirs, 50), ours, rtol=0, atol=rounding.item())


@pytest.mark.parametrize(
    ("path", "scheduler", "message"),
    [
        ("cosine", diffusers.FlowMatchEulerDiscreteScheduler(), "linear path, not Cosine"),
        ("linear", diffusers.DDIMScheduler(), "discrete path, not Linear"),
        ("ddpm", diffusers.DDIMScheduler(beta_schedule="scaled_linear"), "betas are not the model's"),
        ("ddpm", diffusers.DDPMScheduler(variance_type="learned_range"), "learns no variance"),
        ("ddpm", diffusers.EulerDiscreteScheduler(**BETAS, prediction_type="sample"), "whole timesteps only"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(path: str, scheduler: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(model_of(path, 10), DiffusersScheduler(scheduler), steps=8)


def test_what_is_no_scheduler_is_refused() -> None:
    with pytest.raises(ConfigError, match="str is not a scheduler"):
        DiffusersScheduler("euler")
    with pytest.raises(ConfigError, match="needs mu"):
        DiffusersScheduler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
