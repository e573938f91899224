"""SLA against its published kernels: the map of blocks, both branches, and gradients of everything."""

from __future__ import annotations

import re
from math import sqrt

import pytest
import torch
from torch import Tensor

import formula
from ditkit.attention.sparse_linear import (
    CRITICAL,
    Mixing,
    OutputMap,
    SparseLinear,
    block_scores,
    pool_blocks,
)
from ditkit.core.grid import Grid
from ditkit.core.run import Site
from golden_support import Case, cases, read

SYSTEM = "38-sla"
SINGLE = 1e-5
"""The published kernels ran in float32."""
SITES = (Site("tokens", "tokens"), Site("core", "core", width=16, heads=1), Site("head", "head"))


def inputs(case: Case) -> list[Tensor]:
    """Return q, k, v and the output's gradient [B, N, L, K], rounded to float32 as the file has them."""
    name = next(key for key in case["inputs"] if key.startswith("sla.")).split(".")[1]
    shape = next(iter(case["inputs"].values()))
    drawn = [formula.tensor(f"sla.{name}.{part}", shape) for part in ("q", "k", "v", "grad")]
    drawn[1] = drawn[1] + 0.3
    if "slow" in str(case["inputs"]):
        token = torch.arange(shape[2], dtype=torch.float64)[:, None] / 40
        for n in (1, 2):
            drawn[n - 1] = drawn[n - 1] + torch.sin(token + n) * formula.tensor(
                f"sla.{name}.d{n}", (shape[3],)
            )
    return [x.float() for x in drawn]


def setting(case: Case) -> SparseLinear:
    variant, feature, top = re.match(r"(\w+): (\w+), L=\d+, top ([\d.]+)", case["name"]).groups()  # type: ignore[union-attr]
    return SparseLinear(variant=variant, feature=feature, critical=float(top))  # type: ignore[arg-type]


def mixed(policy: SparseLinear, output: OutputMap, *qkv: Tensor) -> Tensor:
    """Attention in the model's order."""
    length = qkv[0].shape[2]
    plan = policy.plan(Grid(1, 1, length), 0)
    image = plan.queries
    session = policy.start(SITES, 1)
    assert isinstance(session, Mixing)
    order = torch.arange(length) if plan.order is None else plan.order.clamp(min=0)
    q, k, v = (x[:, :, order] for x in qkv)
    return session.mix(plan, image, output, q, k, v, None)[:, :, plan.inverse]


@cases(SYSTEM, lambda case: "blocks" in case["name"])
def test_published_kernels(case: Case) -> None:
    results, policy = case["results"], setting(case)
    q, k, v, grad = inputs(case)
    length, qkv = q.shape[2], (q, k, v)
    real = torch.ones(1, length, dtype=torch.bool)
    weight = real[:, None, :, None].float()
    means = [pool_blocks(x, weight, 64) for x in (q, k - k.mean(2, keepdim=True))]
    assert_close(means[0], results["pooled_q"])
    assert_close(means[1], results["pooled_smooth_k"])
    assert torch.allclose(means[0] @ means[1].mT, block_scores(q, k, 64, None)[0])
    critical = policy.classes(length, q, k, None) == CRITICAL
    assert critical.int().tolist() == results["critical"]
    assert critical.sum(-1).eq(results["kept_blocks_per_row"]).all()

    assert_close(mixed(policy, OutputMap(16), *qkv), results["sparse_branch"])
    output = OutputMap(16)
    with torch.no_grad():
        output.weight.copy_(formula.weight("proj_l.weight", (16, 16)))
        output.bias.copy_(formula.weight("proj_l.bias", (16,)))
    leaves = [x.requires_grad_() for x in qkv]
    found = mixed(policy, output, *leaves)
    assert_close(found, results["output"])
    wanted = ("dq", "dk", "dv", "dW", "db")
    grads = torch.autograd.grad((found * grad).sum(), (*leaves, output.weight, output.bias))
    for name, value in zip(wanted, grads, strict=True):
        assert_close(value, results[name])


def assert_close(x: Tensor, expected: dict[str, object]) -> None:
    """To 1e-5 of the largest value, for the elements; sums are of as many roundings."""
    largest = x.abs().max().item()
    found = formula.summary(x)
    assert found["shape"] == expected["shape"]
    assert found["at"] == pytest.approx(expected["at"], rel=0, abs=SINGLE * largest)
    assert found["norm"] == pytest.approx(expected["norm"], rel=SINGLE)
    rounding = SINGLE * largest * sqrt(x.numel())
    assert found["sum"] == pytest.approx(expected["sum"], rel=0, abs=rounding)


def test_where_published_code_keeps_no_block_and_gives_nan_ours_keeps_one() -> None:
    case = read(SYSTEM)["main: edge, L=192, top 0.2"]
    assert case["results"]["kept_blocks_per_row"] == 0 and case["results"]["nan_count"] == 3072
    q, k, v, _ = inputs(case)
    policy = SparseLinear(variant="main", critical=0.2)
    assert (policy.classes(192, q, k, None) == CRITICAL).sum(-1).eq(1).all()
    assert mixed(policy, OutputMap(16), q, k, v).isfinite().all()
