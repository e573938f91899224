"""Block-sparse attention as one operation of torch: compiled, differentiated, checkpointed, padded, in threads."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from block_sparse_support import K, gradients, of_pairs, qkv, random_pairs
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.ops.block_sparse_attention import (
    Attended,
    BlockPlan,
    attend,
    attend_reference,
    build_plan,
    dense_plan,
    with_valid,
)
from ditkit.ops.block_sparse_attention import operation as ours
from ditkit.ops.block_sparse_attention.plan import plan_of

L = 61
"""Tokens: no block of 16 divides them."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def random_plan(length: int = L) -> BlockPlan:
    return of_pairs(random_pairs(length, length, 1, 3, 0.3), 16)


def random_valid(batch: int = 2, length: int = 40) -> Tensor:
    """Prompts of different length, each with a token that is not real."""
    valid = torch.rand(batch, length) < 0.7
    valid[:, 0], valid[:, 1] = True, False
    return valid


def branch(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, valid: Tensor | None = None) -> Attended:
    """What a compiler has something to do around: all of it exact in whatever order."""
    out, lse = attend(2 * q, k, -v, plan, valid=valid)
    return Attended(out + 1, 4 * lse)


def run(fn: Any, inputs: list[Tensor], *more: Any) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and the gradients of all inputs."""
    attended = fn(*inputs, *more)
    return *attended, *gradients(attended, inputs)


def same(ones: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, ones, others))


def test_a_compiled_graph_has_one_node_and_equal_bits() -> None:
    plan, inputs, valid = random_plan(), qkv(L, L, dtype=torch.float32), random_valid()
    counter = CompileCounterWithBackend("aot_eager")

    def captured(q: Tensor, k: Tensor, v: Tensor) -> Attended:
        return branch(q, k, v, plan)

    compiled = torch.compile(captured, fullgraph=True, backend=counter)
    for _ in range(3):
        assert same(run(compiled, inputs), run(captured, inputs))
    assert counter.frame_count == 1
    targets = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.ditkit.block_sparse_attention.default) == 1 and len(targets) < 10
    with torch.no_grad():
        assert same(compiled(*inputs), captured(*inputs))
    with torch.inference_mode():
        assert same(compiled(*inputs), captured(*inputs))
    padded = torch.compile(branch, fullgraph=True, backend=counter)
    assert same(run(padded, inputs, plan, valid), run(branch, inputs, plan, valid))


def test_plans_share_compiled_code() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(branch, fullgraph=True, backend=counter)
    inputs = qkv(L, L)
    for plan in [random_plan() for _ in range(5)]:
        assert same(run(compiled, inputs, plan), run(branch, inputs, plan))
    assert counter.frame_count == 2  # the handle as a constant, then as a symbol


def test_valid_is_read_in_each_call() -> None:
    plan, inputs = random_plan(), qkv(L, L)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(branch, fullgraph=True, backend=counter)
    every = torch.ones(2, 40, dtype=torch.bool)
    for valid in (random_valid(), random_valid(), every):
        alone = run(branch, inputs, plan if valid.all() else with_valid(plan, valid))
        assert same(run(compiled, inputs, plan, valid), alone)
        assert same(run(branch, inputs, plan, valid), alone)
    assert counter.frame_count == 1


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_the_default_compiler() -> None:
    # projections, splits and transposes are no work for a C++ compiler, which would take the time
    plan, projected = random_plan(), torch.randn(2, L, 3, 3, K)

    def core(x: Tensor) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v, plan).out

    x, y = projected.clone().requires_grad_(), projected.clone().requires_grad_()
    out, expected = torch.compile(core, fullgraph=True)(x), core(y)
    assert torch.equal(out, expected)
    seed = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(a, b, seed)[0] for a, b in ((out, x), (expected, y))))


@pytest.mark.parametrize("valid", [False, True])
def test_the_operation_keeps_torchs_rules(valid: bool) -> None:
    plan, (q, k, _) = random_plan(), qkv(L, L)
    v = torch.randn(2, 3, L, 5, dtype=q.dtype, requires_grad=True)
    told = random_valid() if valid else None
    torch.library.opcheck(ours.block_sparse_attention, (q, k, v, told, plan.handle, 0.3, "cpu"))
    saved = [x.detach() for x in (q, k, v, *attend(q, k, v, plan, valid=told))]
    d_out, d_lse = torch.randn_like(saved[3]), torch.randn_like(saved[4])
    arguments = (d_out, d_lse, *saved, told, plan.handle, 0.3, "cpu")
    torch.library.opcheck(ours.block_sparse_attention_backward, arguments)


def test_gradients_with_padding_by_finite_differences() -> None:
    plan, valid = of_pairs(random_pairs(19, 21, 1, 2, 0.3), 8), random_valid(1, 15)
    q, k, _ = qkv(19, 21, batch=1, heads=2, width=2)
    v = torch.randn(1, 2, 21, 3, dtype=q.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, plan, valid=valid, scale=0.7), (q, k, v))


def test_values_of_padding_change_no_bit() -> None:
    plan, (q, k, v), valid = random_plan(), qkv(L, L, dtype=torch.float32), random_valid()
    hidden = nn.functional.pad(~valid, (0, L - 40))[:, None, :, None]
    noise = [torch.where(hidden, 1e4 * torch.randn_like(x), x).detach().requires_grad_() for x in (k, v)]
    plain, moved = attend(q, k, v, plan, valid=valid), attend(q, *noise, plan, valid=valid)
    assert same(plain, moved)
    before, after = gradients(plain, [q, k, v]), gradients(moved, [q, *noise])
    assert torch.equal(before[0], after[0])
    for grad in (*before[1:], *after[1:]):
        assert not grad.masked_select(hidden).any()


def test_padding_is_the_same_for_every_kernel() -> None:
    plan, inputs, valid = random_plan(), qkv(L, L), random_valid()
    reference = attend(*inputs, plan, valid=valid, kernel="reference")
    mask = plan.mask() & nn.functional.pad(valid, (0, L - 40), value=True)[:, None, None]
    assert same(reference, attend_reference(*inputs, mask))
    for a, b in zip(attend(*inputs, plan, valid=valid), reference, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_plans_of_prompts_are_shared_and_bounded() -> None:
    plan, prompts = random_plan(), [random_valid() for _ in range(ours.PROMPTS + 3)]
    planned = [ours.for_valid(plan, valid) for valid in prompts]
    assert ours.for_valid(plan, prompts[-1].clone()) is planned[-1]
    assert len(plan.padded) == ours.PROMPTS
    assert torch.equal(ours.for_valid(plan, prompts[0]).mask(), planned[0].mask())
    assert ours.for_valid(plan, torch.ones(2, 40, dtype=torch.bool)) is plan
    assert ours.for_valid(plan, prompts[-1][:1]) is not ours.for_valid(plan, prompts[-1])


def test_a_dropped_plan_is_freed_and_its_handle_refused() -> None:
    plan, inputs = random_plan(), qkv(L, L)
    handle, alive = plan.handle, weakref.ref(plan)
    attended = attend(*inputs, plan, valid=random_valid())
    dense_plan(plan)
    gc.disable()  # no cycle holds a plan
    try:
        del plan
        assert alive() is not None
        gradients(attended, inputs)
        del attended
        assert alive() is None
    finally:
        gc.enable()
    with pytest.raises(ConfigError, match=f"block plan {handle} is gone"):
        ours.block_sparse_attention(*inputs, None, handle, 0.3, "cpu")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_has_a_handle_of_its_own(copied: Any) -> None:
    plan, inputs = random_plan(), qkv(L, L)
    other = copied(plan)
    assert other.handle != plan.handle and plan_of(other.handle) is other
    expected = attend(*inputs, plan)
    del plan
    assert same(attend(*inputs, other), expected)


def test_two_threads() -> None:
    plan, inputs = random_plan(), qkv(L, L)
    prompts = [random_valid() for _ in range(2 * ours.PROMPTS)]
    expected = [run(branch, inputs, with_valid(plan, valid)) for valid in prompts]
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda valid: run(branch, inputs, plan, valid), 2 * prompts)
        assert all(same(a, b) for a, b in zip(found, 2 * expected, strict=True))
    assert len(plan.padded) <= ours.PROMPTS + 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    plan, inputs, valid = random_plan(), qkv(L, L), random_valid()

    def checkpointed(*x: Any) -> Attended:
        return Attended(*checkpoint(branch, *x, use_reentrant=reentrant))

    found = []
    for fn in (checkpointed, branch):
        leaves = [x.detach().requires_grad_() for x in inputs]
        attended = fn(*leaves, plan, valid)
        (attended.out.square().sum() + attended.lse.sin().sum()).backward()
        found.append(tuple(x.grad for x in leaves))
    assert same(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    plan, inputs, valid = random_plan(), qkv(L, L), random_valid()
    expected = attend(*inputs, plan, valid=valid)
    with mode():
        out = attend(*inputs, plan, valid=valid)
        from_inference = attend(*(x.clone() for x in inputs), plan, valid=valid.clone())
    assert same(out, expected) and same(from_inference, expected) and not out.out.requires_grad


def test_some_gradients_or_none_of_the_log_sum_exp() -> None:
    plan, (q, k, v) = random_plan(), qkv(L, L)
    q_only = attend(q, k.detach(), v.detach(), plan)
    assert torch.equal(*(gradients(a, [q])[0] for a in (q_only, attend(q, k, v, plan))))
    seed = torch.randn_like(q)
    by_out = torch.autograd.grad(attend(q, k, v, plan).out, [q, k, v], seed)
    by_both = torch.autograd.grad(
        tuple(attend(q, k, v, plan)), [q, k, v], (seed, torch.zeros(2, 3, L, dtype=seed.dtype))
    )
    assert same(by_out, by_both)


def test_the_dense_plan_of_a_plan_gives_the_exact_log_sum_exp() -> None:
    order = torch.full((32,), -1)
    order[[0, 1, 2, 5, 6, 8, 9, 12, 30, 31]] = torch.tensor([3, 1, 2, 0, 9, 5, 4, 7, 6, 8])
    kept = torch.ones(4, 5, dtype=torch.bool).tril()
    plan = build_plan(32, 35, 8, order=order, kept=kept)
    dense = dense_plan(plan)
    assert dense is dense_plan(plan) and dense.order is plan.order and dense.pairs == 130
    tokens = qkv(10, 13)
    held = order.clamp(min=0)
    at = torch.cat((held, torch.tensor([10, 11, 12])))
    attended = attend(tokens[0][:, :, held], tokens[1][:, :, at], tokens[2][:, :, at], dense)
    exact = attend_reference(*tokens)
    assert torch.allclose(attended.lse[:, :, plan.inverse], exact.lse, atol=1e-13)


@pytest.mark.parametrize(
    ("valid", "says"),
    [
        (torch.ones(2, L), r"valid torch.float32 \[2, 61\], expected torch.bool \[2, tokens\]"),
        (torch.ones(3, L).bool(), r"\[3, 61\], expected torch.bool \[2, tokens\]"),
        (torch.ones(L).bool(), r"\[61\], expected"),
        (torch.ones(2, L + 1).bool(), r"valid \[2, 62\], expected at most \[B, 61\]"),
        (torch.zeros(2, L).bool(), "sees no key"),
    ],
)
def test_bad_padding_is_refused(valid: Tensor, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        attend(*qkv(L, L), random_plan(), valid=valid)
