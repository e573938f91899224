"""DraftAttention against its published code: the draft map, the blocks it keeps, the order, whole attentions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import formula
from ditkit.attention.draft import Draft, draft_map, pool_regions, region_order
from ditkit.core.grid import Grid
from ditkit.core.run import Site
from ditkit.ops.block_sparse_attention import BlockPlan, chooser_handle
from golden_support import Case, assert_golden, cases, read

SYSTEM = "35-draftattention"
SITES = (Site("tokens", "tokens"), Site("core", "core"), Site("head", "head"))


def inputs(name: str, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [1, N, L, K] with the slow wave of the cases, tokens in raster order, text last."""
    tokens, heads, width = shape
    wave = torch.arange(tokens, dtype=torch.float64) / 37
    waves = {"q": torch.sin(wave), "k": torch.sin(wave + 1)}

    def one(which: str) -> Tensor:
        x = formula.tensor(f"{name}.{which}", shape)
        if which in waves:
            slow = formula.tensor(f"{name}.{which}.slow", (heads, width))
            x = x + 1.5 * waves[which][:, None, None] * slow
        return x.transpose(0, 1)[None]

    return one("q"), one("k"), one("v")


def given(case: Case) -> tuple[str, list[int]]:
    """Return the name of a case's inputs, and their shape."""
    (key,) = (key for key in case["inputs"] if key != "how")
    return key.split(".")[0], case["inputs"][key]


def grid_of(case: Case) -> Grid:
    frames, height, width = map(int, re.findall(r"(\d+) frames (\d+)x(\d+)", case["name"])[0])
    return Grid(frames, height, width)


def joined_digest(numbers: Tensor) -> str:
    """Return the first 16 hex digits of the SHA-256 of whole numbers with commas between them."""
    return hashlib.sha256(",".join(map(str, numbers.tolist())).encode()).hexdigest()[:16]


def in_slots(plan: BlockPlan, x: Tensor) -> Tensor:
    return x if plan.order is None else x[:, :, plan.order]


def attended(pattern: Draft, grid: Grid, text: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention in the model's order, [B, L, N, K]."""
    plan = pattern.plan(grid, text)
    session = pattern.start(SITES, 4)
    given = (in_slots(plan, x) for x in (q, k, v))
    key, handle = ("main", "cond", "core"), chooser_handle(pattern)
    out = session.select(key, handle, plan, plan.queries - text, *given, None)
    return out[:, :, plan.inverse].transpose(1, 2)


@cases(SYSTEM, lambda case: "draft map" in case["name"])
def test_maps_blocks_and_orders(case: Case) -> None:
    (name, (tokens, heads, width)), grid, results = given(case), grid_of(case), case["results"]
    patch = tuple(map(int, re.findall(r"pool (\d+)x(\d+)", case["name"])[0]))
    order = region_order(grid, patch)  # type: ignore[arg-type]
    whole = torch.cat((order, torch.arange(tokens, tokens + 5)))  # the code's lists go on with the text
    assert order[:40].tolist() == results["reorder_first_40"]
    assert joined_digest(whole) == results["reorder_sha256_16"]
    assert joined_digest(whole.argsort()) == results["restore_sha256_16"]
    q, k, _ = inputs(name, (tokens, heads, width))
    found = draft_map(*(pool_regions(x[:, :, order], patch[0] * patch[1]) for x in (q, k)))
    assert_golden(found[0], results["map"])
    for sparsity, expected in results["by_sparsity"].items():
        kept = Draft(sparsity=float(sparsity), patch=patch, block=16).chosen(found)[0]  # type: ignore[arg-type]
        assert kept.sum((1, 2)).tolist() == expected["kept_per_head"]
        assert (~kept.any(2)).sum(1).tolist() == expected["rows_without_any"]
        if of_first := expected.get("kept (row*g+column) of head 0"):
            assert kept[0].flatten().nonzero().squeeze(1).tolist() == of_first


@cases(SYSTEM, lambda case: "whole attention" in case["name"])
def test_whole_attentions(case: Case) -> None:
    name, shape = given(case)
    text, sparsity = re.findall(r"(\d+) text tokens, sparsity ([\d.]+)", case["name"])[0]
    found = attended(Draft(sparsity=float(sparsity)), grid_of(case), int(text), *inputs(name, shape))
    assert_golden(found, case["results"]["output"])
    assert not found.isnan().any() and not case["results"]["has_nan"]


def test_two_samples_each_have_their_own_blocks() -> None:
    case = read(SYSTEM)["two samples (guidance)"]
    (name, (tokens, heads, width)), results = given(case), case["results"]
    whole = inputs(name, (tokens, heads, width))
    q, k, v = (torch.cat(x.split(tokens // 2, 2)) for x in whole)
    grid, pattern = Grid(1, 16, 32), Draft(sparsity=0.5)
    plan = pattern.plan(grid, 40)
    kept = pattern.kept(plan, grid.length, *(in_slots(plan, x) for x in (q, k)))
    assert kept.long().tolist() == results["mask_given_to_the_kernel"]
    assert kept[:, 0, :4, :4].long().tolist() == results["mask_of_each_sample_computed_alone"]
    assert_golden(attended(pattern, grid, 40, q, k, v), results["output"])


def test_the_code_keeps_nothing_where_all_is_left_out_and_ours_refuses() -> None:
    from ditkit.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"sparsity=1\.0 should lie in"):
        Draft(sparsity=1.0)
