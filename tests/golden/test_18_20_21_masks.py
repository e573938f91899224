"""The masks of GRAT, of Re-ttention's band and of CLEAR against those of the published code, pair by pair."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from ditkit.attention import Band, Grouped, Neighbourhood
from ditkit.attention.grouped import group_order
from ditkit.core.grid import Grid
from ditkit.ops.block_sparse_attention import BlockPlan, with_valid
from golden_support import Case, assert_mask, cases, digest


def by_token(plan: BlockPlan) -> Tensor:
    """Return every pair in the model's order, bool [tokens, keys]: the picture's tokens, text, pooled keys."""
    (pairs,) = plan.mask().flatten(0, 1)
    columns = torch.cat((plan.inverse, torch.arange(plan.queries, plan.keys)))
    return pairs[plan.inverse][:, columns]


def text_first(mask: Tensor, image: int, text: int) -> Tensor:
    """Return the mask with its text before the picture, as two of the published codes have it."""
    rows = torch.cat((torch.arange(image, image + text), torch.arange(image)))
    return mask[rows][:, torch.cat((rows, torch.arange(image + text, mask.shape[1])))]


def numbers(case: Case) -> list[int]:
    """Return all numbers of a case's name but those of shares."""
    return [int(n) for n in re.findall(r"\d+", case["name"].split(", keep")[0])]


@cases("18-grat")
def test_crisscross(case: Case) -> None:
    *sizes, text, valid = numbers(case)
    grid, group = Grid(*sizes[:3]), tuple(sizes[3:])
    plan = Grouped(meeting="crisscross", group=group, block=64).plan(grid, text)
    expected = case["results"]
    if valid < text:
        plan = with_valid(plan, (torch.arange(grid.length + text) < grid.length + valid)[None])
    mask = by_token(plan)
    assert_mask(mask, expected["in_raster_order"])
    order = group_order(grid, group)
    assert order[:12].tolist() == expected["order_first_12"]
    assert digest(order) == expected["order_sha256_16"]
    visual = mask[: grid.length, : grid.length].double().mean().item()
    assert visual == pytest.approx(expected["visual_density"], abs=1e-12)


@cases("20-re-ttention", lambda case: "band" in case["name"])
def test_bands(case: Case) -> None:
    *sizes, text = numbers(case) if "text" in case["name"] else [1, *numbers(case), 0]
    grid, keep = Grid(*sizes), float(case["name"].split("keep ")[1])
    mask = by_token(Band(keep=keep, block=16).plan(grid, text))
    assert_mask(text_first(mask, grid.length, text), case["results"])


@cases("21-clear")
@pytest.mark.parametrize("order", ["tiles", "raster"])
def test_circles(case: Case, order: str) -> None:
    height, width, text, radius, *pooled = numbers(case)
    pattern = Neighbourhood(radius=radius, pooled=pooled[0] if pooled else 0, order=order, block=64)  # type: ignore[arg-type]
    mask = by_token(pattern.plan(Grid(1, height, width), text))
    assert_mask(text_first(mask, height * width, text), case["results"]["as_published"])
