"""Stable Diffusion 3: IP-Adapters, skipped layers, forward chunking, and policies of rows beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from torch import Tensor

import ditkit
from adapters_support import sd3_adapter, sd3_pictures
from ditkit.attention import Grouped
from ditkit.caching import RAS
from ditkit.core.errors import ConflictError
from ditkit.core.policy import Policy
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.view import restore, view
from family_pipelines_support import draw, ready
from family_pipelines_support import sd3 as sd3_pipeline
from hosts_support import (
    EVERY,
    FAMILIES,
    Inputs,
    call,
    in_type,
    layout_of,
    residuals,
    same_in_both,
    sites_of,
    tapped,
)
from policies_support import RowSelector, SelectedRows, by_row

FAMILY = FAMILIES["sd3.5"]
both = pytest.mark.parametrize("name", ["sd3", "sd3.5"])


@both
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("skip", [None, [1], [0, 2]], ids=str)
def test_control_residuals_and_skipped_layers(name: str, count: int, skip: list[int] | None) -> None:
    host, inputs = EVERY[name].transformer(), EVERY[name].inputs()
    given: Inputs = {"block_controlnet_hidden_states": residuals(count, 24), "skip_layers": skip}
    expected = call(host, inputs, **given)
    assert not torch.equal(expected, call(host, inputs))
    without = " ".join(f"blocks.{i}" for i in skip or ()) or "-"
    assert same_in_both(view(host), inputs, expected, without, **given)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ip_adapter(name: str, dtype: torch.dtype) -> None:
    inputs = in_type(EVERY[name].inputs(), dtype)
    host, silent = (sd3_adapter(EVERY[name].transformer(), scale).to(dtype) for scale in (0.7, 0.0))
    given: Inputs = in_type(sd3_pictures(), dtype)
    expected, plain = call(host, inputs, **given), call(host, inputs)
    assert not torch.equal(plain, expected)
    assert same_in_both(view(host), inputs, expected, **given)
    assert same_in_both(host, inputs, plain, without=".ip.core")
    assert same_in_both(view(silent), inputs, plain, without=".ip.core", **given)
    run, seen = tapped(host)
    call(host, inputs, run, **given)
    assert "blocks.0.attn.ip.core" in seen


@both
def test_chunked_layers(name: str) -> None:
    host, inputs = EVERY[name].transformer(), EVERY[name].inputs()
    plain = call(host, inputs)
    host.enable_forward_chunking(1, 0)
    assert same_in_both(view(host), inputs, call(restore(copy.deepcopy(host)), inputs))
    assert torch.allclose(call(host, inputs), plain, atol=1e-5)
    host.disable_forward_chunking()
    assert same_in_both(host, inputs, plain)


@pytest.mark.parametrize("adapted", [False, True])
def test_selected_rows_take_their_residuals_and_pictures_along(adapted: bool) -> None:
    host, inputs = FAMILY.transformer(), FAMILY.inputs()
    given: Inputs = {"block_controlnet_hidden_states": residuals(2, 24)}
    if adapted:
        host, given = sd3_adapter(host), given | sd3_pictures()
    viewed = view(host)
    layout = layout_of(viewed, inputs)

    def selected(keep_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = Trajectory(sites_of(viewed), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        first, second = (Call(i, 4, 1 - i / 4, layout=layout) for i in range(2))
        dense = trajectory.leave(first, call(viewed, inputs, trajectory.run(first), **given))
        trajectory.guided(first, dense)
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows) and session.active is not None
        active = torch.zeros(layout[0].length, dtype=torch.bool).index_fill(0, session.active, True)
        sparse = call(viewed, inputs, trajectory.run(second), **given)
        return dense, sparse, by_row(active, layout[0], dense)

    dense, sparse, mask = selected(keep_keys=True)
    assert 2 * mask.sum() == mask.numel()
    assert ((sparse - dense) * mask).abs().max() <= 1e-6 * dense.abs().max()
    assert (sparse * ~mask).abs().max() == 0
    dense, sparse, mask = selected(keep_keys=False)
    assert ((sparse - dense) * mask).abs().max() > 1e-4


@pytest.mark.parametrize(
    "policy", [Grouped(group=(2, 4), block=8, kernel="cpu"), RAS()], ids=["pattern", "rows"]
)
def test_pictures_beside_the_rows_are_refused_by_name(policy: Policy) -> None:
    """An IP-Adapter's keys are no rows of the image: neither kept, nor in a plan, by accelerate or set after it."""
    line = "transformer_blocks.0.attn attends by SD3IPAdapterJointAttnProcessor2_0, where no keys can be kept"
    pipe, told = ready(sd3_pipeline)
    fast, steps = ditkit.accelerate(pipe, policy), []
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 8, 32).eval())

    def count(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    with pytest.raises(ConflictError, match=line):
        draw(fast, told, callback_on_step_end=count)
    assert not steps
    ditkit.restore(fast)
    with pytest.raises(ConflictError, match=line):
        ditkit.accelerate(pipe, policy)
    assert ditkit.accelerate(pipe, "taylorseer:interval=3")
