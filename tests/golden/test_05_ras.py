"""RAS against microsoft/RAS: the rows that it chooses, and a small SD3 under it."""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatch
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

import formula
from ditkit.caching import RAS
from ditkit.caching.regional import Regions
from ditkit.core.grid import Grid, Segment, Tokens, patchify, unpatchify
from ditkit.core.run import Call, Site
from ditkit.core.trajectory import Trajectory
from ditkit.pipelines.accelerate import accelerate
from golden_support import Case, assert_golden, cases

SYSTEM = "05-ras"
IN_FLOAT32, OF_NETWORKS = 1e-6, 1e-4
PART = (Site("tokens", "tokens"), Site("core", "core"), Site("head", "head"))
PATCH = 2


NUMBERS = {"ratio": "ratio ", "high": "high ", "steps": "T=", "slope": "slope ", "end": r"\d\.\."}
"""What stands before each number of a case's name."""


def policy_of(case: Case) -> tuple[RAS, int]:
    """Return the policy of a case by its name, and the steps."""
    name = case["name"]
    given = {word: re.search(rf"{before}([\d.]+)", name) for word, before in NUMBERS.items()}
    number = {word: float(match[1]) for word, match in given.items() if match}
    resets = re.findall(r"\d+", re.findall(r"resets \[(.*)\]", name)[0])
    policy = RAS(
        number["ratio"],
        warmup=4,
        end=int(number.get("end", number["steps"])),
        reset_every=0,
        resets=tuple(map(int, resets)),
        metric="l2" if ", l2norm," in name else "std",
        high_ratio=number["high"],
        slope=int(number.get("slope", 0)),
        span=4,
    )
    return policy, int(number["steps"])


def through(trajectory: Trajectory, call: Call, v: Tensor) -> Tensor:
    """Pass a velocity [1, C, H, W] through the sites of a network that gives just that; rows left out become 0."""
    run = trajectory.run(call)
    tokens = run.site("tokens", lambda: Tokens(patchify(v, PATCH)))
    heads = tokens.x[:, None]
    run.site("core", lambda q, k, v: q, heads, heads, heads)
    rows = run.site("head", lambda x: x, tokens.x)
    grid = call.layout[0].grid
    # patches have their channels first here, and last at the other end
    return trajectory.leave(call, unpatchify(rows.unflatten(-1, (-1, PATCH**2)).mT.flatten(-2), grid, PATCH))


def described(rows: Tensor | None) -> dict[str, object] | None:
    """Return what a golden file keeps of the rows that are computed; none for all."""
    if rows is None:
        return None
    numbers = rows.tolist()
    text = ",".join(map(str, numbers))
    return {
        "number": len(numbers),
        "sha256_16": hashlib.sha256(text.encode()).hexdigest()[:16],
        "first": numbers[:5],
    }


def stepped(case: Case) -> tuple[list[dict[str, object] | None], Tensor, list[float]]:
    """Return the rows computed at each step, the last latent and the noise levels."""
    policy, steps = policy_of(case)
    names, shape = next(iter(case["inputs"].items()))
    prefix = names.split(".")[0]
    x, base = (formula.spread(f"{prefix}.{name}", shape).float() for name in ("x", "base"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    grid = Grid.of(tuple(shape[2:]), PATCH)
    trajectory = Trajectory(PART, [policy], steps)
    (session,) = trajectory.sessions
    assert isinstance(session, Regions)
    active = []
    for i in range(steps):
        call = Call(i, steps, 1 - i / steps, layout=(Segment("image", grid, grid.length),))
        active.append(described(None if session.choice is None else session.choice.rows[0]))
        v = base + 0.7 * formula.spread(f"{prefix}.v.{i}", shape).float()
        v = trajectory.guided(call, through(trajectory, call, v))
        x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
    return active, x, scheduler.sigmas.tolist()


STALE = "chosen rows, std, ratio 0.5, high 0.3, T=28, 32x32 latents, steps 4..20, resets [12]"
ENDS = (
    "where RAS ends early, the published code runs the step after it on the rows of the last one (finding G)"
)


@cases(SYSTEM, lambda case: "chosen" in case["name"], {STALE: ENDS})
def test_rows_and_latents(case: Case) -> None:
    policy, steps = policy_of(case)
    active, x, sigmas = stepped(case)
    expected = case["results"]
    assert sigmas == pytest.approx(expected["sigmas"], abs=1e-7)
    rows = (x.shape[-1] // PATCH) ** 2
    assert policy.skipped(steps, rows) == expected["skipped_tokens_by_step"]
    assert active == expected["active_rows_by_step"]
    assert_golden(x, expected["final"], IN_FLOAT32)


@cache
def transformer() -> Any:
    net = SD3Transformer2DModel(
        sample_size=32, patch_size=PATCH, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=40,
    )  # fmt: skip
    state = net.state_dict()
    for name, value in state.items():
        if name == "pos_embed.pos_embed":
            continue
        weight = formula.weight(name, value.shape)
        if name == "time_text_embed.timestep_embedder.linear_2.weight":
            weight *= 10
        if name == "proj_out.weight":
            weight += 0.2 * formula.spread("proj_out.spread", value.shape)
        if fnmatch(name, "*.to_*weight"):
            weight += 0.15 * formula.spread(f"{name}.spread", value.shape)
        state[name] = weight.float()
    net.load_state_dict(state)
    return net.eval()


def drawn(pipe: Any) -> Tensor:
    shapes = {
        "text": (1, 7, 20),
        "notext": (1, 7, 20),
        "pooled": (1, 24),
        "nopooled": (1, 24),
        "z": (1, 4, 32, 32),
    }
    given = {name: formula.spread(f"sd3a.{name}", shape).float() for name, shape in shapes.items()}
    return pipe(
        prompt_embeds=given["text"],
        negative_prompt_embeds=given["notext"],
        pooled_prompt_embeds=given["pooled"],
        negative_pooled_prompt_embeds=given["nopooled"],
        latents=given["z"],
        height=32,
        width=32,
        num_inference_steps=20,
        guidance_scale=5.0,
        output_type="latent",
    ).images


@cases(SYSTEM, lambda case: "pipeline" in case["name"])
def test_a_small_sd3(case: Case) -> None:
    policy, steps = policy_of(case)
    assert steps == 20
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), layers_per_block=1).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer(), scheduler, vae, *[None] * 6)
    pipe.set_progress_bar_config(disable=True)
    dense = drawn(pipe)
    assert_golden(dense, case["results"]["dense"], OF_NETWORKS)
    with accelerate(pipe, policy) as fast:
        partly = drawn(fast)
    assert_golden(partly, case["results"]["ras"], OF_NETWORKS)
    off = (partly - dense).norm() / dense.norm()
    assert off.item() == pytest.approx(case["results"]["relative_difference"], rel=1e-3)
