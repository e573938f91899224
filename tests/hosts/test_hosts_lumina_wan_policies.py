"""Sites of the views of Lumina 2, Lumina-Next and Wan, and policies at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.grid import Grid, Segment
from ditkit.core.run import Call, Run, named
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import lumina2, lumina_next, wan
from ditkit.hosts.family import family
from ditkit.hosts.view import view
from lumina_wan_support import (
    CASES,
    CLIP_ROWS,
    DEPTH,
    Case,
    L,
    call,
    captions,
    cases,
    dtypes,
    one_each,
    run_steps,
)
from policies_support import Gate, Gated, RowSelector, SelectedRows


def test_sites_and_layout() -> None:
    joint, alone, clip = (CASES[name] for name in ("lumina2 ragged", "lumina-next", "wan"))
    model = joint.transformer()
    inside = ("", ".attn", ".attn.kv", ".attn.core", ".mlp")
    blocks = [f"blocks.{i}{part}" for i in range(DEPTH) for part in inside]
    refiners = [f"{n}.{i}.{part}" for n in ("context", "noise") for i in range(2) for part in ("attn", "mlp")]
    assert named(lumina2.sites(model), *ALL) == ["time", "tokens", *refiners, "blocks", *blocks, "head"]
    assert {site.stream for site in lumina2.sites(model) if site.name.startswith("blocks")} == {"joint"}
    assert {tuple(site) for site in lumina2.sites(model) if site.name.endswith(".0.attn")} == {
        ("context.0.attn", "branch", "text"),
        ("noise.0.attn", "branch", "image"),
        ("blocks.0.attn", "branch", "joint"),
    }
    text, image = joint.layout(model, joint.inputs())
    assert image == Segment("image", Grid(1, 4, 6), L)
    assert text[:3] == ("text", Grid(7), 7)
    assert text.valid is not None
    assert torch.equal(text.valid, captions(7, 2, 4)[:, :7].bool())
    plain = CASES["lumina2"]
    assert family(model).layout(model, plain.inputs()) == plain.layout(model, plain.inputs())
    assert plain.layout(model, plain.inputs()) == (Segment("text", Grid(6), 6), image)

    model = alone.transformer()
    assert named(lumina_next.sites(model), *ALL) == ["time", "tokens", "blocks", *blocks, "head"]
    attentions = {site.attention for site in lumina_next.sites(model) if site.kind == "core"}
    assert attentions == {"scaled"}
    assert family(model).layout(model, alone.inputs()) == (image,)
    assert alone.layout(model, alone.inputs()) == (image,)

    model = clip.transformer()
    inside = ("", ".attn", ".attn.kv", ".attn.core", ".cross_attn", ".mlp")
    blocks = [f"blocks.{i}{part}" for i in range(DEPTH) for part in inside]
    assert named(wan.sites(model), *ALL) == ["time", "tokens", "blocks", *blocks, "head"]
    assert {site.stream for site in wan.sites(model)} == {"image"}
    assert family(model).layout(model, clip.inputs()) == clip.layout(model, clip.inputs())
    assert clip.layout(model, clip.inputs()) == (Segment("image", Grid(2, 3, 4), CLIP_ROWS),)


ALL: Any = ("time", "tokens", "stack", "block", "branch", "kv", "core", "head")


@one_each
@dtypes
def test_taylorseer_that_never_skips_changes_nothing_and_one_that_does_saves(
    case: Case, dtype: torch.dtype
) -> None:
    viewed = view(case.transformer().to(dtype))
    exact = run_steps(case, viewed, [], dtype)[0]
    assert torch.equal(run_steps(case, viewed, [TaylorSeer(3, 1, 1).exact()], dtype)[0], exact)
    x, trajectory = run_steps(case, viewed, [TaylorSeer(3, 1, 1)], dtype)
    assert 0 < (x - exact).float().norm() < 0.1 * exact.float().norm()
    (receipt,) = trajectory.finish()
    branches = named(case.sites(viewed), "branch")
    assert receipt.sites == set(branches)
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0 3 6", "forecast": "1-2 4-5 7"}
    assert receipt.saved == 5 * len(branches)


@cases
def test_selected_rows_equal_the_dense_run(case: Case) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed, inputs = view(case.transformer()), case.inputs()
    layout = case.layout(viewed, inputs)

    def selected(keep_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = Trajectory(case.sites(viewed), [RowSelector(0.5, 1, keep_keys=keep_keys)], 4)
        first, second = (Call(i, 4, 1.0, layout=layout) for i in range(2))
        dense = trajectory.leave(first, call(viewed, inputs, trajectory.run(first)))
        trajectory.guided(first, dense)
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows)
        rows = session.active
        assert rows is not None
        return dense, call(viewed, inputs, trajectory.run(second)), rows

    def by_row(out: Tensor) -> Tensor:
        patches = out.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).transpose(-3, -2)
        return patches.movedim(1, -1).flatten(-3).flatten(1, -2)  # [B, L, P C]

    dense, sparse, rows = (x if i == 2 else by_row(x) for i, x in enumerate(selected(keep_keys=True)))
    assert len(rows) == L // 2
    assert (sparse - dense)[:, rows].abs().max() <= 2e-6 * dense.abs().max()
    assert not sparse.index_fill(1, rows, 0.0).any()
    dense, sparse, rows = (x if i == 2 else by_row(x) for i, x in enumerate(selected(keep_keys=False)))
    assert (sparse - dense)[:, rows].abs().max() > 1e-4


@one_each
def test_branches_run_on_some_rows(case: Case) -> None:
    """Every argument aligned with tokens can be cut: with all keys, some queries give some of the outputs."""
    viewed, inputs = view(case.transformer()), case.inputs()
    index = torch.tensor([1, 4, 5, 17])
    kept: dict[str, Any] = {}

    def whole(name: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Any:
            if q.shape[2] > len(index):
                kept[name] = k, v, *mask
            return fn(q, *kept[name])

        return core

    def some(fn: Any, x: Tensor, *args: Any) -> Tensor:
        out = fn(x, *args)
        part = fn(x[:, index], *(a.rows("joint", index) if hasattr(a, "rows") else a for a in args))
        assert torch.allclose(part, out[:, index], rtol=1e-5, atol=1e-5)
        return out

    sites = case.sites(viewed)
    branches = [name for name in named(sites, "branch") if name.startswith("blocks")]
    handlers = dict.fromkeys(branches, some) | {name: whole(name) for name in named(sites, "core")}
    assert torch.equal(call(viewed, inputs, Run(handlers)), call(viewed, inputs))
    assert len(kept) == DEPTH


@one_each
def test_keys_bring_their_positions(case: Case) -> None:
    """Attention does not depend on the order of keys, if each takes its position along."""
    viewed, inputs = view(case.transformer()), case.inputs()
    end = case.layout(viewed, inputs)[0].length if case.text else 0

    def shuffled(fn: Any, kv: Any) -> Any:
        kv = fn(kv)
        rows = torch.arange(kv.k.shape[2])
        # the mask of ragged captions tells of the text, so that only the image's keys may move
        rows[end:] = rows[end:].flip(0)
        table = kv.position
        moved = table[:, rows] if isinstance(table, Tensor) else table.rows("image", rows)
        return kv._replace(k=kv.k[:, :, rows], v=kv.v[:, :, rows], position=moved)

    out = call(viewed, inputs, Run(dict.fromkeys(named(case.sites(viewed), "kv"), shuffled)))
    assert torch.allclose(out, call(viewed, inputs), rtol=1e-4, atol=1e-5)


@one_each
def test_a_gate_cuts_the_stack(case: Case) -> None:
    viewed = view(case.transformer())
    exact = run_steps(case, viewed, [])[0]
    assert torch.equal(run_steps(case, viewed, [Gate(0.0)])[0], exact)
    x, trajectory = run_steps(case, viewed, [Gate(10.0)])
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert not torch.equal(x, exact)
