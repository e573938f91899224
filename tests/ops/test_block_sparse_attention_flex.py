"""FlexAttention, compiled, under the same plans: a cross-check that shares no code with our kernels."""

from __future__ import annotations

import pytest
import torch

from ditkit.core.errors import ConfigError
from ditkit.ops.block_sparse_attention import attend, build_plan
from ditkit.ops.block_sparse_attention.flex import block_mask, flex_out


def test_flex_equals_our_kernel() -> None:
    pairs = torch.rand(2, 2, 150, 200) < 0.1
    pairs[..., :64], pairs[..., 64:128] = True, False
    plan = build_plan(
        150, 200, 64, allowed=lambda b, h, q, k: pairs[b, h, q, k], batches=2, heads=2, kept=None, order=None
    )
    mask = block_mask(plan)
    assert int(mask.kv_num_blocks.sum()) == plan.partial
    assert int(mask.full_kv_num_blocks.sum()) == plan.visited - plan.partial
    q, k, v = (torch.randn(2, 2, n, 16) for n in (150, 200, 200))
    assert torch.allclose(flex_out(q, k, v, plan, 0.25), attend(q, k, v, plan, scale=0.25).out, atol=1e-5)


def test_flex_is_refused_where_it_would_be_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    q = torch.zeros(1, 1, 64, 16)
    with pytest.raises(ConfigError, match="TORCHDYNAMO_DISABLE=1 switches"):
        flex_out(q, q, q, build_plan(64, block=64), 0.25)
