"""Linear attention over lists of blocks: ways to sum, gradients, and the kernel in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ditkit.bench.macs import MacCounter
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.ops.linear_attention import aggregate, block_linear_attention, divide, feature_map, sums_reference
from ditkit.ops.linear_attention.aggregate import additions, cheapest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = ("product", "direct", "subtract", "segments", "auto")
SINGLE = 2e-5
"""Of float32 sums of 70 rows of size 1, half of which are taken away again."""


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def given(
    dtype: torch.dtype, queries: int, keys: int, block: tuple[int, int], share: float = 0.5
) -> tuple[list[Tensor], Tensor]:
    """Features of softmax and values with gradients, and a map one of whose rows takes nothing in."""
    q, k = (feature_map(drawn(dtype, 2, 2, n, 8, seed=n), "softmax") for n in (queries, keys))
    v = drawn(dtype, 2, 2, keys, 12, seed=3)
    shape = (2, 2, -(-queries // block[0]), -(-keys // block[1]))
    taken = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    taken[:, :, 1] = False
    return [x.clone().requires_grad_() for x in (q, k, v)], taken


def with_gradients(inputs: list[Tensor], *args: object, **kwargs: object) -> list[Tensor]:
    sums = block_linear_attention(*inputs, *args, **kwargs)  # type: ignore[arg-type]
    weight = drawn(sums.numerator.dtype, *sums.numerator.shape, seed=7)
    loss = (sums.numerator * weight).sum() + (sums.denominator * weight[..., 0]).sum()
    return [sums.numerator, sums.denominator, *torch.autograd.grad(loss, inputs)]


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("how", WAYS)
def test_ways_to_sum_differ_in_rounding_only(how: str, share: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, SINGLE)):
        inputs, taken = given(dtype, 70, 90, (8, 16), share)  # last blocks of 6 and of 10 rows
        wanted = with_gradients(inputs, taken, (8, 16), kernel="reference")
        assert furthest(with_gradients(inputs, taken, (8, 16), how=how), wanted) < tolerance


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Of a head of 11 queries and 13 keys, whose last blocks are ragged."""
    inputs, taken = given(torch.float64, 11, 13, (8, 8))
    few = [x[:1, :1, :, :3].detach().requires_grad_() for x in inputs]

    def fraction(*features: Tensor) -> Tensor:
        return divide(block_linear_attention(*features, taken[:1, :1], (8, 8), how="subtract"))

    assert torch.autograd.gradcheck(fraction, few, nondet_tol=0.0)


@pytest.mark.parametrize("how", WAYS)
def test_a_row_that_takes_nothing_in_is_zero_to_the_bit(how: str) -> None:
    inputs, taken = given(torch.float32, 64, 64, (8, 8), 0.9)
    sums = block_linear_attention(*inputs, taken, (8, 8), how=how)  # type: ignore[arg-type]
    assert (divide(sums)[:, :, 8:16] == 0).all() and (sums.denominator[:, :, 8:16] == 0).all()


def test_all_blocks_taken_in_are_plain_linear_attention() -> None:
    (q, k, v), taken = given(torch.float64, 40, 40, (8, 8))
    found = divide(block_linear_attention(q, k, v, torch.ones_like(taken), (8, 8)))
    plain = q @ (k.mT @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
    assert (found - plain).abs().max() < 1e-14


@pytest.mark.parametrize("kind", ["softmax", "elu", "relu"])
def test_features_are_not_negative(kind: str) -> None:
    x = drawn(torch.float64, 5, 8)
    found = feature_map(x, kind)  # type: ignore[arg-type]
    slow = {"softmax": x.exp() / x.exp().sum(-1, keepdim=True), "relu": x.clamp(min=0),
            "elu": torch.where(x > 0, x + 1, x.exp())}[kind]  # fmt: skip
    assert torch.allclose(found, slow, atol=1e-15) and (found >= 0).all()


def test_the_cheapest_way_is_that_of_fewest_additions() -> None:
    """At 95 % of 64 rows: 61 additions a list, 3 subtractions, 16 of segments; and a dense product's price."""
    taken = torch.ones(1, 64, 64, dtype=torch.bool)
    taken[:, :, :3] = False
    counts = additions(taken)
    assert counts["direct"] == 64 * 61 and counts["subtract"] == 64 + 64 * 3
    assert counts["segments"] == 16 * (16 + 64)
    assert cheapest(taken) == min(counts, key=lambda name: counts[name]) != "direct"
    assert cheapest(torch.zeros(1, 64, 64, dtype=torch.bool)) == "direct"


def test_macs_and_mistakes() -> None:
    (q, k, v), taken = given(torch.float32, 64, 64, (8, 8))
    with MacCounter() as counter:
        block_linear_attention(q, k, v, taken, (8, 8))
    assert counter.total == 2 * 4 * 64 * 8 * 13 and not counter.count.uncounted
    with pytest.raises(
        ShapeError, match=r"a map torch.bool \[2, 2, 8, 7\], expected torch.bool \[2, 2, 8, 8\]"
    ):
        block_linear_attention(q, k, v, taken[..., :7], (8, 8))
    with pytest.raises(ConfigError, match="unknown aggregation 'sum'"):
        aggregate(torch.ones(1, 2, 3), torch.ones(1, 2, 2, dtype=torch.bool), "sum")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown kernel 'flex'"):
        block_linear_attention(q, k, v, taken, (8, 8), kernel="flex")  # type: ignore[arg-type]


def test_one_graph_when_compiled() -> None:
    (q, k, v), taken = given(torch.float32, 40, 40, (8, 8))
    with torch.no_grad():
        compiled = torch.compile(block_linear_attention, backend="eager", fullgraph=True)
        found, wanted = (f(q, k, v, taken, (8, 8)) for f in (compiled, block_linear_attention))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "." * 4 in done.stdout, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("how", ["direct", "subtract"])
@pytest.mark.parametrize(
    "sizes",
    [(100, 130, (64, 64)), (150, 90, (128, 64))]
    if INTERPRETED
    else [pytest.param((100, 130, (64, 64)), marks=pytest.mark.gpu)],
)
def test_triton_is_the_reference(sizes: tuple[int, int, tuple[int, int]], how: str) -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU")
    device, (queries, keys, block) = "cpu" if INTERPRETED else "cuda", sizes
    inputs, taken = given(torch.float32, queries, keys, block, 0.6)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    taken = taken.to(device)
    wanted = with_gradients(inputs, taken, block, kernel="reference")
    assert furthest(with_gradients(inputs, taken, block, how=how, kernel="triton"), wanted) < SINGLE
    assert sums_reference(*inputs, taken, block).numerator.requires_grad
