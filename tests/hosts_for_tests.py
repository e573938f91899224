"""Small random transformers of diffusers with patches of latents, their inputs, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import Tensor

from ditkit.core.grid import Segment
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Call, Run
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import dit, sd3
from ditkit.hosts.view import running
from policies_for_tests import Tap

B, C, S, D, DEPTH, HEADS, PATCH, CLASSES = 2, 4, 7, 64, 3, 4, 2, 10
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One kind of transformer: its class with a small config, and the view that it gets."""

    host: Any
    view: ModuleType
    config: dict[str, Any]
    size: tuple[int, int]
    draw: Callable[[torch.Generator], Inputs]
    text: tuple[int, ...] = field(default=())

    def transformer(self, **changed: Any) -> Any:
        """Always the same weights."""
        torch.manual_seed(0)
        return self.host(**{**self.config, **changed}).eval()

    def inputs(self) -> Inputs:
        draw = torch.Generator().manual_seed(1)
        return {"hidden_states": torch.randn(B, C, *self.size, generator=draw), **self.draw(draw)}

    def layout(self, model: Any) -> tuple[Segment, ...]:
        layout: tuple[Segment, ...] = self.view.layout(model, (B, C, *self.size), *self.text)
        return layout


def sd3_inputs(draw: torch.Generator) -> Inputs:
    return {
        "encoder_hidden_states": torch.randn(B, S, 32, generator=draw),
        "pooled_projections": torch.randn(B, 24, generator=draw),
        "timestep": torch.tensor([700.0, 300.0]),
    }


def dit_inputs(draw: torch.Generator) -> Inputs:
    return {"timestep": torch.tensor([700, 300]), "class_labels": torch.tensor([3, CLASSES])}


SHARED = {"num_layers": DEPTH, "num_attention_heads": HEADS, "attention_head_dim": D // HEADS}
SD3 = {
    **SHARED,
    "sample_size": 16,
    "patch_size": PATCH,
    "in_channels": C,
    "out_channels": C,
    "joint_attention_dim": 32,
    "caption_projection_dim": D,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
DUAL = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
DIT = {**SHARED, "sample_size": 8, "patch_size": PATCH, "in_channels": C, "out_channels": 2 * C}

FAMILIES = {
    "sd3": Family(SD3Transformer2DModel, sd3, SD3, (8, 12), sd3_inputs, (S,)),
    "sd3.5": Family(SD3Transformer2DModel, sd3, SD3 | DUAL, (8, 12), sd3_inputs, (S,)),
    "dit": Family(DiTTransformer2DModel, dit, DIT | {"num_embeds_ada_norm": CLASSES}, (8, 8), dit_inputs),
}


families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_sd3 = pytest.mark.parametrize("family", [FAMILIES["sd3"], FAMILIES["sd3.5"]], ids=["sd3", "sd3.5"])


@torch.no_grad()
def call(model: Any, inputs: Inputs, run: Run = DIRECT, **changed: Any) -> Tensor:
    with running(run):
        return model(**{**inputs, **changed}, return_dict=False)[0]


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}


def tapped(family: Family, model: Any) -> tuple[Run, dict[str, Any]]:
    """A run that passes through a handler at every site, and what it meets."""
    sites = family.view.sites(model)
    tap = Tap(tuple(site.name for site in sites))
    return Trajectory(sites, [tap], 1).run(Call(0, 1, 1.0)), tap.seen


def run_steps(
    family: Family, model: Any, inputs: Inputs, policies: Sequence[Policy], steps: int = 8, **given: Any
) -> tuple[Tensor, Trajectory]:
    """Euler from noise to data."""
    trajectory = Trajectory(family.view.sites(model), policies, steps)
    x = inputs["hidden_states"]
    for i in range(steps):
        now = Call(i, steps, 1 - i / steps, layout=family.layout(model))
        t = torch.full((B,), 1000 * now.t, dtype=inputs["timestep"].dtype)
        v = call(model, inputs, trajectory.run(now), hidden_states=x, timestep=t, **given)
        x = x - trajectory.guided(now, trajectory.leave(now, v[:, :C])) / steps
    return x, trajectory


def residuals(count: int, rows: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [0.1 * torch.randn(B, rows, D, generator=draw) for _ in range(count)]


def with_ip_adapter(model: Any, scale: float = 0.7) -> Any:
    torch.manual_seed(4)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(D, D, D // 4, 32, scale=scale).eval())
    model.image_proj = IPAdapterTimeImageProjection(20, D, 32, 1, 16, 2, 4, timestep_in_dim=16).eval()
    return model


def pictures() -> Inputs:
    picture = torch.randn(B, 5, 20, generator=torch.Generator().manual_seed(2))
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": picture}}
