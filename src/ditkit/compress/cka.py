"""Linear CKA (Kornblith et al., arXiv 1905.00414), and the linear probes that stand in for blocks (PPCL).

R rows, which are tokens, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred columns, x [R, D] and y [R, E], in float64.

    It is 1 for equal features up to a rotation and a scale, and HSIC of linear kernels, normalised. Constant features,
    which have no such number, give 0.
    """
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    both, own, other = (a.mT @ b for a, b in ((y, x), (x, x), (y, y)))
    scale = own.norm() * other.norm()
    return float(both.square().sum() / scale) if scale else 0.0


class Affine(NamedTuple):
    """A map of rows, x W^T + b: the weights of a linear layer, [E, D] and [E]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


def fit_affine(x: Tensor, y: Tensor) -> Affine:
    """Fit x W^T + b to y [R, E] by least squares, of rows x [R, D], in float32 or wider, on the CPU.

    Of rows that do not span all channels it is the least of the maps that fit, and the same to the bit each time.

    Raises:
        ConfigError: there are too few rows to tell the columns apart.
    """
    check_rows(len(x), x.shape[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = torch.cat([x.to(wide), x.new_ones(len(x), 1, dtype=wide)], 1)
    # by singular values: the CPU's default pivots, and differs from run to run where columns depend on each other;
    # a GPU has only the driver that expects that they do not
    found = torch.linalg.lstsq(rows.cpu(), y.to(wide).cpu(), driver="gelsd").solution.to(x.device)
    return Affine(found[:-1].mT.contiguous(), found[-1].contiguous())


class NormalEquations:
    """Least squares from sums over batches of rows, for more of them than memory holds.

    (A^T A + lambda I) W = A^T y with a column of ones in A, whose bias no ridge pulls on; lambda = ridge tr(A^T A) / D.

    Args:
        ridge: 1e-4 where rows hardly differ; 0 is plain least squares.
    """

    def __init__(self, ridge: float = 1e-4) -> None:
        self.ridge, self.rows = ridge, 0
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x [R, D] and what is wanted of them, y [R, E]; sums are float64."""
        rows = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], 1)
        gram, cross = rows.mT @ rows, rows.mT @ y.double()
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross
        self.rows += len(x)

    def solve(self) -> Affine:
        """Return the fit, in float64.

        Raises:
            ConfigError: there are too few rows to tell the columns apart, and no ridge.
        """
        assert self.gram is not None and self.cross is not None, "rows come first"
        D = len(self.gram) - 1
        if not self.ridge:
            check_rows(self.rows, D)
        mean = self.gram[:-1, -1] / self.rows
        centred = self.gram[:-1, :-1] - self.rows * mean[:, None] * mean
        pull = self.ridge * self.gram.diagonal()[:-1].sum() / D
        wanted = self.cross[-1] / self.rows
        cross = self.cross[:-1] - self.rows * mean[:, None] * wanted
        weight = torch.linalg.solve(
            centred + pull * torch.eye(D, dtype=torch.float64, device=mean.device), cross
        )
        return Affine(weight.mT.contiguous(), wanted - mean @ weight)


def check_rows(rows: int, width: int) -> None:
    """Refuse fewer rows than a linear map of so many channels has columns.

    Raises:
        ConfigError: names both.
    """
    if rows <= width:
        raise ConfigError(
            f"calibration has {rows} tokens, expected more than the {width} channels that are fitted to them; give "
            "more samples"
        )
