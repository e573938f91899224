"""CogVideoX: clips whose channels follow their frames, and a scheduler that remembers its last prediction."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.caching import RAS
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.pipelines.accelerate import DEFAULT
from family_pipelines_support import ONE_EACH, draw, ready
from hosts_support import ROTARY
from pipelines_support import Options, cogvideox, pixart

DPM = diffusers.CogVideoXDPMScheduler


def test_rows_are_left_out_by_the_spread_of_channels_not_of_frames() -> None:
    """What RAS keeps of the last prediction is kept bit for bit, in the place where the clip has it."""
    pipe, told = ready(partial(cogvideox, **ROTARY))
    seen: list[Tensor] = []

    class Scheduler(diffusers.CogVideoXDDIMScheduler):  # type: ignore[misc]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
            seen.append(model_output)
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config)
    draw(ditkit.accelerate(pipe, RAS(warmup=1)), told, num_inference_steps=2)
    same = (seen[0] == seen[1]).all(2)  # [B, T, H, W]: a row is all channels of a patch
    patches = same.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).movedim(3, -2).flatten(-2)
    assert torch.equal(patches.all(-1), patches.any(-1))
    assert patches.all(-1).sum() == sum(RAS().ends(9))


def test_the_scheduler_of_two_predictions_keeps_its_signature() -> None:
    """CogVideoX's pipelines ask for its class; its step takes the last clean prediction and an earlier time."""
    pipe, told = ready(partial(cogvideox, DPM))
    signature, met = inspect.signature(pipe.scheduler.step), []

    def look(pipe: Any, step: int, t: Any, given: Options) -> Options:
        met.append((isinstance(pipe.scheduler, DPM), inspect.signature(pipe.scheduler.step) == signature))
        return given

    draw(ditkit.accelerate(pipe), told, callback_on_step_end=look)
    assert met == [(True, True)] * 8


@pytest.mark.parametrize("name", ["cogvideox", "pixart"])
def test_a_row_policy_is_refused_where_no_keys_can_be_kept(name: str) -> None:
    pipe, _ = ready(ONE_EACH[name])
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ConflictError, match=r"RAS: transformer_blocks\.0\.attn1 attends by Fused"):
        ditkit.accelerate(pipe, RAS())


@pytest.mark.parametrize("name", ["cogvideox", "pixart"])
def test_the_report_measures_the_error(name: str) -> None:
    pipe, told = ready(ONE_EACH[name])
    told["output_type"] = "pt"
    exact, fast = draw(pipe, told), ditkit.accelerate(pipe)
    error = (draw(fast, told) - exact).double().square().mean()
    report = fast.report(exact=True)
    row = report.rows[1]
    assert report.compared == "pictures"
    assert row.psnr_db == pytest.approx(float(-10 * error.log10()), rel=1e-3)
    assert row.full_evaluations == len(DEFAULT.full_steps(8)) < row.evaluations and row.macs_ratio < 0.9
    assert row.control_steps is not None and row.control_psnr_db is not None


def test_a_transformer_without_a_view_is_told_of_all_that_have_one() -> None:
    net = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, norm_num_groups=2
    )
    pipe, _ = ready(pixart)
    pipe.register_modules(transformer=net)
    with pytest.raises(ConfigError, match=r"CogVideoXTransformer3DModel.*PixArtTransformer2DModel"):
        ditkit.accelerate(pipe)
