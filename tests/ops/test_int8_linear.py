"""Products of int8: the numbers of the slow twin by each library, at the edges too, and a probe."""

from __future__ import annotations

import pytest
import torch

from ditkit.core.errors import ConfigError
from ditkit.ops.int8_linear import (
    KERNELS,
    fastest,
    find,
    kernels,
    linear_reference,
    measure,
    pack4,
    quantise,
    unpack4,
)

CPU = torch.device("cpu")


def drawn(rows: int, inputs: int, outputs: int, bits: int):
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(rows, inputs, generator=g) + 1
    q = torch.randint(0, 2**bits, (outputs, inputs), generator=g)
    zero = torch.randint(-5, 2**bits + 5, (outputs,), generator=g)
    scale, bias = torch.rand(outputs, generator=g) + 0.1, torch.randn(outputs, generator=g)
    return x, q, scale, zero, bias


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("bits", "activations"), [(8, 8), (8, 7), (4, 8)])
@pytest.mark.parametrize("zero", [0, 100, 255])
def test_a_product_is_the_slow_twin(name, bits, activations, zero):
    x, q, scale, weight_zero, bias = drawn(37, 65, 51, bits)
    expected = linear_reference(
        x.double(), 0.05, zero, activations, q.double(), scale.double(), weight_zero.double(), bias.double()
    )
    middle = 128 if bits == 8 else 0
    packed = KERNELS[name].pack(
        (q - middle).to(torch.int8), scale, (weight_zero - middle).int(), bias, activations
    )
    out = KERNELS[name].product(quantise(x, 0.05, zero, activations) - zero, zero, 0.05, packed)
    assert (out - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_overflows(name, sign):
    q = torch.full((16, 64), 127 if sign > 0 else -128, dtype=torch.int8)
    packed = KERNELS[name].pack(q, torch.ones(16), torch.zeros(16, dtype=torch.int32), None)
    out = KERNELS[name].product(torch.full((3, 64), 255.0), 0, 1.0, packed)
    assert (out == 255 * 64 * int(q[0, 0])).all()


def test_halves_are_taken_only_where_sixteen_bits_could_overflow(monkeypatch):
    small, large = torch.full((2, 6), 64, dtype=torch.int8), torch.full((2, 6), 65, dtype=torch.int8)
    assert [kernels.overflows(q, 255) for q in (small, large, -small, -large)] == [False, True, False, True]
    assert not kernels.overflows(torch.full((2, 5), 127, dtype=torch.int8), 127)
    alternating = torch.tensor([[127, -128, 127]], dtype=torch.int8)
    assert not kernels.overflows(alternating, 255)
    one, zero = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    for wide in (True, False):
        monkeypatch.setattr(kernels, "wide_sums", lambda wide=wide: wide)
        assert KERNELS["fbgemm"].pack(large, one, zero, None).split is not wide


def test_the_probe_takes_the_fastest_of_those_that_are_right(monkeypatch):
    seconds = measure(CPU, (32, 64, 32))
    assert set(seconds) <= set(KERNELS) and "torch" in seconds
    monkeypatch.setattr(KERNELS["torch"], "product", lambda a, **_: a[:, :32])  # a wrong one is left out
    assert "torch" not in measure(CPU, (32, 64, 32))
    fastest.cache_clear()
    monkeypatch.setattr(kernels, "measure", lambda device: {"torch": 2.0, "fbgemm": 1.0})
    assert fastest(CPU).name == "fbgemm"
    fastest.cache_clear()


def test_where_no_library_has_a_product_it_is_one_line():
    with pytest.raises(
        ConfigError, match="no library here has a product of int8 on 'mps', expected cpu or cuda"
    ):
        find("auto", torch.device("mps"))
    with pytest.raises(ConfigError, match="int8 kernel 'fbgemm' does not run on 'cuda'"):
        find("fbgemm", torch.device("cuda"))
    with pytest.raises(ConfigError, match="unknown int8 kernel 'mkl'"):
        find("mkl", CPU)


@pytest.mark.parametrize("width", [7, 8])
def test_four_bits_are_two_a_byte(width):
    q = torch.randint(0, 16, (5, width), dtype=torch.uint8)
    packed = pack4(q)
    assert packed.shape == (5, 4) and torch.equal(unpack4(packed, width), q)
