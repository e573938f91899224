"""Samples as pictures: 8-bit tensors, PNG files, and the labelled sheet of a comparison."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

CELL, GAP, MARGIN = 96, 4, 12
LABEL_WIDTH, LINE = 250, 18
INK, PALE, PAPER = "#1b1f24", "#667085", "#ffffff"


def as_pictures(samples: Tensor) -> Tensor:
    """[n, C, H, W] in [-1, 1] as uint8 [n, 1 or 3, H, W]; of other numbers of channels, the first."""
    shown = samples if samples.shape[1] in (1, 3) else samples[:, :1]
    return ((shown.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image(picture: Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] as a PIL image."""
    from PIL import Image

    return Image.fromarray(picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def sheet(
    pictures: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], heads: Sequence[str]
) -> Image.Image:
    """A row of pictures a method under column heads, each row with its caption's lines on the left.

    Args:
        pictures: uint8 [n, 1 or 3, H, W] by method; the first `len(heads)` of each are shown.
        captions: lines of text by method; the first is its title.
    """
    from PIL import Image, ImageDraw

    size = (
        2 * MARGIN + LABEL_WIDTH + len(heads) * (CELL + GAP),
        2 * MARGIN + LINE + len(pictures) * (CELL + GAP),
    )
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    left, top = MARGIN + LABEL_WIDTH, MARGIN + LINE
    for column, head in enumerate(heads):
        draw.text((left + column * (CELL + GAP), MARGIN), clipped(head, CELL), PALE, font(11))
    for row, (name, of_method) in enumerate(pictures.items()):
        y = top + row * (CELL + GAP)
        for line, text in enumerate(captions[name]):
            look = (INK, font(14)) if line == 0 else (PALE, font(12))
            draw.text((MARGIN, y + 6 + line * LINE), clipped(text, LABEL_WIDTH, look[1].size), *look)
        for column, picture in enumerate(of_method[: len(heads)]):
            shown = image(picture).resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(shown, (left + column * (CELL + GAP), y))
    return page


def font(size: int):  # type: ignore[no-untyped-def]  # Pillow returns one of two unrelated classes
    from PIL import ImageFont

    return ImageFont.load_default(size)


def clipped(text: str, width: int, size: float = 11) -> str:
    """`text`, cut to fit `width` pixels."""
    length = font(int(size)).getlength
    if length(text) <= width:
        return text
    while text and length(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
