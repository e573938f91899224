"""What `ditkit.accelerate` costs where it skips nothing: a pipeline under a neutral policy against diffusers' own.

    python benchmarks/host_overhead.py

Random weights, all drawing in turns; a ratio is the median over the rounds of the ratio of two calls, of their wall
clocks and of the processor's time, which other programs on a busy machine lengthen less. `same` says that both drew
the same to the bit. Gates: cpu_ratio <= 1.02 where a step takes at least 50 ms, same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import diffusers
import torch
import tyro
from torch import Tensor

import ditkit
from common import record, show
from ditkit.bench.timing import alternated
from ditkit.caching import RAS, TaylorSeer
from skipped_step import ratio

WIDTH, HEADS, ROWS = 512, 8, 32
NEUTRAL = (TaylorSeer().exact(), RAS().exact())


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        layers: of each transformer. pixels: of a side of a picture; clips have half as many.
        steps: of a call. rounds: calls of each kind. threads: of torch.
    """

    layers: int = 6
    pixels: int = 192
    steps: int = 4
    rounds: int = 9
    threads: int = 1


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    rows = [row for family, make in PIPELINES.items() for row in measure(family, make, arguments)]
    show("Nothing skipped", rows)
    record("host_overhead", rows)


def measure(family: str, make: Make, arguments: Arguments) -> list[dict[str, object]]:
    """One row a policy."""
    torch.manual_seed(0)
    pipe, told = make(arguments)
    twin = pipe.from_pipe(pipe, transformer=deepcopy(pipe.transformer))
    kinds = {"plain": pipe, **{type(p).__name__: ditkit.accelerate(twin, p) for p in NEUTRAL}}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    drawn: dict[str, Tensor] = {}

    def draw(name: str) -> None:
        start, generator = time.process_time(), torch.Generator().manual_seed(0)
        options = {"num_inference_steps": arguments.steps, "generator": generator, "output_type": "latent"}
        drawn[name] = kinds[name](**told, **options)[0]
        cpu[name].append(time.process_time() - start)

    for one in (pipe, twin):
        one.set_progress_bar_config(disable=True)
    wall = alternated({name: partial(draw, name) for name in kinds}, arguments.rounds, warmup=1)
    step_ms = 1e3 * median(cpu["plain"]) / arguments.steps
    return [
        {
            "family": family,
            "policy": name,
            "step_ms": step_ms,
            "ratio": ratio(wall[name], wall["plain"]),
            "cpu_ratio": ratio(cpu[name][1:], cpu["plain"][1:]),
            "same": torch.equal(drawn[name], drawn["plain"]),
        }
        for name in kinds
        if name != "plain"
    ]


def flux(arguments: Arguments) -> tuple[Any, dict[str, Any]]:
    net = diffusers.FluxTransformer2DModel(
        num_layers=arguments.layers // 3,
        num_single_layers=arguments.layers - arguments.layers // 3,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(16, 24, 24),
    )
    pipe = diffusers.FluxPipeline(euler(), *[None] * 5, net)
    return pipe, {**text("prompt_embeds"), **pooled("pooled_prompt_embeds"), **picture(arguments)}


def sd3(arguments: Arguments) -> tuple[Any, dict[str, Any]]:
    net = diffusers.SD3Transformer2DModel(
        num_layers=arguments.layers,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    )
    pipe = diffusers.StableDiffusion3Pipeline(net, euler(), *[None] * 7)
    told = {**text("prompt_embeds"), **pooled("pooled_prompt_embeds"), **picture(arguments)}
    return pipe, {**told, "guidance_scale": 1.0}


def lumina2(arguments: Arguments) -> tuple[Any, dict[str, Any]]:
    net = diffusers.Lumina2Transformer2DModel(
        hidden_size=WIDTH,
        num_layers=arguments.layers,
        num_attention_heads=HEADS,
        num_kv_heads=HEADS // 2,
        axes_dim_rope=(16, 24, 24),
        cap_feat_dim=WIDTH,
    )
    pipe = diffusers.Lumina2Pipeline(net, euler(), None, None, None)
    known = {"prompt_attention_mask": torch.ones(1, ROWS).bool()}
    return pipe, {**text("prompt_embeds"), **known, **picture(arguments), "guidance_scale": 1.0}


def wan(arguments: Arguments) -> tuple[Any, dict[str, Any]]:
    """Two lanes a step."""
    net = diffusers.WanTransformer3DModel(
        num_layers=arguments.layers,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        text_dim=WIDTH,
        ffn_dim=4 * WIDTH,
    )
    pipe = diffusers.WanPipeline(None, None, None, euler(), net)
    side = arguments.pixels // 2
    told = text("prompt_embeds") | text("negative_prompt_embeds")
    return pipe, {**told, "height": side, "width": side, "num_frames": 5}


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def text(name: str) -> dict[str, Tensor]:
    return {name: torch.randn(1, ROWS, WIDTH)}


def pooled(name: str) -> dict[str, Tensor]:
    return {name: torch.randn(1, WIDTH)}


def picture(arguments: Arguments) -> dict[str, Any]:
    return {"height": arguments.pixels, "width": arguments.pixels}


Make = Callable[[Arguments], tuple[Any, dict[str, Any]]]
PIPELINES: dict[str, Make] = {"flux": flux, "sd3": sd3, "lumina2": lumina2, "wan": wan}


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
