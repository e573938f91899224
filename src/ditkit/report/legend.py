"""Legends: the meaning of outlines and colours, as scales with numbers below the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ditkit.report.sheet import INK, LABEL_WIDTH, LINE, MARGIN, PALE, PAPER, font, image
from ditkit.report.theme import LIGHT

if TYPE_CHECKING:
    from PIL import Image

OUTLINE_PX = 3
GIVEN_RGB, NO_DATA_RGB = (tuple(bytes.fromhex(LIGHT[name].removeprefix("#"))) for name in ("c1", "edge"))
VALUES, ERRORS = "viridis", "inferno"  # of even steps in lightness; black is where there is no error
BAR_PX, BOX_PX, HEIGHT_PX = 200, 14, 12
TEXT_GAP_PX, ENTRY_GAP_PX = 8, 24


class Scale(NamedTuple):
    """Colours for values from `low` to `high`, and what they are: "eastward, m/s"."""

    text: str
    low: float
    high: float
    colours: str = VALUES

    def paint(self, values: Tensor) -> Tensor:
        """[T, H, W] -> uint8 [T, 3, H, W]; what lies beyond an end has the colour of that end."""
        return coloured((values - self.low) / ((self.high - self.low) or 1.0), self.colours)


def difference(top: float, unit: str = "") -> Scale:
    """Make the scale of errors, from none to the largest."""
    return Scale(f"|difference|{f', {unit}' if unit else ''}", 0.0, top, ERRORS)


def coloured(shares: Tensor, colours: str = ERRORS) -> Tensor:
    """[T, H, W] in [0, 1] -> uint8 [T, 3, H, W] in the colours of a map."""
    from matplotlib import colormaps

    table = torch.from_numpy(colormaps[colours](range(256), bytes=True)[:, :3].copy())
    return table[(shares.clamp(0, 1) * 255).round().long()].permute(0, 3, 1, 2)


def with_legend(page: Image.Image, given: bool, scales: Sequence[Scale] = ()) -> Image.Image:
    """Add a legend of the outline and of each scale's colours below the page."""
    entries = legend(page.width, MARGIN + LABEL_WIDTH, scales, given=given)
    return page if entries is None else below_each_other([page, entries])


def legend(
    width: int, left: int, scales: Sequence[Scale] = (), *, given: bool = False, no_data: bool = False
) -> Image.Image | None:
    """Entries from `left` on, at least `width` pixels wide, below each other where a line is full; None of nothing.

    Args:
        given: whether there is an outline to explain. no_data: whether there are grey cells to.
    """
    from PIL import Image

    entries = [_box("given", PAPER, GIVEN_RGB)] if given else []
    entries += map(_bar, scales)
    entries += [_box("no data", NO_DATA_RGB, NO_DATA_RGB)] if no_data else []
    if not entries:
        return None
    places, x, y = [], left, 0
    for entry in entries:
        if x > left and x + entry.width > width:
            x, y = left, y + LINE + HEIGHT_PX
        places.append((x, y))
        x += entry.width + ENTRY_GAP_PX
    ends = [place[0] + entry.width for place, entry in zip(places, entries, strict=True)]
    whole = Image.new("RGB", (max(width, *ends), y + LINE + HEIGHT_PX), PAPER)
    for place, entry in zip(places, entries, strict=True):
        whole.paste(entry, place)
    return whole


def below_each_other(pages: Sequence[Image.Image]) -> Image.Image:
    """One page of several, as wide as the widest."""
    from PIL import Image

    whole = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), PAPER)
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height
    return whole


def _box(text: str, fill: str | tuple[int, ...], outline: tuple[int, ...]) -> Image.Image:
    from PIL import ImageDraw

    entry = _entry(BOX_PX, text)
    ImageDraw.Draw(entry).rectangle((0, 0, BOX_PX, HEIGHT_PX), fill, outline, OUTLINE_PX)
    return entry


def _bar(scale: Scale) -> Image.Image:
    from PIL import ImageDraw

    entry = _entry(BAR_PX, scale.text)
    entry.paste(image(coloured(torch.linspace(0, 1, BAR_PX).expand(1, HEIGHT_PX, -1), scale.colours)[0]))
    draw, middle = ImageDraw.Draw(entry), (scale.low + scale.high) / 2
    places = 2 - math.floor(math.log10((scale.high - scale.low) or 1.0))  # of three digits of the span
    for x, anchor, value in ((0, "la", scale.low), (0.5, "ma", middle), (1, "ra", scale.high)):
        draw.text(
            (x * (BAR_PX - 1), HEIGHT_PX + 3),
            f"{round(value, places) + 0.0:.10g}",
            INK,
            font(11),
            anchor=anchor,
        )
    return entry


def _entry(width: int, text: str) -> Image.Image:
    """White, with a text after the `width` pixels of what it explains."""
    from PIL import Image, ImageDraw

    room = TEXT_GAP_PX + round(font(12).getlength(text)) + 1
    entry = Image.new("RGB", (width + room, LINE + HEIGHT_PX), PAPER)
    ImageDraw.Draw(entry).text((width + TEXT_GAP_PX, -1), text, PALE, font(12))
    return entry
