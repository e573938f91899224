"""Pictures as files: complete, or not there at all."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.evaluate.sheet import as_pictures, image, png

GAP_PX = 2
"""White between the pictures of a grid, before enlarging."""
SEEN_PX = 96
"""A side from about which on a person sees what a picture shows."""


def write_png(path: Path, picture: Tensor) -> Path:
    """One picture [C, H, W] in [-1, 1], at its own size.

    Raises:
        ConfigError: the file cannot be written; an earlier one stays as it was.
    """
    content = png(image(as_pictures(picture[None])[0]))
    with replacing(path) as draft:
        draft.write_bytes(content)
    return path


def grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures [B, C, H, W] in rows of `columns` on white, enlarged to be seen: [C, H', W']."""
    _, channels, height, width = pictures.shape
    down, right = height + GAP_PX, width + GAP_PX
    rows = -(-len(pictures) // columns)
    page = pictures.new_ones(channels, rows * down + GAP_PX, columns * right + GAP_PX)
    for i, picture in enumerate(pictures):
        y, x = GAP_PX + i // columns * down, GAP_PX + i % columns * right
        page[:, y : y + height, x : x + width] = picture
    scale = max(1, SEEN_PX // width)
    return page.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
