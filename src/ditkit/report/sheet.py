"""Samples as pictures: 8-bit tensors, PNG files, and the labelled sheet of a comparison."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.errors import DataError, ShapeError

if TYPE_CHECKING:
    from PIL import Image

CELL, GAP, MARGIN = 96, 4, 12
LABEL_WIDTH, LINE, HEAD_LINE, CAPTION_TOP = 250, 18, 14, 6
INK, PALE, PAPER = "#1b1f24", "#667085", "#ffffff"


def as_pictures(samples: Tensor) -> Tensor:
    """Return [n, C, ...] in [-1, 1] as uint8 [n, 1 or 3, ...]; of other numbers of channels, the first."""
    shown = samples if samples.shape[1] in (1, 3) else samples[:, :1]
    return ((shown.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_frames(clip: Tensor) -> Tensor:
    """Convert a clip [C, T, H, W] in [-1, 1] to uint8 [T, 1 or 3, H, W].

    Raises ShapeError for another shape, DataError for values that are not finite.
    """
    if clip.ndim != 4 or clip.numel() == 0:
        raise ShapeError(f"expected a clip [C, T, H, W], got {list(clip.shape)}")
    if broken := int((~clip.isfinite()).sum()):
        raise DataError(f"{broken} of {clip.numel()} values of the clip are not finite, expected [-1, 1]")
    return as_pictures(clip.transpose(0, 1)).cpu()


def image(picture: Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] as a PIL image."""
    from PIL import Image

    return Image.fromarray(picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def sheet(
    pictures: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]],
    heads: Sequence[str],
    cell: tuple[int, int] = (CELL, CELL),
    gap: int = GAP,
) -> Image.Image:
    """Draw a row of pictures for each method, under column heads, with its caption on the left.

    Args:
        pictures: uint8 [n, 1 or 3, H, W] by method; the first `len(heads)` of each are shown.
        captions: lines of text by method; the first is its title.
        cell: width and height of a picture on the sheet. gap: pixels between columns.
    """
    from PIL import Image, ImageDraw

    width, height = cell
    step = max(height + GAP, CAPTION_TOP + LINE * max(len(captions[name]) for name in pictures))
    left, top = (
        MARGIN + LABEL_WIDTH,
        MARGIN + LINE + HEAD_LINE * max((head.count("\n") for head in heads), default=0),
    )
    size = left + len(heads) * (width + gap) + MARGIN, top + len(pictures) * step + MARGIN
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        for line, text in enumerate(head.splitlines()):
            at = left + column * (width + gap), MARGIN + line * HEAD_LINE
            draw.text(at, clipped(text, width), PALE, font(11))
    for row, (name, of_method) in enumerate(pictures.items()):
        y = top + row * step
        for line, caption in enumerate(captions[name]):
            look = (INK, font(14)) if line == 0 else (PALE, font(12))
            text = clipped(caption, LABEL_WIDTH - 2 * GAP, look[1].size)
            draw.text((MARGIN, y + CAPTION_TOP + line * LINE), text, *look)
        for column, picture in enumerate(of_method[: len(heads)]):
            enlarged = width >= picture.shape[-1]
            shown = image(picture).resize(
                cell, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
            )
            page.paste(shown, (left + column * (width + gap), y))
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
