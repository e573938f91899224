"""Policies on the FLUX view: TaylorSeer, and probes of what a handler may do at each kind of site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Run
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from flux_support import (
    COLUMNS,
    DOUBLE,
    LAYOUT,
    SINGLE,
    B,
    D,
    Inputs,
    L,
    S,
    at,
    call,
    call_inputs,
    controls,
    in_type,
    relative,
    run_steps,
    transformer,
    visited,
    with_lora,
)
from policies_support import BandReuse, Gate, Gated, RowSelector, SelectedRows, Tap


@pytest.fixture
def host() -> Any:
    """A transformer of diffusers, ours to change."""
    return transformer()


@pytest.fixture
def inputs() -> Inputs:
    return call_inputs()


def test_sites_and_layout(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    sites = flux.sites(viewed)
    assert [tuple(site) for site in sites if site.name.startswith(("blocks.0", "single.0"))] == [
        ("blocks.0", "block", "joint"),
        ("blocks.0.attn", "branch", "joint"),
        ("blocks.0.attn.kv", "kv", "image"),
        ("blocks.0.attn.core", "core", "joint"),
        ("blocks.0.mlp", "branch", "image"),
        ("blocks.0.text.mlp", "branch", "text"),
        ("single.0", "block", "joint"),
        ("single.0.fused", "branch", "joint"),
        ("single.0.attn.kv", "kv", "joint"),
        ("single.0.attn.core", "core", "joint"),
    ]
    assert [s.name for s in sites if s.kind in ("time", "tokens", "stack", "head")] == [
        "tokens",
        "time",
        "blocks",
        "head",
    ]
    assert visited(viewed, inputs) == {site.name for site in sites}
    assert flux.layout(inputs["img_ids"], inputs["txt_ids"]) == LAYOUT
    reference = inputs["img_ids"][: 2 * COLUMNS] + torch.tensor([1.0, 0.0, 0.0])
    kontext = flux.layout(torch.cat([inputs["img_ids"], reference]), inputs["txt_ids"])
    assert kontext == (*LAYOUT, Segment("context", Grid(1, 2, COLUMNS), 2 * COLUMNS))
    assert flux.layout(inputs["img_ids"][:-1], inputs["txt_ids"])[1] == Segment("image", Grid(L - 1), L - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_taylorseer_that_never_skips_changes_nothing(
    host: Any, inputs: Inputs, dtype: torch.dtype, lora: bool
) -> None:
    host, inputs = (with_lora(host) if lora else host).to(dtype), in_type(inputs, dtype)
    viewed = flux.view(host)
    exact = run_steps(viewed, inputs, [])[0]
    assert torch.equal(run_steps(viewed, inputs, [TaylorSeer(3, 1, 1).exact()])[0], exact)
    steps = run_steps(viewed, inputs, [TaylorSeer(3, 1, 1)])[0]
    assert 0 < relative(steps, exact) < 0.1


@pytest.mark.parametrize("order", [0, 1])
def test_taylorseer_keeps_what_it_says_and_its_receipt_tells(host: Any, inputs: Inputs, order: int) -> None:
    viewed = flux.view(host)
    x, trajectory = run_steps(viewed, inputs, [TaylorSeer(3, order, 1)])
    # image and text each have attention and MLP in a double block, a single block has one joint branch
    branch_rows = DOUBLE * 2 * (L + S) + SINGLE * (L + S)
    assert trajectory.sessions[0].bytes() == (order + 1) * 4 * B * D * branch_rows
    assert x.isfinite().all()
    (receipt,) = trajectory.finish()
    branches = 3 * DOUBLE + SINGLE
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0 3 6", "forecast": "1-2 4-5 7"}
    assert len(receipt.sites) == branches
    assert receipt.saved == 5 * branches


def test_taylorseer_of_higher_order_is_closer(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    exact = run_steps(viewed, inputs, [])[0]
    errors = [relative(run_steps(viewed, inputs, [TaylorSeer(3, order, 2)])[0], exact) for order in (0, 1)]
    assert 0 < errors[1] < errors[0] < 0.05


def test_selected_rows_equal_the_dense_run(host: Any, inputs: Inputs) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed = flux.view(host)
    given = {"controlnet_block_samples": controls(2, 5)}

    def selected(keep_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = Trajectory(flux.sites(viewed), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        dense = trajectory.leave(at(0, 4), call(viewed, inputs, trajectory.run(at(0, 4)), **given))
        trajectory.guided(at(0, 4), dense)
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows)
        rows = session.active
        assert rows is not None
        return dense, call(viewed, inputs, trajectory.run(at(1, 4)), **given), rows

    dense, sparse, rows = selected(keep_keys=True)
    assert len(rows) == L // 2
    assert (sparse - dense)[:, rows].abs().max() <= 1e-6 * dense.abs().max()
    assert sparse.abs().sum() == sparse[:, rows].abs().sum()
    dense, sparse, rows = selected(keep_keys=False)
    assert (sparse - dense)[:, rows].abs().max() > 1e-4


def test_branches_run_on_some_rows(host: Any, inputs: Inputs) -> None:
    """Every argument aligned with tokens can be cut: with all keys, some queries give some of the outputs."""
    viewed = flux.view(host)
    index = torch.tensor([1, 4, 5, 20])
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def whole(name: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if q.shape[2] == S + L:
                kept[name] = k, v
                return fn(q, k, v)
            return fn(q, *kept[name])

        return core

    def some(fn: Any, x: Any, *args: Any) -> Any:
        out = fn(x, *args)
        part = fn(
            x.rows("image", index), *(a.rows("image", index) if hasattr(a, "rows") else a for a in args)
        )
        assert torch.allclose(part.image, out.image[:, index], rtol=1e-5, atol=1e-6)
        assert torch.allclose(part.text, out.text, rtol=1e-5, atol=1e-6)
        return out

    def joint(fn: Any, x: Tensor, rotary: Any, *args: Any) -> Tensor:
        out = fn(x, rotary, *args)
        part = fn(x[:, index], rotary.rows("joint", index), *args)
        assert torch.allclose(part, out[:, index], rtol=1e-5, atol=1e-6)
        return out

    handlers = {f"blocks.{i}.attn": some for i in range(DOUBLE)} | {
        f"single.{i}.fused": joint for i in range(SINGLE)
    }
    cores = {s.name: whole(s.name) for s in flux.sites(viewed) if s.kind == "core"}
    assert torch.equal(call(viewed, inputs, Run(handlers | cores)), call(viewed, inputs))
    assert len(kept) == DOUBLE + SINGLE


def test_reused_statistics_are_exact_on_constant_attention(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    dense = call(viewed, inputs)
    trajectory = Trajectory(flux.sites(viewed), [BandReuse(0.2, warmup=0, every=4)], 4)
    for i in range(3):
        out = trajectory.leave(at(i, 4), call(viewed, inputs, trajectory.run(at(i, 4))))
        assert (out - dense).abs().max() <= 1e-5 * dense.abs().max()
    assert trajectory.finish()[0].saved == 2 * (DOUBLE + SINGLE)


def test_a_gate_cuts_the_stack(host: Any, inputs: Inputs) -> None:
    viewed = flux.view(host)
    given = {"controlnet_block_samples": controls(2, 5), "controlnet_single_block_samples": controls(3, 6)}
    exact = run_steps(viewed, inputs, [], **given)[0]
    assert torch.equal(run_steps(viewed, inputs, [Gate(0.0)], **given)[0], exact)
    x, trajectory = run_steps(viewed, inputs, [Gate(10.0)], **given)
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert 0 < relative(x, exact) < 0.1


def test_methods_compose(host: Any, inputs: Inputs) -> None:
    tap = Tap(("blocks.1.attn.core", "blocks.1.attn.kv", "single.2.fused"))
    viewed = flux.view(host)
    x, _trajectory = run_steps(viewed, inputs, [TaylorSeer(3, 1, 1), BandReuse(0.25), tap])
    assert x.isfinite().all()
    q, k, v = tap.seen["blocks.1.attn.core"][0]
    assert q.shape == k.shape == v.shape == (B, D // 16, S + L, 16)
    (kv,), _ = tap.seen["blocks.1.attn.kv"]
    assert kv.k.shape == kv.v.shape == (B, D // 16, L, 16)
    assert [table.shape for table in kv.position] == [(L, 16)] * 2
    assert tap.seen["single.2.fused"][1].shape == (B, S + L, D)


def test_keys_bring_their_positions(host: Any, inputs: Inputs) -> None:
    """Attention does not depend on the order of keys, if each takes its position along."""
    viewed = flux.view(host)
    swapped = torch.randperm(L, generator=torch.Generator().manual_seed(0))

    def shuffled(fn: Any, kv: Any) -> Any:
        kv = fn(kv)
        moved = tuple(table[swapped] for table in kv.position)
        return kv._replace(k=kv.k[:, :, swapped], v=kv.v[:, :, swapped], position=moved)

    names = [site.name for site in flux.sites(viewed) if site.name.startswith("blocks") and site.kind == "kv"]
    out = call(viewed, inputs, Run(dict.fromkeys(names, shuffled)))
    assert torch.allclose(out, call(viewed, inputs), rtol=1e-4, atol=1e-6)
