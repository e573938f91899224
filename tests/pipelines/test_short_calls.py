"""Calls that are too short for their policy, and classes that a pipeline does not have (found.md, cases 16 and 19)."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import ditkit
from ditkit.core.errors import ConfigError, NoEffectError
from ditkit.core.spec import brief
from ditkit.pipelines.accelerate import DEFAULT
from family_pipelines_support import dit
from pipelines_support import IMAGE_TO_IMAGE, POLICY, asked, latents, pipeline

LATE = {**IMAGE_TO_IMAGE[FluxImg2ImgPipeline], "steps": 12, "strength": 0.16}
"""Two of twelve steps."""
SHORT = {
    **{f"{steps} steps": (FluxPipeline, {"steps": steps}, steps) for steps in (1, 2, 3)},
    "strength": (FluxImg2ImgPipeline, LATE, 2),
}


@pytest.mark.parametrize("case", SHORT)
def test_found_16_the_default_computes_all_of_a_short_call_and_says_so(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, told, left = SHORT[case]
    pipe = pipeline(kind)
    exact = latents(pipe, asked(**told))
    fast = ditkit.accelerate(pipe)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(latents(fast, asked(**told)), exact)
    assert f"{left} evaluations are too few for {brief(DEFAULT)}: all are computed" in caplog.text
    latents(fast, asked(steps=8) if kind is FluxPipeline else asked(**{**LATE, "strength": 0.9}))
    assert fast.report().cost.receipts[0].policy == DEFAULT and fast.report().cost.receipts[0].saved


@pytest.mark.parametrize("case", ["2 steps", "strength"])
def test_found_16_a_policy_that_was_named_refuses_before_it_draws(case: str) -> None:
    kind, told, left = SHORT[case]
    steps: list[int] = []

    def count(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    for policy in (POLICY, DEFAULT):
        fast = ditkit.accelerate(pipeline(kind), policy)
        said = rf"would have saved nothing: all {left} evaluations|forecasts none of total={left} evaluations"
        with pytest.raises((NoEffectError, ConfigError), match=said):
            latents(fast, asked(**told, callback_on_step_end=count))
    assert not steps


@pytest.mark.parametrize("label", [1001, -1])
def test_found_19_a_class_out_of_range_is_refused_by_number(label: int) -> None:
    pipe, told = dit()
    pipe.set_progress_bar_config(disable=True)
    fast = ditkit.accelerate(pipe)
    with pytest.raises(ConfigError, match=f"class_labels {label}, expected whole numbers from 0 to 999"):
        fast(**{**told, "class_labels": [1, label]}, num_inference_steps=8)
