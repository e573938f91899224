"""TaylorSeer on a small FLUX, diffusers' network in our view, against Shenyi-Z/TaylorSeer's own network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import formula
from ditkit.caching import TaylorSeer
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.hosts.view import view
from golden_support import Case, assert_golden, cases, float64, read, with_time

SYSTEM = "12-taylorseer-flux"
IN_FLOAT32 = with_time(1e-6)
"""Rotary and time tables are float32."""
GRID, TEXT, WIDTH = Grid(1, 4, 6), 7, 32
LAYOUT = (Segment("text", Grid(TEXT), TEXT), Segment("image", GRID, GRID.length))
DOUBLE = {
    "{}_mod.lin": "{norm}.linear", "{}_attn.proj": "attn.{out}",
    "{}_mlp.0": "{ff}.net.0.proj", "{}_mlp.2": "{ff}.net.2",
}  # fmt: skip
OF_STREAM = {
    "img": {"norm": "norm1", "out": "to_out.0", "ff": "ff"},
    "txt": {"norm": "norm1_context", "out": "to_add_out", "ff": "ff_context"},
}
QKV = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
NORMS = {"img": ("norm_q", "norm_k"), "txt": ("norm_added_q", "norm_added_k")}
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}


def published(constructor: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights under the published names."""
    c = constructor
    width, head = c["hidden_size"], c["hidden_size"] // c["num_heads"]
    hidden = int(width * c["mlp_ratio"])
    layers: dict[str, tuple[int, ...]] = {
        "img_in": (width, c["in_channels"]),
        "txt_in": (width, c["context_in_dim"]),
        "final_layer.linear": (c["out_channels"], width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for name, wide in (("time_in", 256), ("vector_in", c["vec_in_dim"]), ("guidance_in", 256)):
        layers |= {f"{name}.in_layer": (width, wide), f"{name}.out_layer": (width, width)}
    scales = []
    for i in range(c["depth"]):
        for at in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            layers |= {f"{at}_mod.lin": (6 * width, width), f"{at}_attn.qkv": (3 * width, width)}
            layers |= {f"{at}_attn.proj": (width, width)}
            layers |= {f"{at}_mlp.0": (hidden, width), f"{at}_mlp.2": (width, hidden)}
            scales += [f"{at}_attn.norm.{x}_norm.scale" for x in ("query", "key")]
    for i in range(c["depth_single_blocks"]):
        at = f"single_blocks.{i}"
        layers |= {f"{at}.linear1": (3 * width + hidden, width), f"{at}.linear2": (width, width + hidden)}
        layers |= {f"{at}.modulation.lin": (3 * width, width)}
        scales += [f"{at}.norm.{x}_norm.scale" for x in ("query", "key")]
    state = {name: 1 + formula.weight(name, (head,)) for name in scales}
    for name, shape in layers.items():
        state |= {
            f"{name}.{kind}": formula.weight(f"{name}.{kind}", size)
            for kind, size in (("weight", shape), ("bias", shape[:1]))
        }
        if name.endswith("mod.lin") or name.endswith("modulation.lin"):
            state[f"{name}.weight"] *= 5
    state["time_in.out_layer.weight"] *= 10
    return state


def of_diffusers(state: dict[str, Tensor], constructor: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the published weights under diffusers' names; its own converter knows FLUX's sizes only."""
    width, found = constructor["hidden_size"], {}
    for kind in ("weight", "bias"):
        plain = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
        for theirs, ours in EMBEDDERS.items():
            for layer, at in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
                plain[f"{theirs}.{layer}"] = f"time_text_embed.{ours}.{at}"
        for i in range(constructor["depth"]):
            for stream, words in OF_STREAM.items():
                for theirs, ours in DOUBLE.items():
                    plain[f"double_blocks.{i}.{theirs.format(stream)}"] = (
                        f"transformer_blocks.{i}.{ours.format(**words)}"
                    )
                parts = state[f"double_blocks.{i}.{stream}_attn.qkv.{kind}"].chunk(3)
                for part, ours in zip(parts, QKV[stream], strict=True):
                    found[f"transformer_blocks.{i}.attn.{ours}.{kind}"] = part
        for i in range(constructor["depth_single_blocks"]):
            theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
            plain |= {
                f"{theirs}.modulation.lin": f"{ours}.norm.linear",
                f"{theirs}.linear2": f"{ours}.proj_out",
            }
            parts = state[f"{theirs}.linear1.{kind}"].tensor_split((width, 2 * width, 3 * width))
            for part, layer in zip(parts, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), strict=True):
                found[f"{ours}.{layer}.{kind}"] = part
        found |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for theirs, ours in plain.items()}
        shift, scale = state[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        found[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    for i in range(constructor["depth"]):
        for stream, names in NORMS.items():
            for theirs, ours in zip(("query", "key"), names, strict=True):
                at = f"double_blocks.{i}.{stream}_attn.norm.{theirs}_norm.scale"
                found[f"transformer_blocks.{i}.attn.{ours}.weight"] = state[at]
    for i in range(constructor["depth_single_blocks"]):
        for theirs, ours in zip(("query", "key"), NORMS["img"], strict=True):
            at = f"single_blocks.{i}.norm.{theirs}_norm.scale"
            found[f"single_transformer_blocks.{i}.attn.{ours}.weight"] = state[at]
    return found


@cache
def transformer() -> Any:
    c = next(iter(read(SYSTEM).values()))["constructor"]
    with float64():
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=c["in_channels"],
            num_layers=c["depth"],
            num_single_layers=c["depth_single_blocks"],
            attention_head_dim=c["hidden_size"] // c["num_heads"],
            num_attention_heads=c["num_heads"],
            joint_attention_dim=c["context_in_dim"],
            pooled_projection_dim=c["vec_in_dim"],
            guidance_embeds=c["guidance_embed"],
            axes_dims_rope=tuple(c["axes_dim"]),
        )
    model.load_state_dict(of_diffusers(published(c), c))
    return view(model.eval())


@torch.no_grad()
def latents(policy: TaylorSeer, steps: int) -> tuple[list[Tensor], Trajectory]:
    """Take Euler steps over t = 1 - i / steps; the latents after 0, 1, 2 ... evaluations."""
    model = transformer()
    trajectory = Trajectory(flux.sites(model), [policy], steps)
    states = [formula.tensor("flux.x", (1, GRID.length, 16))]
    inputs = {
        "encoder_hidden_states": formula.tensor("flux.txt", (1, TEXT, 32)),
        "pooled_projections": formula.tensor("flux.y", (1, 24)),
        "img_ids": torch.cat([torch.zeros(GRID.length, 1), GRID.coordinates()[:, 1:]], 1),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((1,), 3.5, dtype=torch.float64),
        "return_dict": False,
    }
    for i in range(steps):
        now = Call(i, steps, 1 - i / steps, layout=LAYOUT)
        t = torch.full((1,), now.t, dtype=torch.float64)
        with flux.running(trajectory.run(now)):
            v = model(hidden_states=states[-1], timestep=t, **inputs)[0]
        states.append(states[-1] - trajectory.guided(now, trajectory.leave(now, v)) / steps)
    return states, trajectory


@cases(SYSTEM)
def test_latents(case: Case) -> None:
    steps, interval, order, warmup = map(int, re.findall(r"(?:[TNO]=|warm-up )(\d+)", case["name"]))
    states, trajectory = latents(TaylorSeer(interval, order, warmup), steps)
    (receipt,) = trajectory.finish()
    assert receipt.full("cond") == case["results"]["full_evaluations"]
    for count, expected in case["results"]["latent_after_evaluations"].items():
        assert_golden(states[int(count)], expected, IN_FLOAT32)
