"""Every family that has a view as a whole pipeline: exact where nothing is skipped, every evaluation in its place."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
import torch

import ditkit
from ditkit.caching import RAS
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import NoEffectError
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
    flux2,
    hunyuan_vae,
    hunyuan_video,
    latte,
    ltx,
    ltx_vae,
    lumina2,
    lumina_next,
    qwen_image,
    qwen_vae,
    ready,
    sd3,
    sd3_control,
    two_experts,
    wan,
    wan_two_experts,
    wan_vae,
)
from hosts_support import ROTARY, SIZED
from pipelines_support import SIDE, cogvideox, computed, picture, pixart, text

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
DPM = diffusers.CogVideoXDPMScheduler
VIDEO_9 = torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(2))
PICTURE = {
    "kind": diffusers.CogVideoXImageToVideoPipeline,
    "told": {"image": FIRST},
    "in_channels": 8,
    "out_channels": 4,
    **ROTARY,
}
LATER = {"kind": diffusers.CogVideoXVideoToVideoPipeline, "told": {"video": VIDEO_9, "strength": 0.75}}
CONTROL = {
    "kind": diffusers.CogVideoXFunControlPipeline,
    "told": {"control_video": VIDEO_9},
    "in_channels": 8,
    "out_channels": 4,
}
TWO_CLIPS = {
    name: text(i).repeat(2, 1, 1) for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
}
BOTH = {"cond_uncond": "0-2 4 7"}
"""CogVideoX names the context of its one call a step."""

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
    "cogvideox": (cogvideox, BOTH),
    "cogvideox dpm": (partial(cogvideox, DPM), BOTH),
    "cogvideox rotary": (partial(cogvideox, **ROTARY), BOTH),
    "cogvideox 1.5": (partial(cogvideox, patch_size_t=2, **ROTARY), BOTH),
    "cogvideox unguided": (partial(cogvideox, told={"guidance_scale": 1.0}), BOTH),
    "cogvideox guided by the step": (partial(cogvideox, DPM, told={"use_dynamic_cfg": True}), BOTH),
    "cogvideox two clips": (partial(cogvideox, told=TWO_CLIPS), BOTH),
    "cogvideox first frame": (partial(cogvideox, DPM, **PICTURE), BOTH),
    "cogvideox 1.5 first frame": (partial(cogvideox, DPM, patch_size_t=2, ofs_embed_dim=24, **PICTURE), BOTH),
    "cogvideox video": (partial(cogvideox, **LATER), {"cond_uncond": "2-4 6"}),
    "cogvideox video dpm": (partial(cogvideox, DPM, **LATER), {"cond_uncond": "2-4 6"}),
    "cogvideox control": (partial(cogvideox, **CONTROL), BOTH),
    "hunyuan-video": (hunyuan_video, {"cond": "0-2 4 7"}),
    "hunyuan-video heun": (partial(hunyuan_video, Heun), {"cond": "0-2 4 7 10 13"}),
    "hunyuan-video guided": (partial(hunyuan_video, told={"true_cfg_scale": 3.0}), LANES),
    "hunyuan-video first frame": (
        partial(
            hunyuan_video,
            kind=diffusers.HunyuanVideoImageToVideoPipeline,
            told={"image": FIRST, "true_cfg_scale": 3.0},
            parts=hunyuan_vae,
            image_condition_type="token_replace",
        ),
        {"call0": "0-2 4 7", "call1": "0-2 4 7"},
    ),
    "hunyuan-video first frame beside the latents": (
        partial(
            hunyuan_video,
            kind=diffusers.HunyuanVideoImageToVideoPipeline,
            told={"image": FIRST},
            parts=hunyuan_vae,
            in_channels=33,
            image_condition_type="latent_concat",
        ),
        STEPS,
    ),
    "qwen-image": (qwen_image, LANES),
    "qwen-image heun": (partial(qwen_image, Heun), HEUN_LANES),
    "qwen-image unguided": (partial(qwen_image, told={"true_cfg_scale": 1.0}), {"cond": "0-2 4 7"}),
    "qwen-image image": (
        partial(
            qwen_image,
            kind=diffusers.QwenImageImg2ImgPipeline,
            told={"image": torch.rand(1, 3, 64, 64), "strength": 0.75},
            parts=qwen_vae,
        ),
        dict.fromkeys(("cond", "uncond"), "2-4 6"),
    ),
    "qwen-image inpainting": (
        partial(
            qwen_image,
            kind=diffusers.QwenImageInpaintPipeline,
            told={
                "image": torch.rand(1, 3, 64, 64),
                "mask_image": torch.ones(1, 1, 64, 64).tril(),
                "strength": 0.75,
            },
            parts=qwen_vae,
        ),
        dict.fromkeys(("cond", "uncond"), "2-4 6"),
    ),
    "latte": (latte, STEPS),
    "latte heun": (partial(latte, diffusers.HeunDiscreteScheduler), HEUN),
    "latte unguided": (partial(latte, told={"guidance_scale": 1.0}), STEPS),
    "latte of frames": (partial(latte, told={"enable_temporal_attentions": False}), STEPS),
    "ltx": (ltx, BOTH),
    "ltx heun": (partial(ltx, Heun), {"cond_uncond": "0-2 4 7 10 13"}),
    "ltx unguided": (partial(ltx, told={"guidance_scale": 1.0}), BOTH),
    "ltx rescaled guidance": (partial(ltx, told={"guidance_rescale": 0.5}), BOTH),
    "ltx first frame": (
        partial(ltx, kind=diffusers.LTXImageToVideoPipeline, told={"image": FIRST}, parts=ltx_vae),
        BOTH,
    ),
    "flux2": (flux2, STEPS),
    "flux2 heun": (partial(flux2, scheduler=Heun), HEUN),
    "flux2 klein": (
        partial(
            flux2,
            diffusers.Flux2KleinPipeline,
            {"negative_prompt_embeds": torch.zeros(1, 5, 20), "guidance_scale": 3.0},
            guidance_embeds=False,
        ),
        LANES,
    ),
    "pixart": (pixart, STEPS),
    "pixart sigma": (partial(pixart, kind=diffusers.PixArtSigmaPipeline), STEPS),
    "pixart at 1024": (partial(pixart, **SIZED | {"sample_size": 128}), STEPS),
    "pixart unguided": (partial(pixart, told={"guidance_scale": 1.0}), STEPS),
    "pixart without variance": (partial(pixart, out_channels=4), STEPS),
    "pixart two pictures": (partial(pixart, told={"num_images_per_prompt": 2}), STEPS),
    "pixart heun": (partial(pixart, diffusers.HeunDiscreteScheduler), HEUN),
    "pixart sigma ddim": (partial(pixart, diffusers.DDIMScheduler, diffusers.PixArtSigmaPipeline), STEPS),
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
    assert torch.equal(draw(ditkit.restore(fast), told), exact)


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize(
    "policy", [RAS(warmup=2), TaylorSeer(interval=4, order=2)], ids=["ras", "taylorseer"]
)
def test_policies_start_anew_and_are_exact_when_neutral(family: str, policy: Policy) -> None:
    pipe, told = ready(ONE_EACH[family])
    if family == "latte" and isinstance(policy, RAS):
        with pytest.raises(NoEffectError, match="no site that it can use"):
            ditkit.accelerate(pipe, policy)
        return
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
