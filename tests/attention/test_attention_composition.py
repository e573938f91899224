"""Re-ttention and CLEAR where they skip most blocks: FLUX of int8 layers, with LoRA, of compiled blocks; and on Wan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention_reshaped_models import Explicit
from test_composition import GRAPHS, a_pipeline, compiled, in_int8
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import ditkit
import flux_support as fluxes
import hosts_support as hosts
from ditkit.attention import Neighbourhood, Reshaped
from ditkit.attention.pattern import Pattern
from ditkit.core.grid import Grid
from ditkit.core.policy import Policy
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.hosts.view import view
from patterns_support import Masked, band_meets, circle_meets
from pipelines_support import asked, latents

GRID, STEPS = Grid(1, 12, 12), 6
BAND = Reshaped(keep=0.1, block=8, warmup=1, every=3, kernel="cpu")
CIRCLE = Neighbourhood(radius=2, block=8, kernel="cpu")
POOLED = replace(CIRCLE, pooled=2)
PATTERNS: dict[str, tuple[Pattern, Policy, str]] = {
    "reshaped": (BAND, Explicit(band_meets(BAND, GRID), BAND), "2-3 5"),
    "circle": (CIRCLE, Masked(circle_meets(CIRCLE)), "0-5"),
    "circle with pooled keys": (POOLED, replace(POOLED, kernel="reference"), "0-5"),
}
"""Each with the slow way to the same, over all pairs, and with the evaluations that skip."""
kinds = pytest.mark.parametrize("kind", PATTERNS)


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch._dynamo.reset()
    GRAPHS.clear()


def a_flux(*changes: Callable[[Any], Any], dtype: torch.dtype = torch.float64) -> Any:
    model = fluxes.transformer(num_single_layers=2).to(dtype)
    for change in changes:
        change(model)
    return view(model)


def drawn(model: Any, *policies: Policy, nudge: float = 0.0) -> tuple[Tensor, Trajectory]:
    """Euler from noise to data, of 144 tokens and 7 rows of text; the noise is larger by a share of `nudge`."""
    draw = torch.Generator().manual_seed(4)
    x = (1 + nudge) * torch.randn(fluxes.B, GRID.length, 16, generator=draw).to(model.dtype)
    ids = torch.cat([torch.zeros(GRID.length, 1), GRID.coordinates()[:, 1:]], 1)
    inputs = fluxes.in_type({**fluxes.call_inputs(), "img_ids": ids}, model.dtype)
    trajectory = Trajectory(flux.sites(model), policies, STEPS)
    for i in range(STEPS):
        now = Call(i, STEPS, 1 - i / STEPS, layout=flux.layout(ids, inputs["txt_ids"]))
        t = torch.full((fluxes.B,), now.t).to(x)
        v = fluxes.call(model, inputs, trajectory.run(now), hidden_states=x, timestep=t)
        x = x - trajectory.guided(now, trajectory.leave(now, v)) / STEPS
    return x, trajectory


def skipped(told: dict[str, Any], evaluations: str) -> bool:
    """Whether a receipt says that these evaluations left out most of dense attention's blocks."""
    return (
        told["visited"] < 0.6 and told["kernel"] == "cpu" and told["lanes"]["cond"]["sparse"] == evaluations
    )


def receipt(trajectory: Trajectory) -> dict[str, Any]:
    (one,) = trajectory.finish()
    return one.as_dict()


def in_int8_weights(model: Any) -> None:
    quantize_(model, Int8WeightOnlyConfig())


@kinds
@pytest.mark.parametrize("change", [in_int8_weights, in_int8])
def test_int8_layers_under_the_pattern_are_those_under_the_mask(
    kind: str, change: Callable[[Any], None]
) -> None:
    """Where inputs are rounded too, as near as when the noise is off by a millionth: either tips values over."""
    pattern, twin, evaluations = PATTERNS[kind]
    model = a_flux(change, dtype=torch.float32)
    expected, _ = drawn(model, twin)
    found, trajectory = drawn(model, pattern)
    assert skipped(receipt(trajectory), evaluations)
    error = fluxes.relative(found, expected)
    if change is in_int8:
        nudged, _ = drawn(model, twin, nudge=1e-6)
        assert error < 2 * fluxes.relative(nudged, expected) < 4e-3
    else:
        assert error < 1e-6
        assert fluxes.relative(drawn(model)[0], expected) > 1e-3
        assert fluxes.relative(drawn(a_flux(dtype=torch.float32), pattern)[0], expected) > 1e-3


@kinds
def test_lora_under_the_pattern_is_its_fused_weights_under_the_mask(kind: str) -> None:
    pattern, twin, evaluations = PATTERNS[kind]
    fused = a_flux(fluxes.with_lora, lambda model: model.fuse_lora())
    expected, _ = drawn(fused, twin)
    found, trajectory = drawn(a_flux(fluxes.with_lora), pattern)
    assert skipped(receipt(trajectory), evaluations)
    assert fluxes.relative(found, expected) < 1e-12
    assert fluxes.relative(drawn(fused)[0], expected) > 1e-3
    assert fluxes.relative(drawn(a_flux(), pattern)[0], expected) > 1e-3


@kinds
def test_compiled_blocks_give_what_eager_ones_give(kind: str) -> None:
    """To the bit, with a backend that changes nothing and refuses breaks; a second trajectory compiles nothing."""
    pattern, _, evaluations = PATTERNS[kind]
    expected, _ = drawn(a_flux(), pattern)
    model = a_flux(compiled)
    found, trajectory = drawn(model, pattern)
    assert torch.equal(found, expected) and skipped(receipt(trajectory), evaluations)
    graphs = len(GRAPHS)
    assert graphs and torch.equal(drawn(model, pattern)[0], expected) and len(GRAPHS) == graphs


@kinds
def test_all_of_it_in_a_pipeline(kind: str) -> None:
    """Int8 layers with LoRA: compiled or not, changed before `accelerate` or after it, the same bits."""
    pattern, _, evaluations = PATTERNS[kind]
    options = {"batch": 2, "steps": STEPS, "side": 48}
    eager, before, after = a_pipeline(), a_pipeline(), a_pipeline()
    late = ditkit.accelerate(after, pattern)
    for pipe in (eager, before, after):
        in_int8(pipe.transformer)
        fluxes.with_lora(pipe.transformer)
    for pipe in (before, after):
        compiled(pipe.transformer)
    exact = latents(eager, asked(**options))
    expected = latents(ditkit.accelerate(eager, pattern), asked(**options))
    assert fluxes.relative(expected, exact) > 1e-3
    for fast in (ditkit.accelerate(before, pattern), late):
        assert torch.equal(latents(fast, asked(**options)), expected)
        assert skipped(fast.report().cost.receipts[-1].as_dict(), evaluations)


@pytest.mark.parametrize("times", [(), (60,)], ids=["time", "time a token"])
def test_reshaped_wan_is_that_of_the_equations(times: tuple[int, ...]) -> None:
    """A clip of 2 x 5 x 6 tokens, which blocks of 8 do not divide; text is only looked at."""
    case = replace(hosts.of_wan(hosts.wan_inputs(times=times)), shape=(3, hosts.C, 2, 10, 12))
    twin = Explicit(band_meets(BAND, Grid(2, 5, 6)), BAND)
    runs = [
        hosts.run_steps(case, view(case.transformer()), case.inputs(), policies)
        for policies in ([BAND], [twin], [])
    ]
    (found, trajectory), (expected, _), (dense, _) = runs
    assert skipped(receipt(trajectory), "2-3 5-6")
    assert fluxes.relative(found, expected) < 1e-6 and fluxes.relative(dense, expected) > 1e-3
