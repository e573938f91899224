"""Proxy tokens of windows (PT-DiT, arXiv 2409.04005): which windows, whose rows, and which of them.

B batch, n windows, M rows of a window, Q proxies of a window, S rows of a proxy, D width.
"""

from __future__ import annotations

from math import gcd, isqrt

import torch
from torch import Tensor

from ditkit.core.grid import Grid

WINDOWS = 64
"""Windows of a frame whose sizes are chosen by its grid: as many at every resolution (section 4.1)."""
WINDOW_FRAMES = 4


def fitting_window(grid: Grid) -> tuple[int, int, int]:
    """Return windows of which a frame has about 64, as square as they can be, of up to four frames."""

    def distance(window: tuple[int, int]) -> tuple[float, int]:
        height, width = window
        count = (grid.height // height) * (grid.width // width)
        return (_ratio(count, WINDOWS) * _ratio(height, width), height)

    every = [(h, w) for h in _divisors(grid.height) for w in _divisors(grid.width)]
    return (gcd(grid.frames, WINDOW_FRAMES), *min(every, key=distance))


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def _divisors(n: int) -> list[int]:
    low = [i for i in range(1, isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def members(x_BnMD: Tensor, window: tuple[int, int, int], proxies: tuple[int, int]) -> Tensor:
    """Rows of windows by the proxy they belong to, [B, n, S, Q, D]: Q proxies of S rows each.

    Of several proxies of a window each has the rows and columns with one remainder (the code), not a cell of its own.
    """
    frames, height, width = window
    rows, columns = proxies
    cut = x_BnMD.unflatten(2, (frames, height // rows, rows, width // columns, columns))
    return cut.transpose(4, 5).flatten(5, 6).flatten(2, 4)


def drawn(salt_B: Tensor, block: int, windows: int, proxies: int, rows: int) -> Tensor:
    """Draw one of `rows` rows for each proxy, [B, n, 1, Q], by a hash of the sample's salt, the block and the place."""
    place = torch.arange(windows * proxies, device=salt_B.device) + (block << 24)
    hashed = _hashed(_hashed(salt_B)[:, None] ^ _hashed(place))
    return (hashed % rows).view(-1, windows, 1, proxies)


def _hashed(x: Tensor) -> Tensor:
    """Mix the low 32 bits of whole numbers; no product reaches 2^63."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x
