"""The contract of views under policies: sites, layouts, and what a handler may do at each kind of site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.attention import Grouped
from ditkit.caching import RAS, ConfidentTaylor, TaylorSeer
from ditkit.caching.regional import Regions, by_row
from ditkit.core.errors import NoEffectError
from ditkit.core.grid import SEQUENCES, sequence
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, attended, named
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.family import family as family_of
from ditkit.hosts.view import view
from hosts_support import EVERY, FAMILIES, Inputs, blocks_of, call, layout_of, run_steps, shared, sites_of
from policies_support import Gate, Gated, RowSelector, SelectedRows

SITES = Path(__file__).with_name("sites.txt")
every = pytest.mark.parametrize("name", EVERY)
one_each = pytest.mark.parametrize("name", FAMILIES)
of_bfloat16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def frozen() -> dict[str, list[str]]:
    """Lines of `sites.txt` by family: name, kind, stream, width, heads, attention, keys of each site."""
    parts = [part.strip().splitlines() for part in SITES.read_text().split("\n\n")]
    return {lines[0].strip("[]"): lines[1:] for lines in parts}


def described(model: Any) -> list[str]:
    """Sites as lines of `sites.txt`."""
    lines = []
    for s in sites_of(model):
        heads = f" {s.heads} heads" if s.heads else ""
        over = f" over {' '.join(s.over)}" if s.over else ""
        kind = "" if s.attention == "full" else f" {s.attention}"
        lines.append(f"{s.name} {s.kind} {s.stream} {s.width}{heads}{kind}{over}")
    return lines


@one_each
def test_sites_are_frozen(name: str) -> None:
    assert described(shared(name)[0]) == frozen().get(name)


@every
def test_the_layout_is_of_the_rows_that_the_sites_see(name: str) -> None:
    """Every core that attends to all of its sequence has the keys of that; those of axes make up the clip."""
    viewed, inputs, _ = shared(name)
    layout, rows = layout_of(viewed, inputs), dict[str, int]()

    def count(site: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Any:
            rows[site] = k.shape[2] if site in cores else k.shape[2] * len(k) // len(inputs["timestep"])
            return fn(q, k, v, *masks)

        return core

    cores, streams = attended(sites_of(viewed)), dict[str, str]()
    streams |= {site.name: site.stream for site in sites_of(viewed) if site.kind == "core"}
    call(viewed, inputs, Run({site: count(site) for site in streams}))
    assert rows == {
        site: sum(part.length for part in sequence(layout, stream)) for site, stream in streams.items()
    }
    assert streams and {*streams.values()} <= {*SEQUENCES}


CACHES: Mapping[str, Policy] = {
    "taylorseer": TaylorSeer(3, 1, 3),
    "cg-taylor": ConfidentTaylor(schedule=(0, 1, 2, 5)),
}


def branch_bytes(model: Any, inputs: Inputs) -> int:
    """What all branches return, which is what a cache keeps of one evaluation."""
    sizes: list[int] = []

    def weigh(fn: Any, *args: Any) -> Any:
        out = fn(*args)
        parts = [out] if isinstance(out, Tensor) else list(out)
        sizes.append(sum(part.nbytes for part in parts))
        return out

    call(model, inputs, Run(dict.fromkeys(named(sites_of(model), "branch"), weigh)))
    return sum(sizes)


@one_each
@of_bfloat16
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_never_skips_changes_nothing_and_one_that_does_saves(
    name: str, dtype: torch.dtype, cache: str
) -> None:
    family, (viewed, inputs, _), policy = FAMILIES[name], shared(name, dtype), CACHES[cache]
    exact = run_steps(family, viewed, inputs, [], steps=7)[0]
    assert torch.equal(run_steps(family, viewed, inputs, [policy.exact()], steps=7)[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [policy], steps=7)
    assert 0 < (x - exact).float().norm() < 0.1 * exact.float().norm()
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-2 5", "forecast": "3-4 6"}
    if cache == "taylorseer":
        branches = named(sites_of(viewed), "branch")
        assert receipt.sites == set(branches) and receipt.saved == 3 * len(branches)
        assert trajectory.sessions[0].bytes() == 2 * branch_bytes(viewed, inputs)


@one_each
def test_a_gate_cuts_the_stack(name: str) -> None:
    family, (viewed, inputs, _) = FAMILIES[name], shared(name)
    exact = run_steps(family, viewed, inputs, [], steps=5)[0]
    assert torch.equal(run_steps(family, viewed, inputs, [Gate(0.0)], steps=5)[0], exact)
    x, trajectory = run_steps(family, viewed, inputs, [Gate(10.0)], steps=5)
    gated = trajectory.sessions[0]
    assert isinstance(gated, Gated)
    assert gated.log == ["computed"] * 2 + ["skipped"] * 2 + ["computed"]
    assert not torch.equal(x, exact)


# Some rows only


Selected = Callable[[Any], tuple[Tensor, tuple[str, ...]]]


def is_axial(model: Any) -> bool:
    """Return whether attention runs along axes, so that no rows may be taken out."""
    return any(site.attention == "axial" for site in sites_of(model))


def marked(rows: Tensor, model: Any, inputs: Inputs, v: Tensor) -> Tensor:
    """A mask of the values that belong to `rows`, [R] or [B, R], of a prediction."""
    image = next(part for part in layout_of(model, inputs) if part.stream == "image")
    each = rows.expand(len(v), -1)
    return by_row(torch.zeros(len(v), image.length, dtype=torch.bool).scatter(1, each, True), image, v)


def predicted(model: Any, inputs: Inputs, v: Tensor) -> Tensor:
    """A prediction as policies see it: channels at axis 1, and no rows of pictures that are referred to."""
    if v.ndim > 3:
        return v.movedim(family_of(model).channel_axis, 1)
    return v[:, : next(part for part in layout_of(model, inputs) if part.stream == "image").length]


@every
@pytest.mark.parametrize("policy", [RowSelector(0.5, 1), RAS(warmup=1)], ids=["the same rows", "rows each"])
def test_selected_rows_equal_the_dense_run(name: str, policy: Policy) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    viewed, inputs, expected = shared(name)
    layout = layout_of(viewed, inputs)
    if is_axial(viewed):
        with pytest.raises(NoEffectError, match="no site that it can use"):
            Trajectory(sites_of(viewed), [RAS(warmup=1)], 4)
        return
    trajectory = Trajectory(sites_of(viewed), [policy], 4)
    first, second = (Call(i, 4, 0.7, layout=layout) for i in range(2))
    dense = trajectory.leave(first, call(viewed, inputs, trajectory.run(first)))
    assert torch.equal(dense, expected)
    dense = predicted(viewed, inputs, dense)
    trajectory.guided(first, dense)
    (session,) = trajectory.sessions
    if isinstance(session, Regions):
        assert session.choice is not None
        rows, keeping = session.choice.rows, set(session.streams)
    else:
        assert isinstance(session, SelectedRows) and session.active is not None
        rows, keeping = session.active, set(session.cores)
    run = trajectory.run(second)
    lost = Run({site: handler for site, handler in run.handlers.items() if site not in keeping})
    mask = marked(rows, viewed, inputs, dense).expand_as(dense)
    for some, is_near in ((lost, False), (run, True)):
        sparse = predicted(viewed, inputs, call(viewed, inputs, some))
        error = (sparse - dense)[mask].abs().max() / dense.abs().max()
        assert error <= 3e-6 if is_near else error > 1e-4
        assert not sparse[~mask].any()


@one_each
def test_branches_run_on_some_rows(name: str) -> None:
    """Every argument aligned with tokens can be cut: with all keys, some queries give some of the outputs."""
    viewed, inputs, expected = shared(name)
    sites, index = sites_of(viewed), torch.tensor([0, 2] if is_axial(viewed) else [1, 4, 5, 13])
    kept: dict[str, Any] = {}

    def whole(site: str) -> Any:
        def core(fn: Any, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Any:
            return fn(q, *kept.setdefault(site, (k, v, *masks)))

        return core

    def some(stream: str) -> Any:
        def branch(fn: Any, x: Any, *args: Any) -> Any:
            out = fn(x, *args)
            few = x[:, index] if isinstance(x, Tensor) else x.rows(stream, index)
            part = fn(few, *(a.rows(stream, index) if hasattr(a, "rows") else a for a in args))
            pairs = [(part, out)] if isinstance(out, Tensor) else list(zip(part, out, strict=True))
            for i, (cut, of) in enumerate(pairs):
                expected = of if i else of[:, index]
                assert torch.allclose(cut, expected, rtol=1e-5, atol=1e-5)
            return out

        return branch

    streams = {site.name: site.stream for site in sites if site.kind == "branch" and site.stream != "text"}
    inner = [site for site in streams if site.startswith(tuple(named(sites, "block")))]
    # a joint sequence in two tensors is cut by the image's rows, one in a single tensor anywhere
    handlers = {site: some("image") for site in inner} | {site: whole(site) for site in named(sites, "core")}
    assert torch.equal(call(viewed, inputs, Run(handlers)), expected)
    assert len(kept) == len(named(sites, "core"))


@one_each
def test_keys_bring_their_positions(name: str) -> None:
    """Attention does not depend on the order of keys, if each takes its position along."""
    viewed, inputs, expected = shared(name)
    layout = layout_of(viewed, inputs)
    image = next(part for part in layout if part.stream == "image").length

    def turned(stream: str) -> Any:
        parts = sequence(layout, stream)
        start = sum(part.length for part in parts[: [p.stream for p in parts].index("image")])

        def keys(fn: Any, kv: Any) -> Any:
            kv = fn(kv)
            rows = torch.arange(kv.k.shape[2])
            if is_axial(viewed):
                rows = rows.flip(0)
            # a mask of ragged text tells of the text, so that only the image's keys may move
            rows[start : start + image] = rows[start : start + image].flip(0)
            return kv._replace(k=kv.k[:, :, rows], v=kv.v[:, :, rows], position=_moved(kv.position, rows))

        return keys

    handlers = {site.name: turned(site.stream) for site in sites_of(viewed) if site.kind == "kv"}
    found = call(viewed, inputs, Run(handlers))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _moved(table: Any, rows: Tensor) -> Any:
    """Rows of a table of positions: a pair of [L, K], one [1, L, K], or a tuple that knows its rows."""
    if isinstance(table, Tensor):
        return table[:, rows]
    if hasattr(table, "rows"):
        return table.rows("image", rows)
    return table and tuple(part[rows] for part in table)


@one_each
def test_a_pattern_is_exact_when_neutral_and_where_it_sees_all(name: str) -> None:
    """Rows in the order of blocks, masks of ragged text, and text before or after the image."""
    family, (viewed, inputs, _) = FAMILIES[name], shared(name)
    pattern = Grouped(group=(2, 2, 2), block=8, kernel="cpu", reach=8)
    if is_axial(viewed):
        with pytest.raises(NoEffectError, match="no site that it can use"):
            run_steps(family, viewed, inputs, [pattern], steps=1)
        return
    if not any(s.attention == "full" for s in sites_of(viewed) if s.kind == "core"):
        pytest.skip("a kernel that divides by sqrt(K) would be another model")
    exact, _ = run_steps(family, viewed, inputs, [pattern.exact()], steps=1)
    found, trajectory = run_steps(family, viewed, inputs, [pattern], steps=1)
    assert torch.equal(exact, run_steps(family, viewed, inputs, [], steps=1)[0])
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-4)
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "", "sparse": "0"}


@pytest.mark.parametrize("name", ["cogvideox"])
def test_compiled_blocks_under_a_policy(name: str) -> None:
    family, (viewed, inputs, _) = FAMILIES[name], shared(name)
    expected = run_steps(family, viewed, inputs, [TaylorSeer(2, 1, 1)], steps=4)[0]
    compiled = view(family.transformer())
    torch._dynamo.reset()
    for block in blocks_of(compiled):
        block.compile(fullgraph=True, backend="eager")
    assert torch.equal(run_steps(family, compiled, inputs, [TaylorSeer(2, 1, 1)], steps=4)[0], expected)
