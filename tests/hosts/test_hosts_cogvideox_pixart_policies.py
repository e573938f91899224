"""Sites of the views of CogVideoX and PixArt, and policies at them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.caching import RAS, ConfidentTaylor
from ditkit.caching.regional import Regions, by_row
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, named
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.family import family as family_of
from ditkit.hosts.view import view
from hosts_support import DEPTH, LATER, B, Family, S, call, in_type, run_steps
from policies_support import Gate, Gated

later = pytest.mark.parametrize("family", LATER.values(), ids=LATER)
EACH = ("cogvideox 1.5", "pixart")
one_each = pytest.mark.parametrize("family", [LATER[name] for name in EACH], ids=EACH)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
STACK = ConfidentTaylor(schedule=(0, 1, 2, 5))


def test_sites_and_layout() -> None:
    clip, image = (view(LATER[name].transformer()) for name in EACH)
    inside = ["", ".attn", ".attn.kv", ".attn.core", ".mlp"]
    blocks = [f"blocks.{i}{part}" for i in range(DEPTH) for part in inside]
    sites = family_of(clip).sites(clip)
    assert [site.name for site in sites] == ["time", "tokens", "blocks", *blocks, "head"]
    assert {tuple(site) for site in sites if not site.name.startswith(("blocks.0", "blocks.2"))} == {
        ("time", "time", "image"),
        ("tokens", "tokens", "joint"),
        ("blocks", "stack", "joint"),
        ("blocks.1", "block", "joint"),
        ("blocks.1.attn", "branch", "joint"),
        ("blocks.1.attn.kv", "kv", "image"),
        ("blocks.1.attn.core", "core", "joint"),
        ("blocks.1.mlp", "branch", "joint"),
        ("head", "head", "image"),
    }
    text = Segment("text", Grid(S), S)
    assert LATER["cogvideox 1.5"].layout(clip) == (text, Segment("image", Grid(2, 4, 6), 48))
    of_frames = LATER["cogvideox"]
    assert of_frames.layout(of_frames.transformer()) == (text, Segment("image", Grid(3, 4, 6), 72))

    inside.insert(-1, ".cross_attn")
    blocks = [f"blocks.{i}{part}" for i in range(DEPTH) for part in inside]
    sites = family_of(image).sites(image)
    assert [site.name for site in sites] == ["tokens", "time", "blocks", *blocks, "head"]
    assert {site.stream for site in sites} == {"image"}
    assert [site.name for site in sites if site.kind == "branch"][:3] == [
        "blocks.0.attn",
        "blocks.0.cross_attn",
        "blocks.0.mlp",
    ]
    assert LATER["pixart"].layout(image) == (Segment("image", Grid(1, 4, 6), 24),)
    for family in LATER.values():
        model = family.transformer()
        assert family_of(model).layout(model, family.inputs()) == family.layout(model)


@later
@dtypes
@pytest.mark.parametrize("policy", [TaylorSeer(3, 1, 3), STACK], ids=["taylorseer", "cg-taylor"])
def test_a_policy_that_never_skips_changes_nothing_and_one_that_does_saves(
    family: Family, dtype: torch.dtype, policy: Policy
) -> None:
    viewed, inputs = view(family.transformer().to(dtype)), in_type(family.inputs(), dtype)
    exact = run_steps(family, viewed, inputs, [])[0]
    assert torch.equal(run_steps(family, viewed, inputs, [policy.exact()])[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [policy])
    assert 0 < (x - exact).float().norm() < 0.1 * exact.float().norm()
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-2 5", "forecast": "3-4 6-7"}
    if isinstance(policy, TaylorSeer):
        branches = named(family.view.sites(viewed), "branch")
        assert receipt.sites == set(branches) and receipt.saved == 4 * len(branches)


@later
def test_taylorseer_holds_two_factors_of_all_rows(family: Family) -> None:
    viewed = view(family.transformer())
    _, trajectory = run_steps(family, viewed, family.inputs(), [TaylorSeer(3, 1, 3)])
    rows, branches = sum(segment.length for segment in family.layout(viewed)), 2 if family.frames else 3
    width = viewed.config.num_attention_heads * viewed.config.attention_head_dim
    assert trajectory.sessions[0].bytes() == 2 * 4 * B * width * rows * branches * DEPTH


@one_each
def test_compiled_blocks_under_a_policy(family: Family) -> None:
    plain, inputs = view(family.transformer()), family.inputs()
    expected = run_steps(family, plain, inputs, [TaylorSeer(3, 1, 3)])[0]
    compiled = view(family.transformer())
    torch._dynamo.reset()
    for block in compiled.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    assert torch.equal(run_steps(family, compiled, inputs, [TaylorSeer(3, 1, 3)])[0], expected)


@one_each
def test_a_gate_cuts_the_stack(family: Family) -> None:
    viewed, inputs = view(family.transformer()), family.inputs()
    exact = run_steps(family, viewed, inputs, [])[0]
    assert torch.equal(run_steps(family, viewed, inputs, [Gate(0.0)])[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [Gate(10.0)])
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 5 + ["computed"]
    assert not torch.equal(x, exact)


@later
@pytest.mark.parametrize("keys", ["kept", "lost"])
def test_selected_rows_equal_the_dense_run(family: Family, keys: str) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed, inputs, policy = view(family.transformer()), family.inputs(), RAS(warmup=1)
    trajectory = Trajectory(family.view.sites(viewed), [policy], 4)
    first, second = (Call(i, 4, 0.7, layout=family.layout(viewed)) for i in range(2))
    dense = family.channels_first(trajectory.leave(first, call(viewed, inputs, trajectory.run(first))))
    trajectory.guided(first, dense)
    (session,) = trajectory.sessions
    assert isinstance(session, Regions) and session.choice is not None
    run, rows = trajectory.run(second), session.choice.rows
    if keys == "lost":
        run = Run({name: handler for name, handler in run.handlers.items() if name not in session.streams})
    sparse = family.channels_first(call(viewed, inputs, run))
    image = second.layout[-1]
    assert rows.shape == (B, image.length - sum(policy.ends(image.length // 2)))
    chosen = torch.zeros(B, image.length, dtype=torch.bool).scatter(1, rows, True)
    mask = by_row(chosen, image, dense).expand_as(dense)
    error = (sparse - dense)[mask].abs().max() / dense.abs().max()
    assert error <= 2e-6 if keys == "kept" else error > 1e-4
    assert not sparse[~mask].any()


@one_each
def test_branches_run_on_some_rows(family: Family) -> None:
    """Every argument aligned with tokens can be cut: with all keys, some queries give some of the outputs."""
    viewed, inputs, index = view(family.transformer()), family.inputs(), torch.tensor([1, 4, 5, 17])
    kept: dict[str, Any] = {}

    def whole(name: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            k, v = kept.setdefault(name, (k, v))
            return fn(q, k, v)

        return core

    def image(x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else x[0]

    def some(fn: Any, x: Any, *args: Any) -> Any:
        out = fn(x, *args)
        few = x[:, index] if isinstance(x, Tensor) else x.rows("image", index)
        part = fn(few, *(a.rows("image", index) if hasattr(a, "rows") else a for a in args))
        assert torch.allclose(image(part), image(out)[:, index], rtol=1e-5, atol=1e-5)
        return out

    sites = family.view.sites(viewed)
    handlers = dict.fromkeys(named(sites, "branch"), some)
    handlers |= {name: whole(name) for name in named(sites, "core")}
    assert torch.equal(call(viewed, inputs, Run(handlers)), call(viewed, inputs))
    assert len(kept) == DEPTH


@later
def test_keys_bring_their_positions(family: Family) -> None:
    """Attention does not depend on the order of keys, if each takes its position along."""
    viewed, inputs = view(family.transformer()), family.inputs()

    def turned(fn: Any, kv: Any) -> Any:
        kv = fn(kv)
        rows = torch.arange(kv.k.shape[2]).flip(0)
        table = kv.position and kv.position.rows("image", rows)
        return kv._replace(k=kv.k[:, :, rows], v=kv.v[:, :, rows], position=table)

    out = call(viewed, inputs, Run(dict.fromkeys(named(family.view.sites(viewed), "kv"), turned)))
    assert torch.allclose(out, call(viewed, inputs), rtol=1e-4, atol=1e-5)
