"""RAS: how many rows are left out, which ones, and the settings that say so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.caching import RAS
from ditkit.caching.regional import by_row, row_metric
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid, Segment
from ditkit.core.policy import Policy
from ditkit.core.spec import component, spec

SD3 = RAS()
LUMINA = RAS(reset_every=0, resets=(12, 22), high_ratio=1.0, slope=256)


def test_skip_lists_of_the_paper() -> None:
    skips = SD3.skipped(28, 4096)
    assert skips == [0 if i < 4 or i in (12, 20) else 2048 for i in range(28)]
    assert 1 - sum(skips) / 28 / 4096 == pytest.approx(0.6071, abs=5e-5)
    spans = [
        (4, 1280),
        (4, 1536),
        (1, 0),
        (3, 1792),
        (4, 2048),
        (2, 2304),
        (1, 0),
        (1, 2304),
        (4, 2560),
        (2, 2816),
    ]
    skips = LUMINA.skipped(30, 4096)
    assert skips == [0] * 4 + [count for times, count in spans for _ in range(times)]
    assert 1 - sum(skips) / 30 / 4096 == pytest.approx(0.6125, abs=5e-5)


def test_after_the_end_all_rows_are_computed() -> None:
    assert replace(SD3, end=24).skipped(28, 4096)[20:] == [0, 2048, 2048, 2048, 0, 0, 0, 0]


def test_a_slope_that_leaves_out_too_many_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="slope=256 leaves out -768 of 64 rows in evaluation 4 of 30"):
        LUMINA.skipped(30, 64)


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
def test_published_rows_are_those_of_the_code(high_ratio: float) -> None:
    """Its own words: sort q exp(k D), D from -(T + 1); leave out both ends, and count those."""
    policy, n, q = replace(SD3, high_ratio=high_ratio, starvation=1.0), 17, torch.rand(1, 40)
    counts, drops = torch.zeros(40) - 29, torch.zeros(1, 40)
    for _ in range(12):
        order = (q[0] * torch.exp(counts)).argsort()
        low, high = int(n * (1 - high_ratio)), int(n * high_ratio)
        left_out = torch.cat([order[:low], order[40 - high :]])
        counts[left_out] += 1
        rows = policy.chosen(q, drops, n)
        drops = policy.counted(drops, rows)
        assert sorted([*rows[0].tolist(), *left_out.tolist()]) == list(range(40))
        assert torch.equal(drops[0] - 29, counts)


def longest_runs(policy: RAS, q: Tensor, steps: int, skip: int) -> Tensor:
    """The most evaluations in a row that left out each row; `steps` for one that was never computed."""
    drops, run = torch.zeros_like(q), torch.zeros_like(q)
    longest = torch.zeros_like(q)
    for _ in range(steps):
        rows = policy.chosen(q, drops, skip)
        drops, run = policy.counted(drops, rows), (run + 1).scatter(1, rows, 0.0)
        longest = torch.maximum(longest, run)
    return longest


@pytest.mark.parametrize("selection", ["low", "high"])
@pytest.mark.parametrize("k", [0.1, 0.5, 1.0])
def test_no_row_starves_under_the_corrected_sign(selection: Any, k: float) -> None:
    """Once a row's D exceeds the spread of log q over k, nothing computed since ranks above it again."""
    q, rows, skip = torch.rand(1, 64) + 0.2, 64, 48
    bound = float((q.max() / q.min()).log()) / k + rows / (rows - skip) + 1
    runs = longest_runs(RAS(selection=selection, starvation=k), q, 200, skip)
    assert runs.max() <= bound
    assert longest_runs(RAS(selection=selection, starvation=0.0), q, 200, skip).max() == 200


def test_rows_starve_under_the_published_sign() -> None:
    runs = longest_runs(RAS(high_ratio=1.0), torch.rand(1, 64) + 0.2, 200, 32)
    assert (runs == 200).float().mean() == 0.5


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("metric", ["std", "l2"])
def test_metric_and_mask_of_a_row_are_those_of_its_patch(p: int, metric: Any) -> None:
    v, image = torch.randn(2, 3, 3 * p, 5 * p), Segment("image", Grid(1, 3, 5), 15)
    of = partial(torch.std, correction=0) if metric == "std" else torch.linalg.vector_norm
    q, mask, expected = row_metric(v, image, metric), torch.rand(2, 15) < 0.5, torch.zeros(2, 1, 3 * p, 5 * p)
    for b in range(2):
        for row in range(15):
            top, left = row // 5 * p, row % 5 * p
            pixels = [of(v[b, :, top + i, left + j]) for i in range(p) for j in range(p)]
            assert q[b, row] == pytest.approx(float(sum(pixels) / p**2), rel=1e-5)
            expected[b, 0, top : top + p, left : left + p] = mask[b, row]
    assert torch.equal(by_row(mask, image, v), expected.bool())


def test_metric_of_packed_tokens_and_of_clips() -> None:
    v = torch.randn(2, 3, 4, 4, 6)
    clip, packed = Segment("image", Grid(2, 2, 3), 12), Segment("image", Grid(12), 12)
    q = row_metric(v, clip, "std")
    assert q[1, 7] == pytest.approx(float(v[1, :, 2:4, 0:2, 2:4].std(0, correction=0).mean()), rel=1e-5)
    tokens = torch.randn(2, 12, 8)
    assert torch.allclose(row_metric(tokens, packed, "std"), tokens.std(-1, correction=0))
    assert by_row(torch.ones(2, 12, dtype=torch.bool), packed, tokens).shape == (2, 12, 1)


@pytest.mark.parametrize(
    "policy", [RAS(), LUMINA, RAS(0.25, end=24, resets=(7,), selection="low", metric="l2", starvation=1.0)]
)
def test_text(policy: RAS) -> None:
    assert component(Policy, spec(policy)) == policy  # type: ignore[type-abstract]


def test_resets_as_text() -> None:
    read = component(Policy, "ras:ratio=0.25,resets=12+22,end=none")  # type: ignore[type-abstract]
    assert read == RAS(0.25, resets=(12, 22))
    with pytest.raises(ConfigError, match="resets='12\\+x', expected an integer"):
        component(Policy, "ras:resets=12+x")  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0 should lie in .0, 1]"),
        ({"ratio": float("nan")}, "ratio=nan should lie in .0, 1]"),
        ({"high_ratio": 1.5}, "high_ratio=1.5 should lie in .0, 1]"),
        ({"starvation": -1.0}, "starvation=-1.0 should be at least 0 and finite"),
        ({"warmup": 0}, "warmup=0 should be at least 1"),
        ({"resets": (3, -1)}, r"resets=\(3, -1\) should be at least 0"),
        ({"end": 2.5}, "end=2.5 should be an integer of at least 0 or none"),
        ({"metric": "l1"}, "unknown metric 'l1'.*did you mean 'l2'"),
        ({"selection": "lowest"}, "unknown selection 'lowest'; did you mean 'low'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RAS(**changes)


def test_the_spread_of_one_channel_is_refused() -> None:
    image = Segment("image", Grid(1, 3, 5), 15)
    with pytest.raises(ConfigError, match="of 1 channel is 0, expected metric='l2'"):
        row_metric(torch.randn(2, 1, 6, 10), image, "std")
    assert row_metric(torch.randn(2, 1, 6, 10), image, "l2").shape == (2, 15)
