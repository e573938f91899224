"""The selective scan against its loop over tokens: values, gradients, lengths, limits, counts and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.bench.macs import count_macs
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.ops.selective_scan import cpu, scan_reference, selective_scan

NAMES = ("x", "delta", "A", "B", "C", "D", "bias")


def tensors(
    tokens: int,
    channels: int = 3,
    states: int = 1,
    samples: int = 2,
    groups: int = 2,
    dtype: Any = torch.float64,
) -> list[Tensor]:
    torch.manual_seed(tokens)
    x, delta = torch.randn(2, samples, groups, tokens, channels, dtype=dtype)
    B, C = torch.randn(2, samples, groups, tokens, states, dtype=dtype)
    D, bias = torch.randn(2, groups, channels, dtype=dtype)
    A = -torch.rand(groups, channels, states, dtype=dtype) - 0.2
    return [v.requires_grad_() for v in (x, delta, A, B, C, D, bias)]


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 64, 75, 200])
def test_equals_the_loop_and_its_gradients(tokens: int, states: int) -> None:
    inputs = tensors(tokens, states=states)
    ours, exact = selective_scan(*inputs), scan_reference(*inputs)
    weight = torch.randn_like(exact)
    grads, true = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, exact))
    for found, expected in zip((ours, *grads), (exact, *true), strict=True):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_in_float32_to_a_hundred_thousandth() -> None:
    inputs = [v.detach() for v in tensors(500, channels=8, dtype=torch.float32)]
    exact = scan_reference(*(v.double() for v in inputs))
    for ours in (selective_scan(*inputs), scan_reference(*inputs)):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name: str) -> None:
    inputs = tensors(11, channels=2, samples=1)
    place = NAMES.index(name)

    def of_one(value: Tensor) -> Tensor:
        return selective_scan(*inputs[:place], value, *inputs[place + 1 :])

    for i, v in enumerate(inputs):
        v.requires_grad_(i == place)
    assert torch.autograd.gradcheck(of_one, (inputs[place],))


def test_parts_of_the_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample's channels at a time, one at a time, or several samples."""
    inputs = tensors(20, channels=5, samples=3)
    whole = selective_scan(*inputs)
    grads = torch.autograd.grad(whole.square().sum(), inputs)
    for held in (1, 100, 500):
        monkeypatch.setattr(cpu, "HELD", held)
        some = selective_scan(*inputs)
        assert torch.equal(some, whole)
        for found, expected in zip(torch.autograd.grad(some.square().sum(), inputs), grads, strict=True):
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_decay_without_bound_has_no_memory_and_a_step_of_zero_no_scan() -> None:
    x, delta, A, B, C, D, bias = (v.detach() for v in tensors(30))
    step = torch.nn.functional.softplus(delta + bias[:, None])
    forgetful = selective_scan(x, delta, A * 1e6, B, C, D, bias)
    assert torch.allclose(forgetful, C * B * step * x + D[:, None] * x, atol=1e-12)
    assert torch.allclose(selective_scan(x, delta - 1e3, A, B, C, D, bias), D[:, None] * x, atol=1e-12)


def test_a_token_sees_itself_and_those_before_it() -> None:
    inputs = tensors(40)
    with torch.no_grad():
        y = selective_scan(*inputs)
        inputs[0][:, :, 17] += 1
        changed = (selective_scan(*inputs) != y).any((0, 1, 3))
    assert not changed[:17].any() and changed[17:25].all()


def test_no_loop_over_tokens() -> None:
    """Calls of torch grow with the logarithm of the length: a third more of them for eight times the tokens."""
    counts = []
    for tokens in (64, 512, 4096):
        inputs = [v.detach() for v in tensors(tokens, channels=1, samples=1, groups=1)]
        with torch.profiler.profile() as profile:
            selective_scan(*inputs)
        counts.append(sum(event.name == "aten::addcmul_" for event in profile.events()))
    assert counts[1] - counts[0] == counts[2] - counts[1] == cpu.RADIX
    assert counts[0] < 20


def test_sixteen_bits_are_widened() -> None:
    inputs = [v.detach().bfloat16() for v in tensors(300)]
    y = selective_scan(*inputs)
    assert y.dtype == torch.float32
    assert torch.allclose(y, scan_reference(*(v.float() for v in inputs)), atol=1e-4)


def test_macs_forward_and_backward() -> None:
    inputs = tensors(10, channels=3, states=2)
    each = 2 * 2 * 10 * 3 * (9 * 2 + 1)
    assert count_macs(selective_scan, *inputs).by_kind == {"scan": each}
    assert count_macs(lambda: selective_scan(*inputs).sum().backward()).by_kind == {"scan": 3 * each}


def test_nothing_is_kept_without_gradients() -> None:
    inputs = tensors(10)
    op = torch.ops.ditkit.selective_scan
    assert op(*inputs, True, "cpu")[1].shape == (2, 2, 10, 3, 1)
    with torch.no_grad():
        assert op(*inputs, False, "cpu")[1].numel() == 0


def test_bad_input_is_refused_in_one_line() -> None:
    x, delta, A, B, C, D, bias = tensors(4)
    with pytest.raises(ShapeError, match=r"x \[2, 2, 0, 3\] has no tokens to scan"):
        selective_scan(x[:, :, :0], delta[:, :, :0], A, B[:, :, :0], C[:, :, :0], D, bias)
    with pytest.raises(ShapeError, match=r"B \[2, 2, 4, 1\] for x \[2, 2, 4, 3\], expected \[2, 2, 4, 2\]"):
        selective_scan(x, delta, A.expand(-1, -1, 2), B, C.expand(-1, -1, -1, 2), D, bias)
    with pytest.raises(ShapeError, match=r"D \[3\]"):
        selective_scan(x, delta, A, B, C, D[0], bias)
    with pytest.raises(ConfigError, match="unknown kernel 'cuda'"):
        selective_scan(x, delta, A, B, C, D, bias, kernel="cuda")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"kernel triton: .*kernel='reference' is a loop"):
        selective_scan(x, delta, A, B, C, D, bias, kernel="triton")
