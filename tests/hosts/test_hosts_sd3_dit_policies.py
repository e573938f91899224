"""The views of Stable Diffusion 3 and of DiT have sites, and policies act on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from torch import Tensor

import ditkit
from ditkit.attention import Grouped
from ditkit.caching import RAS
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import ConflictError
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, named
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import dit, sd3
from ditkit.hosts.view import view
from family_pipelines_support import draw, ready
from family_pipelines_support import sd3 as sd3_pipeline
from hosts_support import (
    DEPTH,
    FAMILIES,
    PATCH,
    B,
    D,
    Family,
    Inputs,
    S,
    call,
    families,
    in_type,
    of_sd3,
    pictures,
    residuals,
    run_steps,
    tapped,
    with_ip_adapter,
)
from policies_support import Gate, Gated, RowSelector, SelectedRows


def test_sites_and_layout() -> None:
    joint, alone = FAMILIES["sd3.5"], FAMILIES["dit"]
    viewed = view(joint.transformer())
    first = ["attn", "attn.kv", "attn.core", "attn2", "attn2.kv", "attn2.core", "mlp", "text.mlp"]
    last = ["attn", "attn.kv", "attn.core", "mlp"]
    inside = [first, first, last]
    blocks = [
        name for i in range(DEPTH) for name in (f"blocks.{i}", *(f"blocks.{i}.{part}" for part in inside[i]))
    ]
    assert [site.name for site in sd3.sites(viewed)] == ["tokens", "time", "blocks", *blocks, "head"]
    assert {tuple(site) for site in sd3.sites(viewed) if site.name.startswith("blocks.1")} == {
        ("blocks.1", "block", "joint"),
        ("blocks.1.attn", "branch", "joint"),
        ("blocks.1.attn.kv", "kv", "image"),
        ("blocks.1.attn.core", "core", "joint"),
        ("blocks.1.attn2", "branch", "image"),
        ("blocks.1.attn2.kv", "kv", "image"),
        ("blocks.1.attn2.core", "core", "image"),
        ("blocks.1.mlp", "branch", "image"),
        ("blocks.1.text.mlp", "branch", "text"),
    }
    assert joint.layout(viewed) == (Segment("image", Grid(1, 4, 6), 24), Segment("text", Grid(S), S))
    viewed = view(alone.transformer())
    blocks = [
        f"blocks.{i}{part}" for i in range(DEPTH) for part in ("", ".attn", ".attn.kv", ".attn.core", ".mlp")
    ]
    assert [site.name for site in dit.sites(viewed)] == ["tokens", "blocks", *blocks, "time", "head"]
    assert {site.stream for site in dit.sites(viewed)} == {"image"}
    assert alone.layout(viewed) == (Segment("image", Grid(1, 4, 4), 16),)
    for family in FAMILIES.values():
        viewed = view(family.transformer())
        run, seen = tapped(family, viewed)
        call(viewed, family.inputs(), run)
        assert set(seen) == {site.name for site in family.view.sites(viewed)}


def branch_rows(family: Family) -> int:
    """Rows of the outputs of all branches: those that a cache keeps."""
    if family.view is dit:
        return DEPTH * 2 * 16
    return DEPTH * 2 * 24 + (DEPTH - 1) * 2 * S + 24 * len(family.config.get("dual_attention_layers", ()))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taylorseer(family: Family, dtype: torch.dtype) -> None:
    viewed, inputs = view(family.transformer().to(dtype)), in_type(family.inputs(), dtype)
    exact = run_steps(family, viewed, inputs, [])[0]
    assert torch.equal(run_steps(family, viewed, inputs, [TaylorSeer(3, 1, 1).exact()])[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [TaylorSeer(3, 1, 1)])
    assert 0 < (x - exact).float().norm() / exact.float().norm() < 0.1
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0 3 6", "forecast": "1-2 4-5 7"}
    assert set(receipt.sites) == set(named(family.view.sites(viewed), "branch"))
    assert trajectory.sessions[0].bytes() == 2 * dtype.itemsize * B * D * branch_rows(family)


@pytest.mark.parametrize("name", [*FAMILIES, "ip adapter"])
def test_selected_rows_equal_the_dense_run(name: str) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    family = FAMILIES.get(name, FAMILIES["sd3.5"])
    host, inputs = family.transformer(), family.inputs()
    given: Inputs = {"block_controlnet_hidden_states": residuals(2, 24)} if family.view is sd3 else {}
    if name == "ip adapter":
        host, given = with_ip_adapter(host), given | pictures()
    viewed = view(host)
    layout = family.layout(viewed)

    def selected(keep_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = Trajectory(family.view.sites(viewed), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        first, second = (Call(i, 4, 1 - i / 4, layout=layout) for i in range(2))
        dense = trajectory.leave(first, call(viewed, inputs, trajectory.run(first), **given))
        trajectory.guided(first, dense)
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows)
        rows = session.active
        assert rows is not None
        active = torch.zeros(layout[0].length, dtype=torch.bool).index_fill(0, rows, True)
        cells = active.reshape(layout[0].grid.shape[1:])
        mask = cells.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        return dense, call(viewed, inputs, trajectory.run(second), **given), mask

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


@of_sd3
def test_joint_branches_run_on_some_rows(family: Family) -> None:
    """With all keys, some queries give some of the outputs, and all of the text's."""
    viewed, inputs, index = view(family.transformer()), family.inputs(), torch.tensor([1, 4, 5, 20])
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def whole(name: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = kept.setdefault(name, (k, v))
            return fn(q, k, v)

        return core

    def some(fn: Any, x: Any, *args: Any) -> Any:
        out = fn(x, *args)
        image, *text = fn(x.rows("image", index), *args)
        assert torch.allclose(image, out[0][:, index], rtol=1e-5, atol=1e-6)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(text, out[1:], strict=True))
        return out

    names = [f"blocks.{i}.attn" for i in range(DEPTH)]
    handlers = dict.fromkeys(names, some) | {f"{name}.core": whole(f"{name}.core") for name in names}
    assert torch.equal(call(viewed, inputs, Run(handlers)), call(viewed, inputs))
    assert len(kept) == DEPTH


@families
def test_a_gate_cuts_the_stack(family: Family) -> None:
    viewed, inputs = view(family.transformer()), family.inputs()
    exact = run_steps(family, viewed, inputs, [])[0]
    assert torch.equal(run_steps(family, viewed, inputs, [Gate(0.0)])[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [Gate(10.0)])
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert 0 < (x - exact).norm() / exact.norm() < 0.1
