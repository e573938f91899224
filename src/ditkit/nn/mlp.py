"""Feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.run import DIRECT, Run


class SwiGLU(nn.Module):
    """W2 drop(SiLU(Wg u) * Wx u), all three with bias (PredFormer; Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, u: Tensor, run: Run = DIRECT, at: str = "") -> Tensor:
        out: Tensor = self.out(run.site(at + ".inner", self.hidden, u))
        return out

    def hidden(self, u: Tensor) -> Tensor:
        """Compute the values before the last layer, row by row."""
        return F.dropout(F.silu(self.gate(u)) * self.value(u), self.dropout, self.training)


class GEGLU(SwiGLU):
    """W2 drop(GELU(Wg u) * Wx u), all three with bias; GELU is exact (Shazeer, arXiv 2002.05202; DiMR)."""

    def hidden(self, u: Tensor) -> Tensor:
        """Compute the values before the last layer; row-wise."""
        return F.dropout(F.gelu(self.gate(u)) * self.value(u), self.dropout, self.training)


class PlainMLP(nn.Module):
    """W2 drop(GELU(W1 u)), both with bias: what a SwiGLU is measured against."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.inner = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, u: Tensor, run: Run = DIRECT, at: str = "") -> Tensor:
        out: Tensor = self.out(run.site(at + ".inner", self.hidden, u))
        return out

    def hidden(self, u: Tensor) -> Tensor:
        """Compute the values between the two layers, row by row."""
        return F.dropout(F.gelu(self.inner(u)), self.dropout, self.training)
