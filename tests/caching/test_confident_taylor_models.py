"""CG-Taylor on models: what it skips there, what it keeps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.caching import ConfidentTaylor, TaylorSeer
from ditkit.cli.main import main
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.model import Denoiser
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Site
from ditkit.core.spec import component, spec
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.models.dit import DiT
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.sample import ClassifierFree, sample
from flux_support import B, D, L, S, call_inputs, controls, in_type, relative, run_steps, transformer
from models_support import CLASSES, save_tiny
from policies_support import Gate
from rig import BRANCH, STEPS, TINY, call_at, evaluate, noise, tiny_dit
from rig import sample as sample_lanes
from sampling_support import batches


def awake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


CLIP: dict[str, Any] = {"frames": 4, "size": (4, 8), "patch": 2, "width": 24, "depth": 4, "heads": 2}


def a_dit() -> Denoiser:
    return awake(DiT(replace(TINY, depth=4)))


def a_vdt(**changes: Any) -> Denoiser:
    return awake(VDT(VDTConfig(**CLIP, channels=3, classes=4, convention=Convention(), **changes)))


def a_video_dit(**changes: Any) -> Denoiser:
    return awake(VideoDiT(VideoDiTConfig(**CLIP, channels=3, classes=4, **changes)))


MODELS: Mapping[str, Callable[[], Denoiser]] = {
    "DiT": a_dit,
    "VDT": a_vdt,
    "VDT concat": lambda: a_vdt(conditioning="concat"),
    "VDT cross": lambda: a_vdt(conditioning="cross"),
    "VideoDiT": a_video_dit,
    "VideoDiT text": lambda: a_video_dit(text_width=5, text_tokens=3),
}


def told(model: Denoiser) -> Cond:
    """Two samples; where the model takes them, a first frame that is given and a text with padding."""
    cond = Cond(label=torch.tensor([1, 3]))
    if isinstance(model, DiT):
        return cond
    C, T, H, W = model.sample_shape
    mask = (torch.arange(T) > 0).float().view(1, 1, T, 1, 1).expand(2, 1, T, H, W)
    cond = replace(cond, context=torch.zeros(2, C, T, H, W), mask=mask)
    if isinstance(model, VideoDiT) and model.text:
        valid = torch.tensor([[True, True, False], [True, True, True]])
        cond = replace(cond, text=torch.randn(2, 3, 5), text_mask=valid)
    return cond


@pytest.mark.parametrize("batched", [False, True], ids=["two calls", "one call"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_skips_most_and_stays_near(name, batched):
    model = MODELS[name]()
    cond = told(model)

    def drawn(*policies: Policy) -> Any:
        return sample(
            model, cond, [5, 6], steps=14, guidance=ClassifierFree(2.0), policies=policies, batched=batched
        )

    exact = drawn().samples
    assert torch.equal(drawn(ConfidentTaylor().exact()).samples, exact)
    taylor, reuse = (drawn(ConfidentTaylor(0.1, 1, order)) for order in (1, 0))
    (receipt,) = taylor.receipts
    lanes = receipt.as_dict()["lanes"]
    assert lanes.keys() == ({"cond+uncond"} if batched else {"cond", "uncond"})
    assert all(
        done["computed"].startswith("0-2") and done["computed"].endswith("13") for done in lanes.values()
    )
    assert receipt.saved >= 7 * len(lanes)
    errors = [float((got.samples - exact).norm() / exact.norm()) for got in (taylor, reuse)]
    assert 0 < errors[0] < errors[1] / 3


def test_a_stack_that_is_cut_and_run_whole_gives_the_same_bits():
    """A gate that never opens, so that every evaluation goes through the cut."""
    model, trajectory = tiny_dit(), Trajectory(tiny_dit().sites(), [ConfidentTaylor(1e-30)], STEPS)
    x = noise()
    with torch.no_grad():
        for index in range(STEPS):
            x = x - evaluate(model, trajectory, x, call_at(model, index)) / STEPS
    assert torch.equal(x, sample_lanes(model)["cond"])
    with pytest.raises(NoEffectError, match="saved nothing: all 12 evaluations were full"):
        trajectory.finish()


@pytest.mark.parametrize("policy", [ConfidentTaylor(), ConfidentTaylor(0.02, decider="each")], ids=str)
def test_the_receipt_tells_what_ran(policy):
    model = tiny_dit()
    with batches(model.blocks[0]) as first, batches(model.blocks[2]) as last:
        result = sample(
            model,
            Cond(label=torch.arange(2)),
            [0, 1],
            steps=20,
            policies=[policy],
            guidance=ClassifierFree(2.0),
        )
    (receipt,) = result.receipts
    assert receipt.sites == {"blocks"} and receipt.calls == 40
    assert receipt.saved == 40 - len(last) > 20
    assert len(first) == (40 if policy.decider == "each" else 20 + len(last) // 2)
    assert receipt.as_dict()["lanes"]["cond"].keys() == {"computed", "forecast"}


def test_with_a_gate_a_sample_a_batch_draws_what_single_runs_draw():
    model, labels = tiny_dit(), torch.tensor([0, 3])

    def drawn(rows: slice, policy: ConfidentTaylor) -> Tensor:
        seeds, cond = [4, 7][rows], Cond(label=labels[rows])
        return sample(model, cond, seeds, steps=16, guidance=ClassifierFree(2.0), policies=[policy]).samples

    for policy, equal in (
        (ConfidentTaylor(0.004), False),
        (ConfidentTaylor(0.004, per_sample_gate=True), True),
    ):
        together = drawn(slice(0, 2), policy)
        alone = torch.cat([drawn(slice(i, i + 1), policy) for i in range(2)])
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5) == equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_flux(dtype):
    """Joint rows of text and image; the gate compares the image's, h_L is forecast whole."""
    viewed, inputs = flux.view(transformer().to(dtype)), in_type(call_inputs(), dtype)
    residuals = {
        "controlnet_block_samples": [c.to(dtype) for c in controls(2, 5)],
        "controlnet_single_block_samples": [c.to(dtype) for c in controls(3, 6)],
    }
    exact = run_steps(viewed, inputs, [], 12, **residuals)[0]
    for neutral in (ConfidentTaylor().exact(), ConfidentTaylor(1e-30)):
        assert torch.equal(run_steps(viewed, inputs, [neutral], 12, **residuals)[0], exact)
    (taylor, trajectory), (reuse, _) = (
        run_steps(viewed, inputs, [ConfidentTaylor(inf, 1, order)], 12, **residuals) for order in (1, 0)
    )
    assert 0 < relative(taylor, exact) < relative(reuse, exact) < 0.1
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-2 11", "forecast": "3-10"}
    assert trajectory.sessions[0].bytes() == 2 * B * D * (4 * L + dtype.itemsize * (L + S))


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("orders", "tensors"), [((3, 1), 6), ((1, 1), 4), ((0, 0), 2), ((0, 4), 6)])
@pytest.mark.parametrize("decider", ["first", "each"])
def test_bytes_follow_the_formula(orders, tensors, decider):
    model, policy = tiny_dit(), ConfidentTaylor(1e-30, *orders, decider=decider)
    trajectory, one = Trajectory(model.sites(), [policy], STEPS), 2 * 16 * 32 * 4
    (session,) = trajectory.sessions
    following = orders[1] + 1 if decider == "first" else tensors
    with torch.no_grad():
        for index in range(STEPS):
            evaluate(model, trajectory, noise(), call_at(model, index))
            assert session.projected_bytes() == (tensors + (following if index else 0)) * one
            evaluate(model, trajectory, noise(seed=1), call_at(model, index, "uncond"))
    assert (
        session.bytes() == session.projected_bytes() == trajectory.peak_bytes == (tensors + following) * one
    )


def test_memory_beside_taylorseer_at_the_depth_of_dit_xl():
    """28 blocks of two branches, order 1: 112 tensors against 6, the 132 MB and 7 MB of the specification."""
    model = awake(DiT(replace(TINY, depth=28, width=8)))
    held = {}
    for policy in (TaylorSeer(4, 1), ConfidentTaylor(inf, warmup=5)):
        result = sample(model, Cond(label=torch.arange(2)), [0, 1], steps=8, policies=[policy])
        held[type(policy)] = result.policy_bytes
    assert held[TaylorSeer] * 6 == held[ConfidentTaylor] * 112


def test_too_small_a_budget_is_refused_in_the_first_evaluation():
    model, seen = tiny_dit(), []
    need = 6 * 2 * 16 * 32 * 4
    options: dict[str, Any] = {"policies": [ConfidentTaylor()], "progress": lambda done, _: seen.append(done)}
    sample(model, Cond(label=torch.arange(2)), [0, 1], steps=12, max_bytes=need, **options)
    seen.clear()
    with pytest.raises(ConfigError, match=f"ConfidentTaylor.*would hold {need:,} bytes"):
        sample(model, Cond(label=torch.arange(2)), [0, 1], steps=12, max_bytes=need - 1, **options)
    assert not seen


def test_nothing_kept_carries_a_graph():
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [ConfidentTaylor()], STEPS)
    for index in range(6):
        evaluate(model, trajectory, noise(), call_at(model, index)).sum().backward()
    (lane,) = trajectory.sessions[0].state.values()
    held = [t for s in (*lane.first, *lane.last) for t in s.branch.outputs[0]]
    assert len(held) == 5 and not any(t.requires_grad for t in held)


# --- text and refusals -------------------------------------------------------------------------------------


def test_as_text_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = "confidenttaylor:threshold=0.05,first_order=1,decider=each,per_sample_gate=true"
    policy = component(Policy, text)  # type: ignore[type-abstract]
    assert policy == ConfidentTaylor(0.05, 1, decider="each", per_sample_gate=True) and spec(policy) == text
    words = [
        "generate",
        save_tiny(tmp_path / "model"),
        "--label",
        CLASSES[1],
        "--seeds",
        "0",
        "--steps",
        "10",
    ]
    words += ["--policy", "confidenttaylor:threshold=0.1", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert "forecast" in capsys.readouterr().out


@dataclass(frozen=True)
class Pruned(Policy):
    """Another owner of the stack."""

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return {"blocks": "own"}

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        return Session()

    def exact(self) -> Pruned:
        return self


def test_another_owner_is_refused_by_name():
    for other, what in ((TaylorSeer(), "schedule"), (Gate(), "schedule"), (Pruned(), "blocks")):
        with pytest.raises(ConflictError, match=f"and ConfidentTaylor both own '{what}'"):
            Trajectory(tiny_dit().sites(), [other, ConfidentTaylor()], STEPS)


ONE_BLOCK = (Site("blocks", "stack"), Site("blocks.0", "block"))


@pytest.mark.parametrize("sites", [BRANCH, ONE_BLOCK, (*tiny_dit().sites(), Site("decoder", "stack"))])
def test_a_model_without_one_stack_of_several_blocks_is_refused(sites):
    with pytest.raises(NoEffectError, match="ConfidentTaylor: this model has no site that it can use"):
        Trajectory(sites, [ConfidentTaylor()], STEPS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1 should be at least 0"),
        ({"threshold": nan}, "threshold=nan should be at least 0"),
        ({"threshold": "0.1"}, "threshold='0.1' should be a number of at least 0"),
        ({"first_order": -1}, "first_order=-1 should be at least 0"),
        ({"last_order": 1.5}, "last_order=1.5 should be an integer"),
        ({"warmup": -1}, "warmup=-1 should be at least 0"),
        ({"decider": "last"}, "unknown decider 'last'.*choose from: first, each"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ConfidentTaylor(**fields)
