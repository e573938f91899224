"""DDIM of DiT's published scripts, "50" and "ddim50", against the numbers that they gave."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.ddpm import DiscretePath
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig
from ditkit.sample import ClassifierFree, Ddim, SampleNoise
from ditkit.sample.denoiser import GuidedDenoiser
from golden_support import with_time

GOLDEN = Path(__file__).parents[1] / "golden" / "00-ddim-spacing.json"
TABLES, *RUNS = json.loads(GOLDEN.read_text())["cases"]
TABLES = TABLES["results"]
WIDTH, DEPTH = 48, 3


@pytest.mark.parametrize("name", TABLES)
def test_spacings_and_tables(name: str) -> None:
    spacing, steps = ("strided" if "ddim" in name else "even"), int(name.removeprefix("ddim"))
    path, expected = DiscretePath.linear(), TABLES[name]
    times = Ddim(spacing).times(path, steps)  # type: ignore[arg-type]
    assert times.tolist() == [*reversed(expected["timesteps"]), -1]
    kept = path.respaced(times[:-1].flip(0).long())
    assert kept.abar[[0, -1]].tolist() == pytest.approx(expected["alpha_bar_first_and_last"], rel=1e-12)
    assert kept.abar.sum().item() == pytest.approx(expected["alpha_bar_sum"], rel=1e-12)
    assert kept.beta[-1].item() == pytest.approx(expected["beta_last"], rel=1e-12)


def wave(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """The tensor that the golden numbers call by `name`: a sine of its elements' index, in float64."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(12.9898 * index + crc32(name.encode()) % 1000)).reshape(shape)


def published_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (WIDTH, 4, 2, 2),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (32, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
    state = {"pos_embed": torch.zeros(1, 16, WIDTH)}
    table = "y_embedder.embedding_table.weight"
    for name, shape in [*((f"{n}.weight", s) for n, s in shapes.items()), (table, (11, WIDTH))]:
        state[name] = wave(name, shape, sqrt(shape[0] / torch.Size(shape).numel()))
    for name, shape in shapes.items():
        state[f"{name}.bias"] = wave(f"{name}.bias", shape[:1], 0.1)
    state["t_embedder.mlp.2.weight"] *= 20
    state["final_layer.linear.weight"] *= 0.3
    for i in range(DEPTH):
        state[f"blocks.{i}.adaLN_modulation.1.weight"] *= 10
    return state


@pytest.fixture(scope="module")
def model() -> DiT:
    config = DiTConfig(
        size=8, patch=2, channels=4, width=WIDTH, depth=DEPTH, heads=4, classes=10, convention=DDPM
    )
    torch.set_default_dtype(torch.float64)  # else weights are rounded as they are loaded
    try:
        return DiT.from_original(published_state(), config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("case", RUNS, ids=lambda case: case["name"])
def test_trajectories(model: DiT, case: dict[str, Any]) -> None:
    solver = Ddim("strided" if "ddim50" in case["name"] else "even")
    guidance = ClassifierFree(4.0, channels=3)
    field = GuidedDenoiser(
        model, Cond(label=torch.tensor([1, 4])), guidance, Trajectory(model.sites(), (), 50)
    )
    stepper = solver.begin(field.path, solver.times(field.path, 50), SampleNoise([0], (1,)))
    x, states = wave("dd.z", (2, 4, 8, 8), 1.0), []
    while (t := stepper.t) is not None:
        x = stepper.step(x, field(x, t))
        states.append(x)
    for step, expected in case["results"].items():
        found = states[int(step.split()[-1]) - 1].flatten()
        typical = expected["norm"] / sqrt(len(found))
        close = with_time(1e-9)
        picked = {index: found[int(index)].item() for index in expected["at"]}
        assert found.norm().item() == pytest.approx(expected["norm"], rel=close)
        assert found.sum().item() == pytest.approx(expected["sum"], abs=close * expected["abs"])
        assert picked == pytest.approx(expected["at"], rel=close, abs=close * typical)
