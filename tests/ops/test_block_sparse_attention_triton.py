"""The Triton kernels against the definition: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ditkit.bench.macs import count_macs
from ditkit.core.errors import ShapeError
from ditkit.ops.block_sparse_attention import attend, attend_reference, build_plan, choose

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

CASES = [
    # batch rows, heads, queries, keys, block, width, type
    (1, 1, 100, 150, 64, 16, torch.float32),
    (2, 2, 130, 70, (128, 64), 24, torch.float32),
    (1, 2, 128, 140, 128, 16, torch.float16),
    (2, 1, 65, 129, 64, 32, torch.float16),
]
BFLOAT16 = (
    1,
    2,
    300,
    400,
    128,
    128,
    torch.bfloat16,
)  # the interpreter multiplies the bits of bfloat16 as integers


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_kernels_in_the_interpreter() -> None:
    # in a process of its own: what triton.jit makes is decided when it is imported
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "." * (len(CASES) + 3) in done.stdout, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize(
    "case",
    CASES if INTERPRETED else [pytest.param(case, marks=pytest.mark.gpu) for case in (*CASES, BFLOAT16)],
    ids=str,
)
def test_equals_the_reference(
    case: tuple[int, int, int, int, int | tuple[int, int], int, torch.dtype],
) -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU")
    batches, heads, queries, keys, block, width, dtype = case
    pairs = torch.rand(batches, heads, queries, keys) < 0.2
    pairs[..., :64] = True  # FULL
    pairs[..., : queries // 2, 64:128] = False
    pairs[:, :, 3] = False  # one query without a key
    plan = build_plan(
        queries,
        keys,
        block,
        allowed=lambda b, h, q, k: pairs[b, h, q, k],
        batches=batches,
        heads=heads,
        blind=True,
    )
    assert plan.partial > 0
    inputs = [
        torch.randn(2, 2, n, width, device=DEVICE).to(dtype).requires_grad_() for n in (queries, keys, keys)
    ]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert choose(inputs[0], plan, "triton").kernel == "triton"
    ours = attend(*inputs, plan, kernel="triton", scale=0.3)
    exact = attend_reference(*wide, pairs.to(DEVICE), scale=0.3)
    assert ours.out.dtype == dtype
    close(ours.lse, exact.lse, torch.finfo(torch.float32).eps * 64)
    close(ours.out, exact.out, torch.finfo(dtype).eps * 16)
    seeds = torch.randn_like(ours.out), torch.randn_like(ours.lse)
    seen = exact.lse.isfinite()
    sums = [(a.out * seeds[0]).sum() + torch.where(seen, a.lse * seeds[1], 0).sum() for a in (ours, exact)]
    for a, b in zip(torch.autograd.grad(sums[0], inputs), torch.autograd.grad(sums[1], wide), strict=True):
        close(a, b, torch.finfo(dtype).eps * 16)


@pytest.mark.skipif(not INTERPRETED, reason="in the interpreted run")
def test_values_of_another_width_are_refused() -> None:
    q = torch.zeros(1, 1, 64, 16)
    with pytest.raises(ShapeError, match="values of width 32, expected 16 as keys"):
        attend(q, q, torch.zeros(1, 1, 64, 32), build_plan(64, block=64), kernel="triton")


@pytest.mark.skipif(not INTERPRETED, reason="in the interpreted run")
def test_a_compiled_graph_calls_it() -> None:
    plan = build_plan(100, block=64, kept=torch.ones(2, 2).bool().tril())
    inputs = [torch.randn(1, 1, 100, 16, requires_grad=True) for _ in range(3)]
    valid = torch.arange(100)[None] % 7 > 0

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, plan, valid=valid, kernel="triton").out

    outs = [fn(*inputs) for fn in (torch.compile(padded, fullgraph=True, backend="aot_eager"), padded)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.sum(), inputs) for out in outs]
    assert all(map(torch.equal, *grads))


@pytest.mark.skipif(not INTERPRETED, reason="in the interpreted run")
def test_it_is_counted_as_what_its_two_backward_kernels_multiply() -> None:
    q = torch.randn(1, 2, 100, 16, requires_grad=True)
    plan = build_plan(100, block=64, kept=torch.ones(2, 2).bool().tril())
    count = count_macs(lambda: attend(q, q, q, plan, kernel="triton").out.sum().backward())
    assert count.by_kind == {"attention": 2 * 3 * 64 * 64 * 16 * (2 + 7)} and count.uncounted == ()


def close(ours: Tensor, exact: Tensor, share: float) -> None:
    """Equal up to a share of the largest value: each is a sum of rounded products."""
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    ours, exact = ours.detach()[finite].double(), exact.detach()[finite]
    assert (ours - exact).abs().max() <= share * exact.abs().max()
