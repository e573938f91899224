"""Policies on networks in bf16, of int8 layers, with LoRA, of compiled blocks, and all of that together.

At a standstill, with the same input in each evaluation, a policy has nothing to err about: a forecast is the value
itself, and rows that are left out already are what they would be. So it must give what the network gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import ditkit
import flux_support as fluxes
import hosts_support as hosts
from ditkit.attention import Grouped
from ditkit.caching import RAS, ConfidentTaylor, TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, Site
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.hosts.view import view
from pipelines_support import asked, computed, latents, pipeline, prompt
from rig import noise, tiny_dit

GRID = Grid(1, 4, 4)
POLICIES: dict[str, Policy] = {
    "taylorseer": TaylorSeer.small(GRID),
    "confident": ConfidentTaylor.small(GRID),
    "ras": RAS.small(GRID),
    "grouped": replace(Grouped.small(GRID), reach=9, warmup=2),  # so that each group sees all
}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


# --- networks and what is done to them ---------------------------------------------------------------------


class Subject(NamedTuple):
    """A model before its view, where it has one, and on one input the prediction that guidance would give."""

    model: nn.Module
    sites: Callable[[Any], tuple[Site, ...]]
    layout: Callable[[Any], tuple[Segment, ...]]
    call: Callable[[Any, Run, torch.dtype], Tensor]


def our_dit() -> Subject:
    def call(model: Any, run: Run, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(
                noise().to(dtype), torch.tensor([0.7, 0.4]), Cond(label=torch.tensor([0, 1])), run
            )
        return out

    model = tiny_dit()
    return Subject(model, lambda m: m.sites(), lambda m: m.layout(m.sample_shape), call)


def a_flux() -> Subject:
    inputs = fluxes.call_inputs()
    return Subject(
        fluxes.transformer(num_single_layers=2),
        flux.sites,
        lambda _: fluxes.LAYOUT,
        lambda model, run, dtype: fluxes.call(model, fluxes.in_type(inputs, dtype), run),
    )


def a_host(name: str) -> Subject:
    family = hosts.EVERY[name]
    inputs = family.inputs()

    def call(model: Any, run: Run, dtype: torch.dtype) -> Tensor:
        return hosts.call(model, hosts.in_type(inputs, dtype), run)[:, : hosts.C]

    return Subject(family.transformer(), hosts.sites_of, lambda model: hosts.layout_of(model, inputs), call)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "DiT": our_dit,
    "FLUX": a_flux,
    "SD3.5": lambda: a_host("sd3.5"),
    "diffusers' DiT": lambda: a_host("dit"),
    "Lumina 2": lambda: a_host("lumina2"),
    "Wan": lambda: a_host("wan one time"),
}


def in_int8(model: nn.Module) -> None:
    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def with_lora(model: nn.Module) -> None:
    torch.manual_seed(3)
    targets = ["qkv"] if hasattr(model, "label") else ["to_q", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)


GRAPHS: list[Any] = []


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch._dynamo.reset()
    GRAPHS.clear()


def backend(graph: Any, examples: Any) -> Any:
    GRAPHS.append(graph)
    return graph.forward


def compiled(model: Any) -> None:
    """Block by block; `fullgraph` makes every break in a graph an error."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        return
    held = next(name for name in ("layers", "blocks", "transformer_blocks") if hasattr(model, name))
    for block in getattr(model, held):
        block.compile(backend=backend, fullgraph=True)


STATES: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "bf16": (lambda model: model.to(torch.bfloat16),),
    "int8": (in_int8,),
    "lora": (with_lora,),
}


def standing_still(
    subject: Subject, policy: Policy | None, dtype: torch.dtype
) -> tuple[list[Tensor], Trajectory]:
    """Five evaluations of the same input, after guidance."""
    model, total = subject.model, 5
    trajectory = Trajectory(subject.sites(model), () if policy is None else (policy,), total)
    outs = []
    for i in range(total):
        now = Call(i, total, 0.7, layout=subject.layout(model))
        out = trajectory.leave(now, subject.call(model, trajectory.run(now), dtype))
        outs.append(trajectory.guided(now, out))
    return outs, trajectory


COMPUTED = {"taylorseer": "0-1 4", "confident": "0-1 4", "ras": "0-1", "grouped": "0-1"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_at_a_standstill_policies_give_what_the_network_gives(name: str, state: str) -> None:
    """Forecasts to the bit; rows, and attention in blocks, to the rounding of products of other shapes."""
    subject, dtype = SUBJECTS[name](), torch.bfloat16 if state == "bf16" else torch.float32
    plain = subject.call(subject.model, Run(), torch.float32)
    for change in STATES[state]:
        change(subject.model)
    exact = subject.call(subject.model, Run(), dtype)
    assert not torch.equal(exact, plain)
    if name != "DiT":
        view(subject.model)
    for kind, policy in POLICIES.items():
        outs, _ = standing_still(subject, policy.exact(), dtype)
        assert all(torch.equal(out, exact) for out in outs)
        outs, trajectory = standing_still(subject, policy, dtype)
        (receipt,) = trajectory.finish()
        assert receipt.as_dict()["lanes"]["cond"]["computed"] == COMPUTED[kind]
        if kind in ("ras", "grouped"):
            # int8 layers round their inputs, so that another order of summation may tip a value over
            rounds = state == "bf16" or (state, kind) == ("int8", "grouped")
            near = {"rtol": 0.05, "atol": 0.02} if rounds else {"rtol": 1e-4, "atol": 1e-5}
            scale = float(exact.abs().max())
            assert all(torch.allclose(out / scale, exact / scale, **near) for out in outs)
        else:
            assert all(torch.equal(out, exact) for out in outs)


@pytest.mark.parametrize("name", ["DiT", "SD3.5", "diffusers' DiT", "Wan"])
def test_compiled_blocks_are_as_good_and_compile_once_for_all(name: str) -> None:
    """Blocks of one kind share their graphs, and evaluations that are forecast need none."""
    policy, subject = POLICIES["taylorseer"], SUBJECTS[name]()
    if name != "DiT":
        view(subject.model)
    exact = subject.call(subject.model, Run(), torch.float32)
    compiled(subject.model)
    outs, _ = standing_still(subject, policy, torch.float32)
    assert all(torch.equal(out, exact) for out in outs)
    branches = {"DiT": 2, "SD3.5": 6, "diffusers' DiT": 2, "Wan": 3}
    assert 0 < len(GRAPHS) <= branches[name]


# --- pipelines ---------------------------------------------------------------------------------------------


def a_pipeline() -> Any:
    return pipeline(net=fluxes.transformer(num_single_layers=2))


ORDERED: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "int8": (in_int8,),
    "lora": (fluxes.with_lora,),
    "compiled": (compiled,),
    "all": (in_int8, fluxes.with_lora, compiled),
}


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        *((kind, state) for kind in POLICIES for state in ("int8", "lora")),
        ("taylorseer", "all"),
        ("confident", "compiled"),
        ("ras", "compiled"),
        ("grouped", "compiled"),
    ],
)
def test_before_and_after_accelerate(kind: str, state: str) -> None:
    """Two different prompts; what is compiled draws what is not, to the bit with a backend that changes nothing."""
    policy, options = POLICIES[kind], {"batch": 2, "steps": 6}
    changes = [change for change in ORDERED[state] if change is not compiled]
    pipe, eager = a_pipeline(), a_pipeline()
    for change in changes:
        change(eager.transformer)
    exact = latents(eager, asked(**options))
    fast = ditkit.accelerate(eager, policy)
    expected, receipt = latents(fast, asked(**options)), computed(fast)
    assert receipt["cond"].startswith("0-1") and not torch.equal(expected, exact)
    for change in ORDERED[state]:
        change(pipe.transformer)
    with ditkit.accelerate(pipe, policy.exact()) as neutral:
        assert torch.equal(latents(neutral, asked(**options)), exact)
    with ditkit.accelerate(pipe, policy) as fast:
        assert torch.equal(latents(fast, asked(**options)), expected)
        assert computed(fast) == receipt
    assert torch.equal(latents(pipe, asked(**options)), exact)
    late = ditkit.accelerate(a_pipeline(), policy)
    for change in ORDERED[state]:
        change(late.transformer)
    assert torch.equal(latents(late, asked(**options)), expected)
    assert computed(late) == receipt
    if compiled in ORDERED[state]:
        drawn = len(GRAPHS)
        latents(late, asked(1, **options))
        assert len(GRAPHS) == drawn, "a second call compiles nothing"


@policies
def test_lora_is_scaled_by_the_call(policy: Policy) -> None:
    plain, pipe = a_pipeline(), a_pipeline()
    fluxes.with_lora(pipe.transformer)

    def drawn(one: Any, scale: float) -> Tensor:
        return latents(one, asked(joint_attention_kwargs={"scale": scale}))

    with ditkit.accelerate(pipe, policy.exact()) as neutral:
        assert torch.equal(drawn(neutral, 0.5), drawn(pipe, 0.5))
    fast = ditkit.accelerate(pipe, policy)
    assert torch.allclose(drawn(fast, 0.0), latents(ditkit.accelerate(plain, policy), asked()), atol=1e-5)
    assert not torch.allclose(drawn(fast, 0.5), drawn(fast, 1.0), atol=1e-3)


@pytest.mark.parametrize("kind", POLICIES)
def test_prompts_of_a_batch_do_not_meet(kind: str) -> None:
    """Each is drawn as it would be alone; CG-Taylor decides for the batch, unless it is told not to."""
    policy = ConfidentTaylor(0.5, warmup=1, per_sample_gate=True) if kind == "confident" else POLICIES[kind]
    fast, both = ditkit.accelerate(a_pipeline(), policy), prompt(2)

    def drawn(*rows: int) -> Tensor:
        told = {name: tensor[list(rows)] for name, tensor in both.items()}
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return latents(fast, asked(**told, generator=generators))

    together = drawn(0, 1)
    assert torch.allclose(together, torch.cat([drawn(0), drawn(1)]), atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
