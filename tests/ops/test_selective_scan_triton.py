"""The selective scan's Triton kernels against the definition: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.ops.selective_scan import scan_reference, selective_scan

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [
    # samples, groups, tokens, channels, type
    (1, 2, 6, 5, torch.float32),  # the last tiles of tokens and of channels are cut
    (1, 1, 1, 3, torch.float32),
    (1, 1, 4, 3, torch.float16),
]
TILE = 4
"""The interpreter takes a millisecond for each place of a tile."""


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_kernels_in_the_interpreter() -> None:
    # in a process of its own: what triton.jit makes is decided when it is imported
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "." * (len(CASES) + 1) in done.stdout, done.stdout[-3000:] + done.stderr


def tensors(samples: int, groups: int, tokens: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    of_tokens, of_channels = (samples, groups, tokens), (groups, channels)
    x, delta = torch.randn(2, *of_tokens, channels).to(dtype)
    B, C = torch.randn(2, *of_tokens, 1).to(dtype)
    D, bias = torch.randn(2, *of_channels)
    made = [x, delta, -torch.rand(*of_channels, 1) - 0.2, B, C, D, bias]
    return [v.to(DEVICE).requires_grad_() for v in made]


@pytest.mark.parametrize(
    "case", CASES if INTERPRETED else [pytest.param(case, marks=pytest.mark.gpu) for case in CASES], ids=str
)
def test_equals_the_reference(
    case: tuple[int, int, int, int, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if INTERPRETED:
        monkeypatch.setattr("ditkit.ops.selective_scan.triton.TOKENS", TILE)
        monkeypatch.setattr("ditkit.ops.selective_scan.triton.CHANNELS", TILE)
    inputs = tensors(*case)
    wide = [v.detach().double().requires_grad_() for v in inputs]
    ours, exact = selective_scan(*inputs, kernel="triton"), scan_reference(*wide)
    weight = torch.randn_like(exact)
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    true = torch.autograd.grad((exact * weight).sum(), wide)
    bound = 1e-5 if case[-1] == torch.float32 else 2e-3
    assert ours.dtype == torch.float32
    for found, expected in zip((ours, *grads), (exact, *true), strict=True):
        assert (found - expected).norm() <= bound * expected.norm()  # one token has no decay to learn


@pytest.mark.skipif(not INTERPRETED, reason="asked of the interpreted run")
def test_what_it_cannot_take_is_refused_by_name() -> None:
    x, delta, A, B, C, D, bias = tensors(1, 1, 4, 3, torch.float32)
    with pytest.raises(ConfigError, match="kernel triton: 2 states of a channel, expected 1"):
        selective_scan(
            x, delta, A.expand(-1, -1, 2), B.expand(-1, -1, -1, 2), C.expand(-1, -1, -1, 2), D, bias, "triton"
        )
    with pytest.raises(ConfigError, match=r"kernel triton: got torch\.float64"):
        selective_scan(*(v.double() for v in (x, delta, A, B, C, D, bias)), "triton")
