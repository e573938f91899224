"""Convolutions of rows that stand for a grid: [B, L, D] in and out, L = H W in row-major order.

The rows of a grid are its map in the memory order that torch calls channels_last, so that going from one to the other
copies nothing.

B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid


def to_map(x_BLD: Tensor, grid: Grid) -> Tensor:
    """Lay rows out as the map [B, D, H, W] of their grid.

    Raises:
        ShapeError: the rows do not fill one frame of the grid.
    """
    if grid.frames != 1 or x_BLD.shape[1] != grid.length:
        raise ShapeError(f"to_map: {x_BLD.shape[1]} rows do not fill a grid of {grid.shape}")
    return x_BLD.mT.unflatten(2, (grid.height, grid.width))


def to_rows(x_BDHW: Tensor) -> Tensor:
    """Read a map [B, D, H, W] as rows [B, L, D]."""
    return x_BDHW.flatten(2).mT


class MapConv(nn.Conv2d):
    """A convolution of odd kernel that keeps height and width, of rows.

    Args:
        width: channels of a row. out: channels of a row that it returns.
    """

    def __init__(self, width: int, out: int, kernel: int = 3, groups: int = 1, bias: bool = True) -> None:
        super().__init__(width, out, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        return to_rows(super().forward(to_map(x_BLD, grid)))


class DepthwiseConv(MapConv):
    """Each channel convolved on its own."""

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__(width, width, kernel, groups=width)


class ChannelAttention(nn.Module):
    """Compact channel attention (DiCo, section 3.2): u * sigmoid(P mean(u) + b), the mean over all rows.

    One square matrix on the pooled vector, without a squeeze. The mean runs over the whole picture, so a network that
    is cut into tiles or spread over ranks must reduce it over all of them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, u_BLD: Tensor) -> Tensor:
        return u_BLD * self.gate(u_BLD)

    def gate(self, u_BLD: Tensor) -> Tensor:
        """Return what each channel is multiplied by, [B, 1, D]."""
        return torch.sigmoid(self.project(u_BLD.mean(1, keepdim=True)))


class DepthwiseBranch(nn.Module):
    """DiCo's convolution: W2 gate(u), u = GELU(DW3x3(W1 x)), all with bias; GELU is exact.

    Args:
        attends: gate the channels by `ChannelAttention`; without, the ablation of the paper's table 5.
    """

    def __init__(self, width: int, attends: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.depthwise = DepthwiseConv(width)
        self.attention = ChannelAttention(width) if attends else nn.Identity()
        self.outer = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        u_BLD = F.gelu(self.depthwise(self.inner(x_BLD), grid))
        out: Tensor = self.outer(self.attention(u_BLD))
        return out


class TextConv(nn.Module):
    """A depthwise convolution whose kernels are a caption: each sample has its own (DiCo, text-to-image).

    Two layers take each text token to D channels; the tokens are the places of a square kernel, row by row, the last
    one again where the text has fewer (77 tokens of CLIP fill 9 x 9 so).

    Args:
        width: channels of a row. text: of a text token. side: of the kernel, odd.
    """

    def __init__(self, width: int, text: int, side: int = 9) -> None:
        super().__init__()
        self.side = side
        self.inner, self.outer = nn.Linear(text, width), nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, text_BSE: Tensor, grid: Grid) -> Tensor:
        """Convolve rows [B, L, D] under the text [B, S, E].

        Raises:
            ShapeError: the text has more tokens than the kernel has places.
        """
        kernels = self.kernels(text_BSE)
        B, D = kernels.shape[:2]
        one = to_map(x_BLD, grid).reshape(1, B * D, grid.height, grid.width)
        out = F.conv2d(
            one, kernels.reshape(B * D, 1, self.side, self.side), padding=self.side // 2, groups=B * D
        )
        return to_rows(out.reshape(B, D, grid.height, grid.width))

    def kernels(self, text_BSE: Tensor) -> Tensor:
        """Return each sample's kernels, [B, D, side, side]."""
        places, given = self.side**2, text_BSE.shape[1]
        if given > places:
            raise ShapeError(f"TextConv: {given} text tokens, expected at most {self.side} x {self.side}")
        k_BSD = self.outer(F.gelu(self.inner(text_BSE)))
        k_BSD = torch.cat([k_BSD, k_BSD[:, -1:].expand(-1, places - given, -1)], 1)
        return k_BSD.mT.unflatten(2, (self.side, self.side))
