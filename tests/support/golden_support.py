"""Golden cases by file and name, the comparison with them, and the DiT that several files share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.policy import Policy
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.embeddings import sinusoid
from ditkit.sample.denoiser import GuidedDenoiser
from ditkit.sample.guidance import ClassifierFree
from ditkit.sample.solvers import Solver

FOLDER = Path(__file__).parents[1] / "golden"
EXACT = 1e-9
"""Relative, of float64; a case that says otherwise has its own."""
Case = dict[str, Any]


@contextmanager
def float64() -> Iterator[None]:
    """Make new parameters float64, so that weights are not rounded to float32 as they are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def read(system: str) -> dict[str, Case]:
    """Return the cases of a file by name; a name that comes again has its place in the file behind it."""
    cases = json.loads((FOLDER / f"{system}.json").read_text())["cases"]
    found: dict[str, Case] = {}
    for place, case in enumerate(cases):
        found[f"{case['name']} {place}" if case["name"] in found else case["name"]] = case
    assert len(found) == len(cases) > 0
    return found


def cases(
    system: str, chosen: Callable[[Case], Any] = lambda case: True, wrong: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """Parametrize `case` over the chosen cases of a file, those named in `wrong` as failures with their reason."""
    known = wrong or {}
    every = [case for case in read(system).values() if chosen(case)]
    assert every and known.keys() <= {case["name"] for case in every}
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case, id=case["name"], marks=failing(known[case["name"]]) if case["name"] in known else ()
            )
            for case in every
        ],
    )


def failing(reason: str) -> pytest.MarkDecorator:
    """Mark a case in which ditkit differs from the published code; that it agrees one day is a failure too."""
    return pytest.mark.xfail(strict=True, reason=reason)


def assert_golden(x: Tensor, expected: Mapping[str, Any], tolerance: float = EXACT) -> None:
    """Compare a tensor with its summary: relative to the value, or to the root mean square where that is more."""
    found = formula.summary(x)
    assert found["shape"] == expected["shape"]
    typical = expected["norm"] / sqrt(x.numel())
    assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert found["abs"] == pytest.approx(expected["abs"], rel=tolerance)
    assert found["sum"] == pytest.approx(expected["sum"], abs=tolerance * expected["abs"])
    picked = {place: x.flatten()[int(place)].item() for place in expected["at"]}
    assert picked == pytest.approx(expected["at"], rel=tolerance, abs=tolerance * typical)


def digest(numbers: Tensor) -> str:
    """Return the first 16 hex digits of the SHA-256 of whole numbers as little-endian int64."""
    return hashlib.sha256(numbers.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def assert_mask(mask: Tensor, expected: Mapping[str, Any]) -> None:
    """Compare a mask, bool [queries, keys], with its summary."""
    assert list(mask.shape) == expected["shape"]
    seen = mask.sum(1)
    assert {row: int(seen[int(row)]) for row in expected["keys_of_rows"]} == expected["keys_of_rows"]
    assert (int(seen.min()), int(seen.max())) == (expected["smallest_row"], expected["largest_row"])
    pairs = mask.flatten().nonzero().squeeze(1)
    assert (len(pairs), digest(pairs)) == (expected["pairs"], expected["pairs_sha256_16"])


@cache
def with_time(tolerance: float) -> float:
    """Return the tolerance of a network whose sinusoids of time are float32, as published.

    Their last bits are the processor's. Where they are not those of the processor that made the files, the networks
    here, which were made to react to time, multiply them to 5e-6 or less: a tenth of what is then allowed.
    """
    waves = sinusoid(torch.arange(1000), 256).view(torch.int32).long()
    return tolerance if digest(waves) == "db81a90f391573cd" else 5e-5


def adaln_shapes(constructor: Mapping[str, int], outs: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published DiT, or of the part that a VDT shares with it, but for its position tables.

    Args:
        outs: channels of the prediction, with the variance.
    """
    c = constructor
    width, side, hidden = c["hidden_size"], c["patch_size"], 4 * c["hidden_size"]
    layers = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (side * side * outs, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(c["depth"]):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (hidden, width),
            f"blocks.{i}.mlp.fc2": (width, hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, c["in_channels"], side, side),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (c["num_classes"] + 1, width),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def adaln_state(shapes: Mapping[str, Sequence[int]], final: float = 1.0) -> dict[str, Tensor]:
    """Return a published state dict, with time and modulation turned up so that the network reacts to the step."""
    state = formula.weights(shapes)
    state["t_embedder.mlp.2.weight"] *= 20
    state["final_layer.linear.weight"] *= final
    for name in state:
        if name.startswith("blocks.") and name.endswith("adaLN_modulation.1.weight"):
            state[name] *= 10
    return state


@cache
def dit() -> DiT:
    """Return the DiT of 3 blocks that the files 00, 12 and 16 run, in float64."""
    constructor = {
        "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "depth": 3, "num_heads": 4,
        "num_classes": 10,
    }  # fmt: skip
    for system in ("00-ddim-spacing", "12-taylorseer", "16-cg-taylor"):
        given = [case["constructor"] for case in read(system).values() if "constructor" in case]
        assert given and all(one == constructor for one in given)
    config = DiTConfig(size=8, patch=2, channels=4, width=48, depth=3, heads=4, classes=10, convention=DDPM)
    state = adaln_state(adaln_shapes(constructor, outs=8), final=0.3)
    with float64():
        return DiT.from_original({"pos_embed": torch.zeros(1, 16, 48), **state}, config).eval()


def approximate_likelihood(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute what published DiT code has in the place of the normal integral of `discretised_log_likelihood`."""

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    below, above = (
        cdf((data - mean + side / 255) * (-0.5 * log_variance).exp()).double() for side in (-1, 1)
    )
    inside = torch.where(data > 0.999, 1 - below, above - below)
    return torch.where(data < -0.999, above, inside).clamp_min(1e-12).log()


class GivenNoise:
    """Noise of each step by formula, in place of `SampleNoise`."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name, self.shape, self.drawn = name, tuple(shape), 0

    def draw(self, device: torch.device | str = "cpu") -> Tensor:
        self.drawn += 1
        return formula.tensor(f"{self.name}.step.{self.drawn}", self.shape)


class Watched:
    """A field that notes the state of each evaluation."""

    def __init__(self, field: GuidedDenoiser) -> None:
        self.field, self.path, self.states = field, field.path, []

    def __call__(self, x: Tensor, t: float) -> Any:
        self.states.append(x)
        return self.field(x, t)


@torch.no_grad()
def sampled(
    solver: Solver, steps: int, scale: float, start: str, policies: Sequence[Policy] = (), noise: str = ""
) -> tuple[list[Tensor], GuidedDenoiser]:
    """Sample the DiT of labels 1 and 4 as `DiT.forward_with_cfg` guides it: three channels of four.

    Returns:
        The state before each evaluation and at last, [2, 4, 8, 8], and the field that was called.
    """
    guidance = ClassifierFree(scale, channels=3)
    cond = Cond(label=torch.tensor([1, 4]))
    model = dit()
    trajectory = Trajectory(model.sites(), policies, solver.evaluations(steps))
    field = GuidedDenoiser(model, cond, guidance, trajectory, batched=True)
    shape = (2, 4, 8, 8)
    watched: Any = Watched(field)
    drawn: Any = GivenNoise(noise, shape)
    x = solver.solve(watched, formula.tensor(start, shape), steps, drawn)
    return [*watched.states, x], field
