"""Every family that has a view as a whole pipeline: exact where nothing is skipped, every evaluation in its place."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
import torch

import ditkit
from ditkit.caching import RAS
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.policy import Policy
from family_pipelines_support import (
    CLIP,
    FIRST,
    LATE,
    MASK,
    ONE_EACH,
    Heun,
    Make,
    clip_encoder,
    dit,
    dpm,
    draw,
    flux,
    lumina2,
    lumina_next,
    ready,
    sd3,
    sd3_control,
    two_experts,
    wan,
    wan_two_experts,
    wan_vae,
)
from pipelines_support import SIDE, computed, picture

STEPS, HEUN = {"call0": "0-2 4 7"}, {"call0": "0-2 4 7 10 13"}
LANES, HEUN_LANES = (dict.fromkeys(("cond", "uncond"), places) for places in ("0-2 4 7", "0-2 4 7 10 13"))
EXPERTS = {
    f"{expert}/{lane}": places
    for expert, places in (("transformer", "0-2 4"), ("transformer_2", "5-7 9 12 15"))
    for lane in LANES
}
"""The first of two experts has the timesteps above nine tenths."""
VIDEO = {"kind": diffusers.WanVideoToVideoPipeline, "parts": wan_vae}
FRAMES = {"kind": diffusers.WanImageToVideoPipeline, "in_channels": 36}
SEEN = {"text": 512, "parts": clip_encoder, "image_dim": 16, "added_kv_proj_dim": 24}

CASES: dict[str, tuple[Make, dict[str, str]]] = {
    "sd3": (sd3, STEPS),
    "sd3 heun": (partial(sd3, Heun), HEUN),
    "sd3 dpm++": (partial(sd3, dpm), STEPS),
    "sd3 unguided": (partial(sd3, told={"guidance_scale": 1.0}), STEPS),
    "sd3 skipped layers": (
        partial(sd3, told={"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.5}),
        {"call0": "0-2 4 7", "call1": "1-2"},
    ),
    "sd3 control": (
        partial(
            sd3,
            kind=diffusers.StableDiffusion3ControlNetPipeline,
            told={"control_image": picture()},
            parts=sd3_control,
        ),
        STEPS,
    ),
    "sd3 image": (
        partial(sd3, kind=diffusers.StableDiffusion3Img2ImgPipeline, told=LATE),
        {"call0": "2-4 6"},
    ),
    "sd3 image heun": (
        partial(sd3, Heun, diffusers.StableDiffusion3Img2ImgPipeline, LATE),
        {"call0": "4-6 8 11 14"},
    ),
    "sd3 inpainting": (
        partial(sd3, kind=diffusers.StableDiffusion3InpaintPipeline, told=LATE | {"mask_image": MASK}),
        {"call0": "2-4 6"},
    ),
    "sd3 told the mask": (
        partial(
            sd3,
            kind=diffusers.StableDiffusion3InpaintPipeline,
            told=LATE | {"mask_image": MASK},
            in_channels=33,
        ),
        {"call0": "2-4 6"},
    ),
    "dit": (dit, STEPS),
    "dit heun": (partial(dit, diffusers.HeunDiscreteScheduler), HEUN),
    "dit dpm++": (partial(dit, diffusers.DPMSolverMultistepScheduler), STEPS),
    "lumina2": (lumina2, STEPS | {"call1": "0-2 4 7"}),
    "lumina2 guided at first": (partial(lumina2, told={"cfg_trunc_ratio": 0.5}), STEPS | {"call1": "0-2"}),
    "lumina2 heun": (partial(lumina2, Heun), HEUN | {"call1": "0-2 4 7 10 13"}),
    "lumina-next": (lumina_next, STEPS),
    "lumina-next heun": (partial(lumina_next, Heun), HEUN),
    "lumina-next dpm++": (partial(lumina_next, dpm), STEPS),
    "lumina-next changes its rotary table": (partial(lumina_next, told={"scaling_watershed": 0.3}), STEPS),
    "lumina-next plain attention": (partial(lumina_next, told={"proportional_attn": False}), STEPS),
    "wan": (wan, LANES),
    "wan heun": (partial(wan, Heun), HEUN_LANES),
    "wan dpm++": (partial(wan, dpm), LANES),
    "wan time a token": (partial(wan, parts=lambda: {"expand_timesteps": True}), LANES),
    "wan two experts": (wan_two_experts, EXPERTS),
    "wan video": (
        partial(wan, told={"video": CLIP, "strength": 0.75}, **VIDEO),
        {"call0": "2-4 6", "call1": "2-4 6"},
    ),
    "wan first frame": (partial(wan, told={"image": FIRST}, **FRAMES, **SEEN), LANES),
    "wan first and last frame": (
        partial(wan, told={"image": FIRST, "last_image": FIRST}, pos_embed_seq_len=10, **FRAMES, **SEEN),
        LANES,
    ),
    "wan first frame, two experts": (
        partial(
            wan, told={"image": FIRST, "num_inference_steps": 16}, experts=2, parts=two_experts, **FRAMES
        ),
        EXPERTS,
    ),
    "flux": (flux, {"cond": "0-2 4 7"}),
    "flux context": (
        partial(
            flux,
            diffusers.FluxKontextPipeline,
            {"image": picture(), "max_area": SIDE**2, "_auto_resize": False},
        ),
        STEPS,
    ),
    "flux told the mask": (
        partial(
            flux,
            diffusers.FluxFillPipeline,
            {"image": picture(), "mask_image": MASK},
            in_channels=48,
            out_channels=16,
        ),
        STEPS,
    ),
    "flux control": (
        partial(
            flux,
            diffusers.FluxControlPipeline,
            {"control_image": picture()},
            in_channels=32,
            out_channels=16,
        ),
        STEPS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_exact_when_neutral_and_saves_by_default(case: str) -> None:
    make, receipt = CASES[case]
    pipe, told = ready(make)
    exact = draw(pipe, told)
    with ditkit.accelerate(pipe, TaylorSeer().exact()) as neutral:
        assert torch.equal(draw(neutral, told), exact)
        assert neutral.report().cost.full == neutral.report().cost.evaluations
    fast = ditkit.accelerate(pipe)
    assert not torch.equal(draw(fast, told), exact)
    assert computed(fast) == receipt


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize(
    "policy", [RAS(warmup=2), TaylorSeer(interval=4, order=2)], ids=["ras", "taylorseer"]
)
def test_policies_start_anew_and_are_exact_when_neutral(family: str, policy: Policy) -> None:
    pipe, told = ready(ONE_EACH[family])
    exact = draw(pipe, told)
    with ditkit.accelerate(pipe, policy.exact()) as neutral:
        assert torch.equal(draw(neutral, told), exact)
    fast = ditkit.accelerate(pipe, policy)
    first = draw(fast, told)
    assert not torch.equal(first, exact) and 0 < (first - exact).norm() < 0.5 * exact.norm()
    assert torch.equal(draw(fast, told), first)
    if isinstance(policy, RAS) and family != "wan":
        for lane in fast.report().cost.receipts[-1].as_dict()["lanes"].values():
            assert lane == {"computed": "0-1", "partial": "2-7"}
