"""Attention patterns on the views of diffusers' transformers: as dense attention under a mask of every pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flux_support as of_flux
from ditkit.attention import Grouped
from ditkit.caching import ConfidentTaylor, TaylorSeer
from ditkit.core.errors import NoEffectError
from ditkit.core.policy import Policy
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.hosts.view import view
from hosts_support import EVERY, run_steps
from patterns_support import Masked, grouped_meets

HOSTS = (
    "sd3",
    "sd3.5",
    "dit",
    "pixart",
    "pixart sized",
    "cogvideox",
    "cogvideox 2b",
    "cogvideox rotary",
    "lumina2",
    "wan",
)


def outcome(name: str, policies: list[Policy]) -> tuple[Tensor, Trajectory]:
    """Eight Euler steps of a small random transformer in float32."""
    if name == "flux":
        return of_flux.run_steps(flux.view(of_flux.transformer()), of_flux.call_inputs(), policies)
    family = EVERY[name]
    return run_steps(family, view(family.transformer()), family.inputs(), policies)


def is_clip(name: str) -> bool:
    return name.startswith(("wan", "cogvideox"))


every_host = pytest.mark.parametrize("name", ["flux", *HOSTS])


def pattern_for(name: str, **setting: object) -> Grouped:
    group = (2, 2, 2) if is_clip(name) else (2, 4)
    return Grouped(group=group, block=8, kernel="cpu", reach=0, **setting)  # type: ignore[arg-type]


@every_host
def test_a_host_under_the_pattern_is_one_under_the_mask(name: str) -> None:
    pattern = pattern_for(name)
    expected, _ = outcome(name, [Masked(grouped_meets(pattern, is_clip(name)))])
    found, trajectory = outcome(name, [pattern])
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "", "sparse": "0-7"}
    dense, _ = outcome(name, [])
    error, effect = ((found - x).norm() / dense.norm() for x in (expected, dense))
    assert error < 1e-5 and effect > 1e-3


@every_host
def test_the_neutral_setting_changes_no_bit(name: str) -> None:
    assert torch.equal(outcome(name, [pattern_for(name).exact()])[0], outcome(name, [])[0])


@every_host
@pytest.mark.parametrize("cache", [TaylorSeer(3, 1, 2), ConfidentTaylor(interval=3)], ids=["taylor", "cg"])
def test_with_a_cache_it_is_the_cache_of_the_masked_model(name: str, cache: Policy) -> None:
    """What a cache keeps is in the order of the slots, in all evaluations alike."""
    pattern = pattern_for(name)
    expected, _ = outcome(name, [cache, Masked(grouped_meets(pattern, is_clip(name)))])
    found, trajectory = outcome(name, [cache, pattern])
    assert (found - expected).norm() / expected.norm() < 1e-5
    forecast, sparse = (receipt.as_dict()["lanes"]["cond"] for receipt in trajectory.finish())
    assert forecast["computed"] == sparse["sparse"]


def test_attention_with_a_scale_of_its_own_is_refused() -> None:
    """Lumina-Next's logits grow with the number of keys: a kernel that divides by sqrt(K) is another model."""
    with pytest.raises(NoEffectError, match="Grouped: this model has no site that it can use"):
        outcome("lumina-next", [pattern_for("lumina-next")])


def test_a_reference_picture_keeps_its_rows() -> None:
    """FLUX Kontext: the picture referred to is seen by all, in no order but its own, and is not predicted."""
    model, inputs = flux.view(of_flux.transformer()), of_flux.call_inputs()
    draw = torch.Generator().manual_seed(3)
    reference = inputs["img_ids"][: 2 * of_flux.COLUMNS] + torch.tensor([1.0, 0.0, 0.0])
    rows = torch.randn(of_flux.B, len(reference), inputs["hidden_states"].shape[2], generator=draw)
    inputs["hidden_states"] = torch.cat((inputs["hidden_states"], rows), 1)
    inputs["img_ids"] = torch.cat((inputs["img_ids"], reference))
    layout = flux.layout(inputs["img_ids"], inputs["txt_ids"])
    pattern = Grouped(group=(2, 4), block=8, kernel="cpu", reach=0, warmup=1)

    def said(policy: Policy, index: int) -> Tensor:
        call = Call(index, 4, 0.5, layout=layout)
        trajectory = Trajectory(flux.sites(model), [policy], 4)
        return trajectory.leave(call, of_flux.call(model, inputs, trajectory.run(call)))

    dense, masked = of_flux.call(model, inputs), said(Masked(grouped_meets(pattern, False)), 1)
    assert torch.allclose(said(pattern, 0), dense, atol=1e-5)
    assert torch.allclose(said(pattern, 1), masked, atol=1e-5) and not torch.allclose(
        masked, dense, atol=1e-3
    )
