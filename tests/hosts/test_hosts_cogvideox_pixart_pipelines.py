"""Whole pipelines of CogVideoX and PixArt: exact where nothing is skipped, every evaluation in its place."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.caching import RAS, ConfidentTaylor
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.policy import Policy
from ditkit.pipelines.accelerate import DEFAULT
from family_pipelines_support import FIRST, Make, draw, ready
from hosts_support import ROTARY, SIZED
from pipelines_support import Options, cogvideox, computed, lanes, pixart, text

DPM = diffusers.CogVideoXDPMScheduler
VIDEO = torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(2))
PICTURE: Options = {
    "kind": diffusers.CogVideoXImageToVideoPipeline,
    "told": {"image": FIRST},
    "in_channels": 8,
    "out_channels": 4,
    **ROTARY,
}
LATE: Options = {
    "kind": diffusers.CogVideoXVideoToVideoPipeline,
    "told": {"video": VIDEO, "strength": 0.75},
}
CONTROL: Options = {
    "kind": diffusers.CogVideoXFunControlPipeline,
    "told": {"control_video": VIDEO},
    "in_channels": 8,
    "out_channels": 4,
}
ALL, SOME = "0-2 5", "2-4 7"

CASES: dict[str, tuple[Make, str]] = {
    "cogvideox": (cogvideox, ALL),
    "cogvideox dpm": (partial(cogvideox, DPM), ALL),
    "cogvideox rotary": (partial(cogvideox, **ROTARY), ALL),
    "cogvideox 1.5": (partial(cogvideox, patch_size_t=2, **ROTARY), ALL),
    "cogvideox unguided": (partial(cogvideox, told={"guidance_scale": 1.0}), ALL),
    "cogvideox guided by the step": (partial(cogvideox, DPM, told={"use_dynamic_cfg": True}), ALL),
    "cogvideox two clips": (
        partial(
            cogvideox,
            told={
                name: text(i).repeat(2, 1, 1)
                for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
            },
        ),
        ALL,
    ),
    "cogvideox first frame": (partial(cogvideox, DPM, **PICTURE), ALL),
    "cogvideox 1.5 first frame": (partial(cogvideox, DPM, patch_size_t=2, ofs_embed_dim=24, **PICTURE), ALL),
    "cogvideox video": (partial(cogvideox, **LATE), SOME),
    "cogvideox video dpm": (partial(cogvideox, DPM, **LATE), SOME),
    "cogvideox control": (partial(cogvideox, **CONTROL), ALL),
    "pixart": (pixart, ALL),
    "pixart sigma": (partial(pixart, kind=diffusers.PixArtSigmaPipeline), ALL),
    "pixart at 1024": (partial(pixart, **SIZED | {"sample_size": 128}), ALL),
    "pixart unguided": (partial(pixart, told={"guidance_scale": 1.0}), ALL),
    "pixart without variance": (partial(pixart, out_channels=4), ALL),
    "pixart two pictures": (partial(pixart, told={"num_images_per_prompt": 2}), ALL),
    "pixart heun": (partial(pixart, diffusers.HeunDiscreteScheduler), "0-2 5 8 11 14"),
    "pixart sigma ddim": (
        partial(pixart, diffusers.DDIMScheduler, diffusers.PixArtSigmaPipeline),
        ALL,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_pipeline_is_exact_when_neutral_and_each_evaluation_in_its_place(case: str) -> None:
    make, places = CASES[case]
    pipe, told = ready(make)
    exact = draw(pipe, told)
    with ditkit.accelerate(pipe, TaylorSeer().exact()) as neutral:
        assert torch.equal(draw(neutral, told), exact)
        assert neutral.report().cost.full == neutral.report().cost.evaluations
    fast = ditkit.accelerate(pipe, TaylorSeer(interval=3, order=1, warmup=3))
    assert not torch.equal(draw(fast, told), exact)
    # CogVideoX names the context of its one call a step, PixArt does not
    assert computed(fast) == {"cond_uncond" if case.startswith("cogvideox") else "call0": places}
    assert torch.equal(draw(ditkit.restore(fast), told), exact)


ONE_EACH: dict[str, Make] = {"cogvideox": partial(cogvideox, patch_size_t=2, **ROTARY), "pixart": pixart}
each = pytest.mark.parametrize("name", ONE_EACH)


@each
@pytest.mark.parametrize(
    ("policy", "receipt"),
    [
        (TaylorSeer(interval=4, order=2), {"computed": "0-1 5", "forecast": "2-4 6-7"}),
        (ConfidentTaylor(schedule=(0, 1, 2, 5)), {"computed": "0-2 5", "forecast": "3-4 6-7"}),
        (RAS(warmup=2), {"computed": "0-1", "partial": "2-7"}),
    ],
    ids=["taylorseer", "cg-taylor", "ras"],
)
def test_policies_start_anew_and_are_exact_when_neutral(
    name: str, policy: Policy, receipt: dict[str, str]
) -> None:
    pipe, told = ready(ONE_EACH[name])
    exact = draw(pipe, told)
    with ditkit.accelerate(pipe, policy.exact()) as neutral:
        assert torch.equal(draw(neutral, told), exact)
    fast = ditkit.accelerate(pipe, policy)
    first = draw(fast, told)
    assert 0 < (first - exact).norm() < 0.3 * exact.norm()
    assert list(lanes(fast).values()) == [receipt]
    assert torch.equal(draw(fast, told), first)


@each
def test_the_default_saves(name: str) -> None:
    pipe, told = ready(ONE_EACH[name])
    exact, fast = draw(pipe, told), ditkit.accelerate(pipe)
    assert 0 < (draw(fast, told) - exact).norm() < 0.1 * exact.norm()
    assert fast.report().cost.full == len(DEFAULT.full_steps(8)) < 8


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


@each
def test_a_row_policy_is_refused_where_no_keys_can_be_kept(name: str) -> None:
    pipe, _ = ready(ONE_EACH[name])
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ConflictError, match=r"RAS: transformer_blocks\.0\.attn1 attends by Fused"):
        ditkit.accelerate(pipe, RAS())


@each
def test_an_accelerated_pipeline_is_saved_as_diffusers_own(name: str, tmp_path: Path) -> None:
    pipe, _ = ready(ONE_EACH[name])
    files = []
    for folder, one in ((tmp_path / "own", pipe), (tmp_path / "fast", ditkit.accelerate(pipe))):
        one.save_pretrained(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files.append({path.relative_to(folder): path.read_bytes() for path in paths})
    assert files[0] == files[1] and Path("transformer/config.json") in files[0]


@each
@pytest.mark.parametrize("how", ["models", "groups"])
def test_an_offloaded_pipeline_draws_the_same(name: str, how: str) -> None:
    drawn = []
    for kind in ("none", how):
        pipe, told = ready(ONE_EACH[name])
        if kind == "models":
            pipe.enable_model_cpu_offload(device="cpu")
        elif kind == "groups":
            pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        with ditkit.accelerate(pipe) as fast:
            drawn.append(draw(fast, told))
    assert torch.equal(*drawn)


@each
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
