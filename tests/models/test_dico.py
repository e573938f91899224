"""DiCo's own promises: its levels, its gate of channels, what convolutions keep; numbers of the code are in golden/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.pattern import Pattern
from ditkit.bench.macs import count_macs
from ditkit.caching import TaylorSeer
from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError, NoEffectError, ShapeError
from ditkit.core.grid import Grid, patchify
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Run
from ditkit.models.dico import DiCo, DiCoBlock, DiCoConfig
from ditkit.nn.convolution import ChannelAttention, DepthwiseBranch, TextConv, to_map, to_rows
from ditkit.sample import ClassifierFree, Ddim, sample
from models_support import perturbed

README_GMAC = {"S": 4.25, "B": 16.88, "L": 60.24, "XL": 87.30, "H": 194.15}
"""Of one forward pass at 256 pixels, from the repository."""
GMAC = {"S": (4.24, 16.90), "B": (16.86,), "L": (60.17,), "XL": (87.22, 347.9), "H": (194.0,)}
"""The same without biases, at 256 and 512 pixels."""


def awake(**changes: Any) -> DiCo:
    torch.manual_seed(1)
    return perturbed(DiCo(replace(DiCoConfig.tiny(), **changes)).double(), 0.2)


def constant_gates(model: nn.Module) -> nn.Module:
    """Cut the gates of channels off from what they pool, so that a convolution sees its neighbourhood alone."""
    for part in model.modules():
        if isinstance(part, ChannelAttention):
            nn.init.zeros_(part.project.weight)
    return model


@pytest.mark.parametrize("name", GMAC)
def test_macs_of_the_papers_sizes(name: str) -> None:
    told = Cond(label=torch.zeros(1, dtype=torch.long, device="meta"))
    with torch.device("meta"), torch.no_grad():
        model = DiCo.preset(name).eval()
        sizes = [torch.empty(1, 4, side, side) for side in (32, 64)[: len(GMAC[name])]]
        found = tuple(count_macs(model, x, torch.empty(1), told).total / 1e9 for x in sizes)
    assert found == pytest.approx(GMAC[name], rel=1e-3)
    assert abs(found[0] - README_GMAC[name]) < 3e-3 * README_GMAC[name] + 0.005  # it has two decimals


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown DiCo preset 'XXL'"):
        DiCo.preset("XXL")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 10}, "size=10 does not divide by 4"),
        ({"width": 7}, "width=7 should be even"),
        ({"depth": (1, 1)}, "5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        replace(DiCoConfig.tiny(), **changes)


def test_a_fresh_network_is_zero_and_its_blocks_are_the_identity() -> None:
    model = DiCo(DiCoConfig.tiny()).eval()
    x = torch.randn(2, 3, 8, 12)
    assert not model(x, torch.tensor([3, 900]), Cond(label=torch.tensor([1, 5]))).any()
    rows, grid = torch.randn(2, 24, 16), Grid(1, 4, 6)
    assert torch.equal(model.levels[1][0](rows, torch.randn(2, 16), grid), rows)


def test_the_gate_is_the_identity_or_a_half_at_its_ends() -> None:
    attention, u = ChannelAttention(8), torch.randn(2, 12, 8)
    nn.init.zeros_(attention.project.weight)
    nn.init.constant_(attention.project.bias, torch.inf)
    assert torch.equal(attention(u), u)
    nn.init.zeros_(attention.project.bias)
    assert torch.equal(attention(u), u * 0.5)


def test_the_gate_is_one_number_a_channel_from_the_mean_of_all_rows() -> None:
    attention, u = ChannelAttention(8).double(), torch.randn(2, 12, 8, dtype=torch.float64)
    for b in range(2):
        pooled = sum(u[b, i] for i in range(12)) / 12
        expected = 1 / (1 + torch.exp(-(attention.project.weight @ pooled + attention.project.bias)))
        assert torch.allclose(attention(u)[b], u[b] * expected, atol=1e-14)
    assert torch.allclose(attention(u[:, torch.randperm(12)]).sum(1), attention(u).sum(1), atol=1e-14)


def test_the_branch_is_its_formula_pixel_by_pixel() -> None:
    branch, grid = DepthwiseBranch(4).double(), Grid(1, 3, 5)
    x = torch.randn(1, 15, 4, dtype=torch.float64)
    inner = branch.inner(x)[0].unflatten(0, (3, 5))
    u = torch.zeros(3, 5, 4, dtype=torch.float64)
    for r in range(3):
        for c in range(5):
            total = branch.depthwise.bias.clone()
            for i in range(3):
                for j in range(3):
                    if 0 <= r + i - 1 < 3 and 0 <= c + j - 1 < 5:
                        total = total + branch.depthwise.weight[:, 0, i, j] * inner[r + i - 1, c + j - 1]
            u[r, c] = 0.5 * total * (1 + torch.erf(total / 2**0.5))
    gate = torch.sigmoid(branch.attention.project(u.mean((0, 1))))
    assert torch.allclose(branch(x, grid)[0], branch.outer(u * gate).flatten(0, 1), atol=1e-13)


def test_a_block_commutes_with_a_shift_away_from_the_border() -> None:
    block: Any = constant_gates(perturbed(DiCoBlock(8, 2).double(), 0.3))
    grid, c = Grid(1, 10, 12), torch.randn(2, 8).double()
    x = torch.randn(2, 8, 10, 12, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return to_map(block(to_rows(x), c, grid), grid)

    shifted = run(x.roll((2, 3), (2, 3)))
    assert torch.allclose(shifted[..., 3:-1, 4:-1], run(x).roll((2, 3), (2, 3))[..., 3:-1, 4:-1], atol=1e-12)
    assert not torch.allclose(shifted, run(x).roll((2, 3), (2, 3)))  # zeros stand around the picture


def test_the_network_commutes_with_a_shift_by_four_pixels_away_from_the_border() -> None:
    model = constant_gates(awake(depth=(1, 1, 1, 1, 1), width=4))
    x, t, cond = torch.randn(1, 3, 64, 64).double(), torch.tensor([0.5]), Cond(label=torch.tensor([2]))
    with torch.no_grad():
        plain, shifted = model(x, t, cond), model(x.roll((4, 4), (2, 3)), t, cond)
        odd = model(x.roll((1, 1), (2, 3)), t, cond)
    inside = (..., slice(28, 36), slice(28, 36))
    assert torch.allclose(shifted[inside], plain.roll((4, 4), (2, 3))[inside], atol=1e-12)
    assert not torch.allclose(odd[inside], plain.roll((1, 1), (2, 3))[inside], atol=1e-6)


def test_pixels_into_channels_and_back() -> None:
    x = torch.randn(2, 3, 4, 6)
    rows = patchify(x, 2)
    assert torch.equal(to_map(rows, Grid(1, 2, 3)), F.pixel_unshuffle(x, 2))
    assert torch.equal(F.pixel_shuffle(to_map(rows, Grid(1, 2, 3)), 2), x)


def test_levels_see_their_own_conditioning_vector() -> None:
    """The last level is told what the second is, at full resolution; c1 reaches the first alone, c3 the bottleneck."""
    model = awake()
    c = [torch.randn(1, width, dtype=torch.float64, requires_grad=True) for width in model.config.widths[:3]]
    reached: dict[str, list[bool]] = {}

    def noted(name: str) -> Any:
        def handler(fn: Any, *args: Any) -> Any:
            parts = fn(*args)
            whole = parts if isinstance(parts, Tensor) else parts.whole()
            grads = torch.autograd.grad(whole.sum(), c, retain_graph=True, allow_unused=True)
            reached[name] = [g is not None and bool(g.any()) for g in grads]
            return parts

        return handler

    names = [site.name for site in model.sites() if site.kind == "modulation"]
    run = Run({"time": lambda fn, *args: tuple(c), **{name: noted(name) for name in names}})
    model(torch.randn(1, 3, 8, 8).double(), torch.rand(1), Cond(label=torch.tensor([1])), run)
    first, second, third = [True, False, False], [False, True, False], [False, False, True]
    of_levels = (first, second, third, second, second)
    expected = {name: of_levels[int(name.split(".")[1])] for name in names if name.startswith("levels.")}
    assert reached == {**expected, "head.modulation": second}
    assert model.levels[4][0].mlp.out.out_features == 2 * model.config.width


def test_kernels_of_text_equal_two_loops() -> None:
    conv, grid = TextConv(6, 5).double(), Grid(1, 4, 7)
    x, text = torch.randn(3, 28, 6).double(), torch.randn(3, 77, 5).double()
    out = to_map(conv(x, text, grid), grid)
    for b in range(3):
        tokens = conv.outer(F.gelu(conv.inner(text[b])))
        tokens = torch.cat([tokens, *[tokens[-1:]] * 4])
        for channel in range(6):
            kernel = tokens[:, channel].reshape(1, 1, 9, 9)
            alone = F.conv2d(to_map(x, grid)[b, channel][None, None], kernel, padding=4)
            assert torch.allclose(out[b, channel], alone[0, 0], atol=1e-12)
    with pytest.raises(ShapeError, match="82 text tokens, expected at most 9 x 9"):
        conv(x, torch.randn(3, 82, 5).double(), grid)


def test_any_size_that_divides_by_four() -> None:
    model = awake()
    cond = Cond(label=torch.tensor([1]))
    assert model(torch.randn(1, 3, 12, 20).double(), torch.rand(1), cond).shape == (1, 6, 12, 20)
    with pytest.raises(ShapeError, match="height=10"):
        model(torch.randn(1, 3, 10, 8).double(), torch.rand(1), cond)


def test_sites_by_name_and_stage() -> None:
    model = DiCo(replace(DiCoConfig.tiny(), depth=(1, 1, 1, 1, 1)))
    found = [(site.name, site.kind, site.width, site.stage) for site in model.sites()]

    def block(i: int, width: int, stage: int) -> list[tuple[str, str, int, int]]:
        at = f"levels.{i}.0"
        return [
            (f"levels.{i}", "stack", width, stage),
            (at, "block", width, stage),
            (f"{at}.modulation", "modulation", width, stage),
            (f"{at}.conv", "branch", width, stage),
            (f"{at}.mlp", "branch", width, stage),
            (f"{at}.mlp.inner", "inner", 2 * width, stage),
        ]

    assert found == [
        ("time", "time", 0, 0),
        ("tokens", "tokens", 8, 0),
        *block(0, 8, 0),
        ("down.0", "tokens", 16, 1),
        *block(1, 16, 1),
        ("down.1", "tokens", 32, 2),
        *block(2, 32, 2),
        ("up.0", "tokens", 16, 1),
        *block(3, 16, 1),
        ("up.1", "tokens", 16, 0),
        *block(4, 16, 0),
        ("head", "head", 16, 0),
        ("head.modulation", "modulation", 16, 0),
    ]
    assert [segment.grid for segment in model.layout((3, 8, 12))] == [
        Grid(1, 8, 12),
        Grid(1, 4, 6),
        Grid(1, 2, 3),
    ]


def drawn(model: DiCo, policies: tuple[Policy, ...] = (), max_bytes: int | None = None) -> Tensor:
    return sample(
        model,
        Cond(label=torch.tensor([1, 4])),
        range(2),
        steps=8,
        solver=Ddim(),
        guidance=ClassifierFree(2.0, channels=2),
        policies=policies,
        max_bytes=max_bytes,
    ).samples


def test_a_cache_works_on_every_branch_of_every_stage() -> None:
    model = awake().float()
    exact = drawn(model)
    assert torch.equal(drawn(model, (TaylorSeer(interval=1),)), exact)
    close = (drawn(model, (TaylorSeer(interval=2, order=1),)) - exact).norm() / exact.norm()
    assert 0 < close < 0.5
    branches = [site for site in model.sites() if site.kind == "branch"]
    need = 2 * 2 * 2 * 4 * sum({0: 64, 1: 16, 2: 4}[site.stage] * site.width for site in branches)
    drawn(model, (TaylorSeer(interval=2, order=1),), max_bytes=need)
    with pytest.raises(ConfigError, match=f"would hold {need:,} bytes"):
        drawn(model, (TaylorSeer(interval=2, order=1),), max_bytes=need - 1)


@pytest.mark.parametrize("kind", every(Policy), ids=lambda kind: kind.__name__)
def test_what_moves_rows_is_refused_by_name_and_others_act_or_are(kind: type[Policy]) -> None:
    policy, model = kind.small(Grid(1, 8, 8)), awake().float()
    moves = isinstance(policy, Pattern) or kind.__name__ in ("RAS", "ConfidentTaylor")
    try:
        assert drawn(model, (policy,)).isfinite().all() and not moves
    except (ConfigError, NoEffectError) as error:
        assert str(error).startswith(f"{kind.__name__}: ") and kind is not TaylorSeer


def test_the_norm_and_the_modulation_are_float32_under_bfloat16() -> None:
    block, seen = DiCoBlock(8, 2).bfloat16(), []
    block.norm.register_forward_hook(lambda module, given, out: seen.append(given[0].dtype))
    out = block(torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 8).bfloat16(), Grid(1, 2, 2), DIRECT, "block")
    assert seen == [torch.float32] * 2 and out.dtype == torch.bfloat16
