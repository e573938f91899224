"""Block-sparse attention against its definition under the same brute-force mask, forward and backward."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_sparse_support import K, gradients, of_pairs, qkv, random_pairs
from ditkit.attention.grouped import group_order
from ditkit.core.errors import ConfigError, DitkitError, ShapeError
from ditkit.core.grid import Grid
from ditkit.ops.block_sparse_attention import (
    Attended,
    attend,
    attend_reference,
    block_map,
    build_plan,
    choose,
    merge,
    near_blocks,
    pays,
    with_valid,
)
from ditkit.ops.block_sparse_attention import cpu as kernel


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([8, 16, (16, 8), (8, 32)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.02, 0.3, 1.0]),
)
def test_equals_the_reference_forward_and_backward(
    queries: int, keys: int, block: int | tuple[int, int], own_rows: bool, own_heads: bool, share: float
) -> None:
    pairs = random_pairs(queries, keys, 2 if own_rows else 1, 3 if own_heads else 1, share)
    plan, inputs = of_pairs(pairs, block), qkv(queries, keys)
    assert torch.equal(plan.mask(), pairs) and plan.pairs == int(pairs.sum())
    ours, exact = attend(*inputs, plan), attend_reference(*inputs, pairs)
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    for a, b in zip(gradients(ours, inputs), gradients(exact, inputs), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    pairs = random_pairs(19, 21, 1, 2, 0.3)
    pairs[:, 1, :8, 8:16] = True
    plan, inputs = of_pairs(pairs, 8), qkv(19, 21, batch=1, heads=2, width=2)
    assert plan.partial and plan.partial < plan.visited < plan.heads * 9
    assert torch.autograd.gradcheck(lambda *x: attend(*x, plan, scale=0.7), inputs)


def test_chunks_are_of_equal_lists_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(130, 130, 2, 3, 0.05)
    plan, inputs = of_pairs(pairs, 16), qkv(130, 130)
    together = attend(*inputs, plan)
    monkeypatch.setattr(kernel, "SCORES", 1)
    one_by_one = attend(*inputs, plan)
    for a, b in zip(together, one_by_one, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_full_blocks_are_not_masked() -> None:
    kept = torch.rand(4, 4) < 0.5
    kept.fill_diagonal_(True)
    plan = build_plan(64, block=16, kept=kept)
    assert plan.partial == 0 and len(plan.tiles) == 1 and plan.visited == int(kept.sum())
    assert torch.equal(plan.mask()[0, 0], kept.repeat_interleave(16, 0).repeat_interleave(16, 1))
    assert all(chunk.hidden is None for chunk in kernel._chunks(plan, 1, 2))
    ragged = build_plan(61, block=16, kept=kept)
    assert ragged.partial == int(kept[:, -1].sum()) and len(ragged.tiles) == 2


def test_the_dense_plan_is_dense_attention() -> None:
    plan, inputs = build_plan(50, 37, 16), qkv(50, 37)
    assert plan.density == 1 and plan.pairs == 50 * 37
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert torch.allclose(attend(*inputs, plan).out, dense, atol=1e-14)


def test_lists_and_the_map_of_them_say_the_same() -> None:
    index = torch.tensor([[2, 0, 7], [1, 7, 7], [0, 1, 2]])
    kept = block_map(index, torch.tensor([2, 1, 3]), 3)
    assert kept.tolist() == [[True, False, True], [False, True, False], [True, True, True]]
    with pytest.raises(ShapeError, match="greatest 7; expected blocks 0 to 2"):
        block_map(index, torch.tensor([3, 1, 3]), 3)


def test_ragged_text_is_seen_by_nobody_to_the_bit() -> None:
    text, image = 20, 48
    valid = torch.arange(text) < torch.tensor([[20], [9], [1]])
    plan = with_valid(build_plan(text + image, block=16), valid)
    assert plan.batches == 3
    every = torch.cat((valid, torch.ones(3, image, dtype=torch.bool)), 1)
    assert torch.equal(plan.mask(), every[:, None, None].expand(3, 1, text + image, -1))
    q, k, v = qkv(text + image, text + image, batch=3, dtype=torch.float32)
    ours = attend(q, k, v, plan)
    assert torch.allclose(ours.out, attend_reference(q, k, v, plan.mask()).out, atol=1e-6)
    hidden = ~every[:, None, :, None]
    noise = [torch.where(hidden, 1e4 * torch.randn_like(x), x) for x in (k, v)]
    moved = attend(q, *noise, plan)
    for a, b in zip(moved, ours, strict=True):
        assert torch.equal(a, b)
    d_q, *others = gradients(ours, [q, k, v])
    assert torch.equal(gradients(moved, [q])[0], d_q)
    for grad in others:
        assert not grad.masked_select(hidden).any()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=2), st.booleans(), st.booleans())
def test_valid_lengths_and_a_pattern_meet(lengths: list[int], own_rows: bool, first: bool) -> None:
    text, image = 20, 33
    at = torch.arange(text + image)
    is_text = at < text if first else at >= image
    inside = (at if first else at - image) < torch.tensor(lengths)[:, None]
    valid = ~is_text | inside
    pairs = random_pairs(text + image, text + image, 2 if own_rows else 1, 1, 0.2)
    pairs |= is_text
    plan = with_valid(of_pairs(pairs, 8), valid[:, :text] if first else valid)
    assert torch.equal(
        plan.mask().expand(2, -1, -1, -1), (pairs & valid[:, None, None]).expand(2, -1, -1, -1)
    )
    assert plan.pairs == int(plan.mask().sum())


def test_another_order_of_the_tokens_gives_the_same_output() -> None:
    grid = Grid(1, 12, 24, tile=(4, 8))
    at = grid.coordinates()

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (at[query] - at[key]).square().sum(-1) < 16

    raster = build_plan(grid.length, block=32, allowed=allowed)
    order = grid.tile_order()
    kept = near_blocks(at[order], 32, (0, 3, 3))
    tiled = build_plan(grid.length, block=32, order=order, kept=kept, allowed=allowed)
    assert tiled.pairs == raster.pairs and tiled.visited < raster.visited
    assert torch.equal(order[tiled.inverse], torch.arange(grid.length))
    inputs = qkv(grid.length, grid.length)
    moved = attend(*(x[:, :, order] for x in inputs), tiled)
    assert torch.allclose(moved.out[:, :, tiled.inverse], attend(*inputs, raster).out, atol=1e-13)


def test_padding_in_the_order_influences_nothing() -> None:
    order = torch.full((32,), -1)
    order[[0, 1, 2, 5, 6, 8, 9, 12, 30, 31]] = torch.tensor([3, 1, 2, 0, 9, 5, 4, 7, 6, 8])
    plan = build_plan(32, 35, 8, order=order)  # three keys more than queries, tokens 10 to 12
    assert int((plan.visible_keys == 13).sum()) == 10 and plan.pairs == 130
    assert plan.visited == 3 * 4  # a block of queries and one of keys hold no token
    tokens = qkv(10, 13)
    held = order.clamp(min=0)
    at = torch.cat((held, torch.tensor([10, 11, 12])))
    q, k, v = tokens[0][:, :, held], tokens[1][:, :, at], tokens[2][:, :, at]
    ours = attend(q, k, v, plan).out[:, :, plan.inverse]
    assert torch.allclose(ours, attend_reference(*tokens).out, atol=1e-14)
    pad = torch.cat((order < 0, torch.zeros(3, dtype=torch.bool)))[:, None]
    moved = attend(q, *(torch.where(pad, 1e4 * torch.randn_like(x), x) for x in (k, v)), plan)
    assert torch.equal(moved.out[:, :, plan.inverse], ours)
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[1, [3, 11]] = False
    padded = with_valid(plan, valid)
    exact = attend_reference(*tokens, valid[:, None, None])
    assert torch.allclose(attend(q, k, v, padded).out[:, :, plan.inverse], exact.out, atol=1e-14)


def test_merge_is_attention_over_the_union() -> None:
    inputs = qkv(40, 60)
    part = torch.randint(3, (40, 60))
    part[:7] = part[:7].clamp(min=1)  # the first part has no key for some queries
    whole = attend_reference(*inputs)
    plans = [of_pairs((part == i)[None, None], 16, blind=True) for i in range(3)]
    merged = merge(*(attend(*inputs, plan) for plan in plans))
    for a, b in zip(merged, whole, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
    for a, b in zip(gradients(merged, inputs), gradients(whole, inputs), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_queries_without_keys_get_zero_where_that_is_asked_for() -> None:
    pairs = random_pairs(40, 40, 1, 1, 0.5)
    pairs[:, :, [0, 5]], pairs[:, :, 16:32] = False, False
    with pytest.raises(
        ShapeError, match=re.escape("query 0 (batch row 0, head 0) sees no key, and so do 17 others")
    ):
        of_pairs(pairs, 16)
    plan, inputs = of_pairs(pairs, 16, blind=True), qkv(40, 40)
    ours, exact = attend(*inputs, plan), attend_reference(*inputs, pairs)
    assert torch.equal(ours.lse == -torch.inf, exact.lse == -torch.inf)
    assert torch.allclose(ours.out, exact.out, atol=1e-14) and not ours.out[:, :, 0].any()
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1] = False
    assert not with_valid(plan, valid).mask()[1].any()
    both = [torch.autograd.grad(x.out.square().sum(), inputs) for x in (ours, exact)]
    for a, b in zip(*both, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    dark = Attended(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -torch.inf))
    assert merge(dark, dark).lse == -torch.inf and not merge(dark, dark).out.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    pairs = random_pairs(100, 100, 1, 3, 0.1)
    plan = of_pairs(pairs, 16)
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(100, 100)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours, exact = attend(*inputs, plan), attend_reference(*wide, pairs)
    assert ours.out.dtype == dtype and ours.lse.dtype == torch.float32
    assert torch.allclose(ours.lse.double(), exact.lse, atol=1e-5)
    # all arithmetic is float32, so the output is off by its own rounding: half a unit in the last place
    assert torch.allclose(ours.out.double(), exact.out, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
    seed = torch.randn_like(ours.out)
    for a, b in zip(
        torch.autograd.grad(ours.out, inputs, seed),
        torch.autograd.grad(exact.out, wide, seed.double()),
        strict=True,
    ):
        # the backward pass reads the output rounded, once in each sum over K
        assert (a.double() - b).norm() < torch.finfo(dtype).eps * b.norm()


def test_autocast_changes_no_bit() -> None:
    plan = of_pairs(random_pairs(100, 100, 1, 3, 0.1), 16)
    inputs = [x.detach().bfloat16().requires_grad_() for x in qkv(100, 100)]
    plain = attend(*inputs, plan)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attend(*inputs, plan)
        found = gradients(cast, inputs)
    assert torch.equal(cast.out, plain.out) and torch.equal(cast.lse, plain.lse)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain, inputs), strict=True))


def test_a_plan_is_as_small_as_its_pattern() -> None:
    plan = build_plan(4096, block=64, allowed=lambda b, h, q, k: (q - k).abs() <= 64)
    assert len(plan.tiles) == 3 and plan.bytes() < 2e4
    assert plan.to("cpu") is plan
    start, partial, entry = plan.transposed
    assert partial.tolist() == [1] + 62 * [2] + [1]
    columns = [(plan.list_of[entry[a:b]] % 64).tolist() for a, b in pairwise(start.tolist())]
    assert columns[0] == [1, 0] and columns[9] == [8, 10, 9]


def test_the_choice_says_which_kernel_and_whether_it_pays() -> None:
    q = torch.zeros(1, 1, 1024, K)
    sparse = build_plan(1024, block=64, kept=torch.eye(16, dtype=torch.bool))
    choice = choose(q, sparse)
    assert (
        choice.kernel == "cpu"
        and choice.pays
        and choice.reason == "6.2% of dense attention's blocks visited on cpu"
    )
    dense = choose(q, build_plan(1024, block=64))
    assert not dense.pays and "dense attention is faster above 0.4" in dense.reason
    assert pays(sparse) == "" and pays(build_plan(1024, block=64)) == dense.reason
    assert pays(build_plan(1024, 200, 64)) == "200 keys, dense attention is faster below 256"
    assert not choose(q, build_plan(1024, 200, 64)).pays
    assert choose(q, sparse, "reference").kernel == "reference"
    assert torch.equal(
        attend(q, q, q, sparse, kernel="reference").lse, attend_reference(q, q, q, sparse.mask()).lse
    )


def test_padding_is_paid_for() -> None:
    """405 tokens in groups of 256, each seeing itself: 8 of 64 pairs of groups, and twice the pairs of all tokens."""
    order = group_order(Grid(5, 9, 9), (4, 8, 8))
    own = torch.eye(8, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    plan = build_plan(len(order), block=128, order=order, kept=own)
    assert plan.rows_ratio == 2048 / 405
    assert plan.density == pytest.approx(plan.visited * 128**2 / 405**2) and plan.density > 1.99
    assert pays(plan) == "padding makes 5.06 times the rows, dense attention is faster above 1.5"
    few = build_plan(1024, block=128, order=torch.cat((torch.arange(200), torch.full((824,), -1))))
    assert pays(few) == "200 keys, dense attention is faster below 256"


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: build_plan(64, block=48), ConfigError, "block=48, expected powers of two"),
        (lambda: build_plan(0), ShapeError, "0 queries and 0 keys"),
        (
            lambda: build_plan(64, block=16, kept=torch.ones(3, 4)),
            ShapeError,
            r"kept \[3, 4\], expected",
        ),
        (lambda: build_plan(4, order=torch.tensor([0, 1, 1, 2])), ShapeError, "each token once"),
        (lambda: build_plan(64, order=torch.arange(60)), ShapeError, "an order of 60 slots for 64 queries"),
        (lambda: build_plan(64, block=16, kept=torch.zeros(4, 4)), ShapeError, "query 0 .* sees no key"),
        (lambda: with_valid(build_plan(64), torch.zeros(2, 64).bool()), ShapeError, "sees no key"),
        (
            lambda: with_valid(build_plan(64), torch.ones(2, 65).bool()),
            ShapeError,
            r"valid \[2, 65\], expected",
        ),
        (lambda: attend(*qkv(60, 64), build_plan(64)), ShapeError, "for a plan of 64 queries and 64 keys"),
        (
            lambda: attend(*qkv(64, 64), build_plan(64, heads=2)),
            ShapeError,
            "lists for 1 batch rows and 2 heads",
        ),
        (
            lambda: choose(torch.zeros(1, 1, 64, K), build_plan(64), "tritn"),
            ConfigError,
            "did you mean 'triton'",
        ),
        (
            lambda: choose(torch.zeros(1, 1, 64, K), build_plan(64), "flex"),
            ConfigError,
            "on cpu, expected cuda",
        ),
        (
            lambda: choose(torch.zeros(1, 1, 64, K, device="meta"), build_plan(64)),
            ConfigError,
            "no block-sparse kernel",
        ),
    ],
)
def test_bad_input_is_refused(wrong: object, error: type[DitkitError], says: str) -> None:
    with pytest.raises(error, match=says):
        wrong()  # type: ignore[operator]
