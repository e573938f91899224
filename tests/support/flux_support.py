"""A small random FLUX transformer of diffusers, its inputs, and calls of it under policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Call, Run
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from policies_support import Tap

B, ROWS, COLUMNS, S, D = 2, 4, 6, 7, 64
L = ROWS * COLUMNS
DOUBLE, SINGLE = 2, 3
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": DOUBLE,
    "num_single_layers": SINGLE,
    "attention_head_dim": 16,
    "num_attention_heads": D // 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
LORA = {"r": 2, "target_modules": ["to_q", "linear", "proj_out"], "init_lora_weights": False}
Inputs = dict[str, Any]


def transformer(**changed: Any) -> Any:
    """Always the same weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**CONFIG, **changed}).eval()


def call_inputs() -> Inputs:
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(B, L, 16, generator=draw),
        "encoder_hidden_states": torch.randn(B, S, 32, generator=draw),
        "pooled_projections": torch.randn(B, 24, generator=draw),
        "timestep": torch.full((B,), 0.7),
        "img_ids": torch.cat([torch.zeros(L, 1), Grid(1, ROWS, COLUMNS).coordinates()[:, 1:]], 1),
        "txt_ids": torch.zeros(S, 3),
        "guidance": torch.full((B,), 3.5),
    }


@torch.no_grad()
def call(model: Any, inputs: Inputs, run: Run = DIRECT, **changed: Any) -> Tensor:
    with flux.running(run):
        return model(**{**inputs, **changed}, return_dict=False)[0]


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: v if name.endswith("_ids") else v.to(dtype) for name, v in inputs.items()}


def controls(count: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(B, L, D, generator=draw) for _ in range(count)]


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(**LORA))
    return model


LAYOUT = (Segment("text", Grid(S), S), Segment("image", Grid(1, ROWS, COLUMNS), L))


def at(index: int, total: int) -> Call:
    return Call(index, total, 1 - index / total, layout=LAYOUT)


def run_steps(
    model: Any, inputs: Inputs, policies: Sequence[Policy], steps: int = 8, **given: Any
) -> tuple[Tensor, Trajectory]:
    """Euler from noise to data."""
    trajectory = Trajectory(flux.sites(model), policies, steps)
    x = inputs["hidden_states"]
    for i in range(steps):
        now = at(i, steps)
        t = torch.full((B,), now.t, dtype=x.dtype)
        v = call(model, inputs, trajectory.run(now), hidden_states=x, timestep=t, **given)
        x = x - trajectory.guided(now, trajectory.leave(now, v)) / steps
    return x, trajectory


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


def visited(model: Any, inputs: Inputs) -> set[str]:
    """The sites that a call goes through."""
    sites = flux.sites(model)
    tap = Tap(tuple(site.name for site in sites))
    call(model, inputs, Trajectory(sites, [tap], 1).run(at(0, 1)))
    return set(tap.seen)
