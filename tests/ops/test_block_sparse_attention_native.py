"""The compiled kernel against the definition and against torch's operations, and what happens without a compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from block_sparse_support import of_pairs, random_pairs
from ditkit.ops.block_sparse_attention import BlockPlan, attend, attend_reference, cpu, native

needs_compiler = pytest.mark.skipif(
    next(filter(None, map(shutil.which, native.COMPILERS)), None) is None, reason="no C++ compiler"
)
CASES = [
    # batch rows, heads, queries, keys, width, width of values, block
    (2, 3, 100, 77, 8, 8, 8),
    (1, 2, 130, 150, 24, 40, (64, 16)),
    (1, 1, 200, 140, 64, 64, 128),
    (1, 1, 70, 300, 5, 3, (16, 256)),
]
Case = tuple[int, int, int, int, int, int, int | tuple[int, int]]


def given(case: Case) -> tuple[list[Tensor], BlockPlan]:
    batch, heads, queries, keys, width, of_values, block = case
    draw = torch.Generator().manual_seed(0)
    shapes = ((queries, width), (keys, width), (keys, of_values))
    pairs = random_pairs(queries, keys, batch, heads, 0.3)
    pairs[:, :, 2] = False  # a query that sees nothing
    return [torch.randn(batch, heads, *shape, generator=draw) for shape in shapes], of_pairs(
        pairs, block, blind=True
    )


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_log_sum_exp_and_gradients_are_those_of_the_definition(case: Case) -> None:
    inputs, plan = given(case)
    scale = 1.3 * inputs[0].shape[-1] ** -0.5
    wide = [x.double().requires_grad_() for x in inputs]
    exact = attend_reference(*wide, plan.mask(), scale)
    found = native.forward(*inputs, plan, scale)
    assert (found[0] - exact.out).abs().max() < 2e-6
    seen = exact.lse > -torch.inf
    assert torch.equal(found[1] > -torch.inf, seen) and (found[0][~seen] == 0).all()
    assert (found[1] - exact.lse)[seen].abs().max() < 2e-6
    draw = torch.Generator().manual_seed(1)
    d_out, d_lse = (torch.randn(x.shape, generator=draw) for x in found)
    d_lse = d_lse * seen
    loss = (exact.out * d_out).sum() + (exact.lse.masked_fill(~seen, 0) * d_lse).sum()
    wanted = torch.autograd.grad(loss, wide)
    grads = native.backward(d_out, d_lse, *inputs, *found, plan, scale)
    assert all((a - b).abs().max() < 1e-5 * b.abs().max() for a, b in zip(grads, wanted, strict=True))
    again = native.backward(d_out, d_lse, *inputs, *found, plan, scale)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    inputs, plan = given(CASES[1])
    narrow = [x.to(dtype) for x in inputs]
    found, wide = (native.forward(*xs, plan, 0.2) for xs in (narrow, [x.float() for x in narrow]))
    assert torch.equal(found[0], wide[0].to(dtype)) and torch.equal(found[1], wide[1])
    torch.set_num_threads(3)
    try:
        assert torch.equal(native.forward(*narrow, plan, 0.2)[0], found[0])
    finally:
        torch.set_num_threads(1)


@needs_compiler
def test_what_is_not_a_number_stays_so_and_what_is_hidden_counts_nothing() -> None:
    inputs, plan = given(CASES[0])
    plain, _ = native.forward(*inputs, plan, 1.0)
    hidden = ~plan.mask()[:, :, :, 5].any(2)
    q, k, v = (x.clone() for x in inputs)
    k[:, :, 5], v[:, :, 5] = 1e4, 1e4
    changed, _ = native.forward(q, k, v, plan, 1.0)
    sees = plan.mask()[..., 5].expand(2, 3, -1)
    assert torch.equal(changed[~sees], plain[~sees]) and not torch.equal(changed[sees], plain[sees])
    assert hidden.shape == (2, 3)
    q[0, 0, 40] = torch.nan
    broken, _ = native.forward(q, *inputs[1:], plan, 1.0)
    assert broken[0, 0, 40].isnan().all() and broken.isnan().any(-1).sum() == 1


def test_without_a_compiler_torch_does_it_and_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, plan = given(CASES[2])
    by_either = attend(*inputs, plan, kernel="cpu")
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    try:
        assert not native.is_there(torch.float32)
        by_torch = cpu.forward(*inputs, plan, inputs[0].shape[-1] ** -0.5)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert (by_either.out - by_torch[0]).abs().max() < 2e-6
    assert not native.is_there(torch.float64)


@needs_compiler
def test_a_compiler_that_fails_is_said_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++\n")
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        assert native.library() is None and "made no kernel" in caplog.text
    finally:
        native.library.cache_clear()
    assert list((tmp_path / "cache" / "ditkit" / "kernels").iterdir()) == []


@needs_compiler
@pytest.mark.parametrize("call", ["forward", "backward"])
def test_memory_that_is_not_there_is_an_error_and_not_the_end_of_the_process(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, plan = given(CASES[0])
    found = native.forward(*inputs, plan, 1.0)
    honest = native._arguments

    def vast(*parts: object) -> native.Arguments:
        arguments = honest(*parts)  # type: ignore[arg-type]
        arguments.columns = 2**50  # what is packed would take petabytes
        return arguments

    monkeypatch.setattr(native, "_arguments", vast)
    with pytest.raises(MemoryError, match="no memory for the packed blocks"):
        if call == "forward":
            native.forward(*inputs, plan, 1.0)
        else:
            native.backward(torch.ones_like(found[0]), torch.zeros_like(found[1]), *inputs, *found, plan, 1.0)
