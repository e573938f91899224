"""LaMamba-Diff's own promises: paths, windows, stages, sizes; numbers of the published code are in golden/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.attention.pattern import Pattern
from ditkit.bench.macs import count_macs
from ditkit.caching import TaylorSeer
from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError, NoEffectError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.policy import Policy
from ditkit.core.run import Run
from ditkit.models.lamamba import LaMamba, LaMambaBlock, LaMambaConfig
from ditkit.nn.scan import PATHS, Paths, SelectiveScan2D, snake_paths
from ditkit.nn.windows import WindowAttention, cut_windows, join_windows, relative_places, seam_mask
from ditkit.ops.selective_scan import scan_reference
from ditkit.sample import ClassifierFree, Ddim, sample
from models_support import perturbed

PUBLISHED = {"XL": (45.55, 0.28, 181.6, 1.1), "S": (2.41,)}
"""GMAC at 256 pixels and of its scans, and the same at 512. Only XL is the paper's, as the code counts it."""
PARAMETERS = {"L": 471.9e6, "B": 133.1e6, "S": 33.7e6}
"""Of the sizes that are ours; XL's are in golden/."""
GRIDS = [Grid(1, 4, 4), Grid(1, 6, 4), Grid(1, 3, 5), Grid(1, 4, 7), Grid(1, 1, 6)]


def awake(**changes: Any) -> LaMamba:
    torch.manual_seed(1)
    return perturbed(LaMamba(replace(LaMambaConfig.tiny(), **changes)).double(), 0.2)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_sizes(name: str) -> None:
    with torch.device("meta"):
        assert parameter_count(LaMamba.preset(name)) == pytest.approx(PARAMETERS[name], rel=2e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiplications_are_linear_in_the_tokens(name: str) -> None:
    """Four times the tokens at 512 pixels take four times as many: all stages have windows."""
    told = Cond(label=torch.zeros(1, dtype=torch.long, device="meta"))
    found: list[float] = []
    for size in (32, 64)[: len(PUBLISHED[name]) // 2 or 1]:
        with torch.device("meta"), torch.no_grad():
            model = LaMamba.preset(name, size=size).eval()
            count = count_macs(model, torch.empty(1, 4, size, size), torch.empty(1), told)
        found += [(count.total - count.by_kind["scan"]) / 1e9, count.by_kind["scan"] / 1e9]
    for place, (own, expected) in enumerate(zip(found, PUBLISHED[name], strict=False)):
        assert own == pytest.approx(expected, rel=3e-3 if place % 2 == 0 else 2e-2)  # two digits of the scans
    if name == "XL":
        assert sum(found[2:]) / sum(found[:2]) == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.height}x{grid.width}")
def test_paths_visit_every_token_and_go_from_neighbour_to_neighbour(grid: Grid) -> None:
    order = snake_paths(grid)
    cells = grid.coordinates()[:, 1:]
    for path in order:
        assert sorted(path.tolist()) == list(range(grid.length))
        assert (cells[path][1:] - cells[path][:-1]).abs().sum(1).eq(1).all()
    assert torch.equal(order[1], order[0].flip(0)) and torch.equal(order[3], order[2].flip(0))
    assert cells[order[0][0]].tolist() == [0, 0] and cells[order[2][0]].tolist() == [grid.height - 1, 0]
    paths, x = Paths.of(grid), torch.randn(2, grid.length, 3)
    along = paths.split(x)
    assert torch.equal(along, torch.stack([x[:, path] for path in order], 1))
    assert torch.allclose(paths.sum(along), PATHS * x)


def test_a_scan_of_a_picture_is_its_formula_path_by_path() -> None:
    """On sides that differ, so that no transpose goes unnoticed; the four are summed, not averaged, before the norm."""
    torch.manual_seed(0)
    scan, grid = perturbed(SelectiveScan2D(6, states=2).double(), 0.2), Grid(1, 3, 5)
    x = torch.randn(2, 15, 6, dtype=torch.float64)
    u, z = scan.inner(x).chunk(2, -1)
    u = torch.nn.functional.silu(scan.conv(u, grid))
    total = torch.zeros_like(u)
    for k, path in enumerate(snake_paths(grid)):
        parts = u[:, path] @ scan.project[k].T
        r, B, C = parts[..., :1], parts[..., 1:3], parts[..., 3:]
        delta = r @ scan.step[k].T
        own = (v[k : k + 1] for v in (-scan.log_decay.exp(), scan.skip, scan.step_bias))
        A, D, bias = own
        y = scan_reference(*(v[:, None] for v in (u[:, path], delta)), A, B[:, None], C[:, None], D, bias)[
            :, 0
        ]
        for place, token in enumerate(path.tolist()):
            total[:, token] += y[:, place]
    expected = scan.outer(scan.norm(total) * torch.nn.functional.silu(z))
    assert torch.allclose(scan(x, grid), expected, atol=1e-12)


def test_fresh_steps_lie_between_their_ends() -> None:
    steps = torch.nn.functional.softplus(SelectiveScan2D(64).step_bias)
    assert steps.min() > 0.99e-3 and steps.max() < 1.01e-1
    assert 0.4 < (steps < 1e-2).float().mean() < 0.6


def test_a_window_as_large_as_the_picture_is_dense_attention_with_a_relative_bias() -> None:
    torch.manual_seed(0)
    attention, side = perturbed(WindowAttention(8, 2, 4).double(), 0.3), 4
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
    out = torch.zeros(2, 16, 2, 4, dtype=torch.float64)
    for head in range(2):
        scores = q[:, :, head] @ k[:, :, head].mT / 4**0.5
        for i in range(16):
            for j in range(16):
                down, right = i // side - j // side, i % side - j % side
                scores[:, i, j] += attention.bias[(down + 3) * 7 + right + 3, head]
        out[:, :, head] = scores.softmax(-1) @ v[:, :, head]
    assert torch.allclose(attention(x, Grid(1, 4, 4)), attention.out(out.flatten(2)), atol=1e-12)


def test_no_attention_crosses_a_seam() -> None:
    """By gradients: under a shift a token sees those of its window that were its neighbours before the roll."""
    attention, grid = perturbed(WindowAttention(4, 2, 4, shift=2), 0.3), Grid(1, 8, 12)
    x = torch.randn(1, grid.length, 4, requires_grad=True)
    out = attention(x, grid)
    for token in (0, 5, 13, 37, 95):
        (grad,) = torch.autograd.grad(out[0, token].sum(), x, retain_graph=True)
        reached = grad[0].any(-1).view(8, 12).nonzero()
        row, column = divmod(token, 12)
        rows = [i for i in range(8) if (i - 2) // 4 == (row - 2) // 4]
        columns = [j for j in range(12) if (j - 2) // 4 == (column - 2) // 4]
        assert reached.tolist() == [[i, j] for i in rows for j in columns]


def test_windows_are_cut_and_joined() -> None:
    x, grid = torch.randn(2, 96, 3), Grid(1, 8, 12)
    for shift in (0, 1, 2):
        windows = cut_windows(x, grid, 4, shift)
        assert windows.shape == (2, 6, 16, 3)
        assert torch.equal(join_windows(windows, grid, 4, shift), x)
    assert relative_places(3).unique().tolist() == list(range(25))
    assert seam_mask(grid, 4, 2).diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 10}, "size=10 does not divide by 4"),
        ({"size": 24, "patch": 2, "window": 3}, None),
        ({"size": 24, "window": 8}, "size=24 has a stage of 12 x 12 tokens, which window=8 does not divide"),
        ({"size": 24, "window": 8, "mixer": "scan"}, None),
        ({"width": 6, "heads": 2}, "width=6 should divide by 4"),
        ({"width": 8, "heads": 3}, "width=8 does not divide into heads=3"),
        ({"mixer": "conv"}, "unknown mixer 'conv'"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert replace(LaMambaConfig.tiny(), **changes)
        return
    with pytest.raises(DitkitError, match=message) as caught:
        replace(LaMambaConfig.tiny(), **changes)
    assert "\n" not in str(caught.value)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown LaMamba preset 'H'"):
        LaMamba.preset("H")
    model = awake()
    with pytest.raises(ShapeError, match=r"input \[1, 3, 8, 12\] should be \['B', 3, 8, 8\]; `resized`"):
        model(torch.randn(1, 3, 8, 12), torch.rand(1), Cond(label=torch.tensor([1])))
    with pytest.raises(ShapeError, match="windows of 4 x 4 do not divide a grid of 8 x 6 tokens"):
        WindowAttention(4, 2, 4)(torch.randn(1, 48, 4), Grid(1, 8, 6))
    with pytest.raises(ShapeError, match="expected one frame"):
        snake_paths(Grid(2, 4, 4))


def test_fresh_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    config, grid = LaMambaConfig.tiny(), Grid(1, 8, 8)
    block = LaMambaBlock(8, 32, True, config, 8, odd=True)
    torch.nn.init.zeros_(block.modulation.weight)
    torch.nn.init.zeros_(block.modulation.bias)
    x = torch.randn(2, 64, 8)
    assert torch.equal(block(x, torch.randn(2, 32), (grid, Paths.of(grid))), x)
    fresh = LaMamba(config)
    assert not any(
        v.any()
        for part in fresh.modules()
        if isinstance(part, LaMambaBlock)
        for v in part.modulation.parameters()
    )


def test_the_middle_adds_to_what_it_is_given() -> None:
    """Each half up adds a level's output on the way down, last in, first out; the middle has a residual of its own."""
    model, seen = awake(), {}

    def noted(name: str, add: Tensor | None = None) -> Any:
        def handler(fn: Any, x: Tensor, *args: Any) -> Any:
            seen[name] = x, fn(x, *args)
            return seen[name][1]

        return handler

    names = [f"levels.{i}" for i in range(9)] + ["up.0", "up.1", "head"]
    x, cond = torch.randn(1, 3, 8, 8).double(), Cond(label=torch.tensor([1]))
    with torch.no_grad():
        model(x, torch.rand(1), cond, Run({name: noted(name) for name in names}))
    given, out = ({name: pair[side] for name, pair in seen.items()} for side in (0, 1))
    below = {5: given["levels.4"] + out["levels.4"], 6: out["levels.5"], 7: out["up.0"].x, 8: out["up.1"].x}
    for level, before in below.items():
        assert torch.equal(given[f"levels.{level}"], before + out[f"levels.{8 - level}"])


@pytest.mark.parametrize("mixer", ["scan", "windows"])
def test_a_mixer_alone_has_no_trace_of_the_other(mixer: Any) -> None:
    model = awake(mixer=mixer)
    names = {site.name.rpartition(".")[2] for site in model.sites() if site.kind == "branch"}
    assert names == {"scan" if mixer == "scan" else "attn", "mlp"}
    assert any("scan" in name for name, _ in model.named_parameters()) == (mixer == "scan")
    out = model(torch.randn(2, 3, 8, 8).double(), torch.rand(2), Cond(label=torch.tensor([1, 2])))
    assert out.shape == (2, 6, 8, 8) and out.isfinite().all()


def test_resized_weights_hold_at_another_size() -> None:
    model = awake(size=16)
    same, larger = model.resized(16), model.resized(32)
    weights, cond = model.float().state_dict(), Cond(label=torch.tensor([1]))
    assert torch.allclose(same.positions, weights.pop("positions"), atol=1e-6)
    assert all(torch.equal(same.state_dict()[name], v) for name, v in weights.items())
    assert larger.positions.shape == (32 * 32, 8) and larger.config.size == 32
    assert larger.float()(torch.randn(1, 3, 32, 32), torch.rand(1), cond).shape == (1, 6, 32, 32)
    with pytest.raises(ShapeError, match=r"size=8 would have windows of \[4, 4, 2\]"):
        model.resized(8)


def test_sites_by_name_and_stage() -> None:
    model = LaMamba(replace(LaMambaConfig.tiny(), depth=(1, 1, 1, 1)))
    sites = {site.name: site for site in model.sites()}
    stages = [sites[f"levels.{i}"].stage for i in range(9)]
    widths = [sites[f"levels.{i}"].width for i in range(9)]
    assert stages == [0, 1, 2, 2, 2, 2, 2, 1, 0] and widths == [8, 16, 32, 32, 32, 32, 32, 16, 8]
    inside = [
        (name.removeprefix("levels.0."), sites[name].kind) for name in sites if name.startswith("levels.0.")
    ]
    expected = {
        "0": "block",
        "0.modulation": "modulation",
        "0.scan": "branch",
        "0.attn": "branch",
        "0.mlp": "branch",
    }
    assert dict(inside) == {**expected, "0.mlp.inner": "inner"}
    assert [name for name in sites if "." not in name or name.startswith(("down", "up", "head"))] == [
        "time", "tokens", "down.0", "down.1", "up.0", "up.1", "head", "head.modulation",
    ]  # fmt: skip
    ordered = [site.name for site in sites.values() if site.kind == "branch" and site.ordered]
    assert len(ordered) == 18 and not any(name.endswith("mlp") for name in ordered)


def drawn(model: LaMamba, policies: tuple[Policy, ...] = ()) -> Tensor:
    return sample(
        model,
        Cond(label=torch.tensor([1])),
        range(1),
        steps=4,
        solver=Ddim(),
        guidance=ClassifierFree(2.0),
        policies=policies,
    ).samples


def test_a_cache_works_on_every_branch_of_every_stage() -> None:
    model = awake().float()
    exact = drawn(model)
    assert torch.equal(drawn(model, (TaylorSeer(interval=1),)), exact)
    close = (drawn(model, (TaylorSeer(interval=2, order=1),)) - exact).norm() / exact.norm()
    assert 0 < close < 0.5


@pytest.mark.parametrize("kind", every(Policy), ids=lambda kind: kind.__name__)
def test_what_moves_rows_is_refused_by_name_and_others_act_or_are(kind: type[Policy]) -> None:
    policy, model = kind.small(Grid(1, 8, 8)), awake(depth=(1, 1, 1, 1)).float()
    moves = isinstance(policy, Pattern) or kind.__name__ in ("RAS", "ConfidentTaylor")
    try:
        assert drawn(model, (policy,)).isfinite().all() and not moves
    except (ConfigError, NoEffectError) as error:
        assert str(error).startswith(f"{kind.__name__}: ") and kind is not TaylorSeer
