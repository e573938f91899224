"""Pictures of attention plans: the keys of a query over the frames, and the map of visited blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.attention.searched import PATTERNS
from ditkit.bench.plans import IN_FULL, IN_PART, LEFT_OUT, Place, Planned
from ditkit.report.film import enlarged
from ditkit.report.sheet import INK, LINE, MARGIN, PALE, PAPER, clipped, font, image
from ditkit.report.strips import chosen

if TYPE_CHECKING:
    from PIL import Image

VISIBLE, PART, BLANK, QUERY = "#0072b2", "#e69f00", "#e6e8ec", "#d55e00"
"""Colours of Okabe and Ito, which the colour-blind can tell apart, and a grey."""
PANEL_PX, FRAME_PX, MAP_PX, BAR_PX = 256, 92, 360, 9
"""The longer side of a picture, of a frame and of the map beside frames; the height of a bar."""
FRAMES, BETWEEN_PX = 8, 5
HEAD_PX, HEADS_PX = (6, 18), 480
"""The least and the greatest side of a head's cell, and the longer side of all."""
HEAD_COLOURS = {"0": "#0072b2", "1": BLANK, "2": "#e69f00", "3": "#009e73", "4": "#cc79a7"}
NUMBER_PX, CAPTION_PX = 56, 250
"""The least widths of a frame with its number, and of a caption."""
RULED_PX = 6
"""Tokens of so many pixels a side have lines between them."""
MARK_PX = (7, 18)
"""The least and the greatest side of the mark of a query."""
TINT, DARKEST = 0.6, 96
"""Share of a colour over a picture, and the grey of black: much darker, tints would not be those of the legend."""
GAP_PX = 22


def plan_page(
    plans: Sequence[Planned], queries: Mapping[str, Place], under: Tensor | None = None
) -> Image.Image:
    """Draw a section for each pattern: the keys of each query, then the map of blocks.

    Args:
        queries: by a name for their captions.
        under: uint8 [T or 1, 1 or 3, H, W], what keys are laid over, in grey; one picture serves all frames.

    Raises:
        ShapeError: a query is not on the grid.
    """
    sections = []
    for i, planned in enumerate(plans):
        if planned.words and (i == 0 or plans[i - 1].words is not planned.words):
            sections.append(head_view(planned.words))
        sections.append(_section(planned, queries, under))
    return _framed(_stacked([*sections, _legend(plans)], MARGIN))


def _section(planned: Planned, queries: Mapping[str, Place], under: Tensor | None) -> Image.Image:
    views = [_view(planned, name, place, under) for name, place in queries.items()]
    arranged = _stacked(views, MARGIN) if planned.grid.frames > 1 else _beside(views, GAP_PX)
    body = _beside([arranged, _block_map(planned)], GAP_PX)
    state = f"off: {planned.why_not}" if planned.why_not else f"kernel {planned.kernel}"
    subtitle = f"{planned.pairs_share:.1%} of all pairs see each other; {state}"
    return _stacked([_lines([(planned.name, INK, 15), (subtitle, PALE, 12)], body.width), body], 4)


def _view(planned: Planned, name: str, place: Place, under: Tensor | None) -> Image.Image:
    """Draw the keys of one query: frames side by side or one picture, and a bar for tokens outside the image."""
    grid, visible = planned.grid, planned.seen_from(place)
    count, at = int(visible.sum()), place if grid.frames > 1 else place[1:]
    text = f"sees {count:,} of {len(visible):,} keys ({count / len(visible):.1%})"
    shown = _frames_with(place[0], grid.frames)
    tokens = visible[: grid.length].view(grid.shape)
    side = FRAME_PX if grid.frames > 1 else PANEL_PX
    pictures = [_marked(laid(tokens[t], _frame(under, t), side), place, grid.shape, t) for t in shown]
    step = max(pictures[0].width + BETWEEN_PX, NUMBER_PX)
    strip = _beside(pictures, step - pictures[0].width)
    width, title = max(strip.width, CAPTION_PX), f"{name} {at}"
    if grid.frames == 1:
        head = _lines([(title, INK, 13), (text, PALE, 12)], width)
    else:
        numbers = _numbers(shown, place[0], step, len(shown) * step)
        head = _stacked([_lines([(f"{title}: {text}", INK, 12)], width), numbers], 0)
    rows = {
        "text rows": visible[grid.length :][: planned.others],
        "pooled keys": visible[grid.length + planned.others :],
    }
    bars = [_bar(label, row, strip.width) for label, row in rows.items() if len(row)]
    return _stacked([head, strip, *bars], 4)


def _frames_with(frame: int, frames: int) -> list[int]:
    """Evenly chosen frames, the nearest of them exchanged for that of the query."""
    shown = chosen(frames, FRAMES)
    nearest = min(range(len(shown)), key=lambda i: abs(shown[i] - frame))
    return [frame if i == nearest else t for i, t in enumerate(shown)]


def _frame(under: Tensor | None, t: int) -> Tensor | None:
    """Choose the background of frame `t`; one picture serves all frames."""
    return None if under is None else under[min(t, len(under) - 1)]


def laid(visible: Tensor, under: Tensor | None, longest: int) -> Image.Image:
    """Tokens bool [h, w], those that are seen in one colour, over a picture in grey."""
    share, scale = _sized(visible.float(), longest)
    colours = _rgb(BLANK) + share * (_rgb(VISIBLE) - _rgb(BLANK))
    if under is not None:
        colours = TINT * colours + (1 - TINT) * _covering(under, *colours.shape[1:])
    if scale >= RULED_PX:
        for axis in (1, 2):
            lines = torch.arange(scale - 1, colours.shape[axis] - 1, scale)
            colours.index_fill_(axis, lines, 255.0)
    return image(colours.round().to(torch.uint8))


def _covering(picture: Tensor, height: int, width: int) -> Tensor:
    """Crop the middle of a picture [1 or 3, H, W] in light greys, [1, height, width]."""
    _, H, W = picture.shape
    scale = min(H / height, W / width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (H - h) // 2, (W - w) // 2
    part = picture[:, top : top + h, left : left + w].float().mean(0)
    part = DARKEST + part * (255 - DARKEST) / 255
    return F.interpolate(part[None, None], (height, width), mode="area")[0]


def _sized(cells: Tensor, longest: int) -> tuple[Tensor, int]:
    """[..., h, w] with its longer side at most this: a whole number of times larger, or averages, and then 0."""
    h, w = cells.shape[-2:]
    if scale := longest // max(h, w):
        return enlarged(cells, scale), scale
    size = [max(1, round(n * longest / max(h, w))) for n in (h, w)]
    return F.interpolate(cells.view(1, -1, h, w), size, mode="area").view(*cells.shape[:-2], *size), 0


def _marked(picture: Image.Image, place: Place, shape: tuple[int, int, int], t: int) -> Image.Image:
    """Mark the query in its own frame."""
    from PIL import ImageDraw

    if t != place[0]:
        return picture
    _, row, column = place
    high, wide = picture.height / shape[1], picture.width / shape[2]
    least, most = MARK_PX
    x, y, half = (column + 0.5) * wide, (row + 0.5) * high, min(max(least, min(high, wide) - 4), most) / 2
    x, y = (min(max(v, half + 1), n - half - 2) for v, n in ((x, picture.width), (y, picture.height)))
    ImageDraw.Draw(picture).rectangle((x - half, y - half, x + half, y + half), QUERY, PAPER)
    return picture


def _numbers(shown: Sequence[int], own: int, step: int, width: int) -> Image.Image:
    """Numbers of frames above them, the query's in ink."""
    from PIL import ImageDraw

    line = _blank(width, LINE - 2)
    draw = ImageDraw.Draw(line)
    for i, t in enumerate(shown):
        draw.text((i * step, 0), f"frame {t}", INK if t == own else PALE, font(11))
    return line


def _bar(label: str, visible: Tensor, width: int) -> Image.Image:
    """Rows that are no image's, side by side."""
    cells = F.interpolate(visible.float()[None, None], width, mode="nearest-exact")[0]
    colours = _rgb(BLANK) + cells[:, None] * (_rgb(VISIBLE) - _rgb(BLANK))
    text = f"{label}: {int(visible.sum()):,} of {len(visible):,}"
    bar = image(colours.expand(3, BAR_PX, -1).round().to(torch.uint8))
    return _stacked([bar, _lines([(text, PALE, 11)], width)], 2)


def _block_map(planned: Planned) -> Image.Image:
    found = planned.blocks()
    colours = {LEFT_OUT: BLANK, IN_PART: PART, IN_FULL: VISIBLE}
    palette = torch.stack([_rgb(colours[kind]).flatten() for kind in sorted(colours)])
    longest = MAP_PX if planned.grid.frames > 1 else PANEL_PX
    pixels, _ = _sized(palette[found].permute(2, 0, 1), longest)
    picture = image(pixels.round().to(torch.uint8))
    rows, columns = found.shape
    heads = f", head 1 of {planned.plan.heads}" if planned.plan.heads > 1 else ""
    lines = [
        (f"{rows} x {columns} blocks of {planned.plan.block[0]}{heads}", INK, 13),
        (f"{planned.visited:.1%} visited; queries down, keys across", PALE, 12),
    ]
    return _stacked([_lines(lines, longest), picture], 4)


def head_view(words: Sequence[str]) -> Image.Image:
    """Draw which head has which pattern: a row a layer, a cell a head, and the number of heads of each."""
    from PIL import ImageDraw

    cell = max(HEAD_PX[0], min(HEAD_PX[1], HEADS_PX // max(len(words), len(words[0]))))
    cells = torch.stack([torch.stack([_rgb(HEAD_COLOURS[m]).flatten() for m in word]) for word in words])
    pixels = cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    for axis in (0, 1):
        pixels.index_fill_(axis, torch.arange(cell - 1, pixels.shape[axis], cell), 255.0)
    grid = image(pixels.permute(2, 0, 1).round().to(torch.uint8))
    heads, small = "".join(words), font(12)
    entries = [
        (letter, f"{heads.count(letter)} {name}") for letter, name in PATTERNS.items() if letter in heads
    ]
    legend = _blank(max(round(small.getlength(text)) for _, text in entries) + LINE, LINE * len(entries))
    draw = ImageDraw.Draw(legend)
    for i, (letter, text) in enumerate(entries):
        draw.rectangle((0, i * LINE + 3, 11, i * LINE + 14), HEAD_COLOURS[letter])
        draw.text((LINE, i * LINE + 1), text, INK, small)
    title = f"{len(words)} layers down, {len(words[0])} heads across"
    body = _beside([grid, legend], GAP_PX)
    return _stacked([_lines([(title, INK, 13)], max(body.width, CAPTION_PX)), body], 4)


def _legend(plans: Sequence[Planned]) -> Image.Image:
    """Draw the meaning of the colours; "part" is there where some block is visited in part."""
    from PIL import ImageDraw

    entries = [(QUERY, "the query"), (VISIBLE, "key that it sees; block visited in full")]
    entries += [(PART, "block visited in part")] if any(p.plan.partial for p in plans) else []
    entries += [(BLANK, "left out")]
    small = font(12)
    widths = [LINE + round(small.getlength(text)) + GAP_PX for _, text in entries]
    line = _blank(sum(widths), LINE)
    draw, x = ImageDraw.Draw(line), 0
    for (colour, text), width in zip(entries, widths, strict=True):
        draw.rectangle((x, 3, x + 11, 14), colour)
        draw.text((x + LINE, 1), text, INK, small)
        x += width
    return line


def _rgb(colour: str) -> Tensor:
    """#rrggbb as [3, 1, 1]."""
    return torch.tensor(list(bytes.fromhex(colour.removeprefix("#")))).view(3, 1, 1).float()


def _lines(texts: Sequence[tuple[str, str, int]], width: int) -> Image.Image:
    """Lines of text, each (words, colour, size), cut to fit."""
    from PIL import ImageDraw

    block = _blank(width, LINE * len(texts))
    draw = ImageDraw.Draw(block)
    for i, (words, colour, size) in enumerate(texts):
        draw.text((0, i * LINE), clipped(words, width, size), colour, font(size))
    return block


def _beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    whole = _blank(sum(p.width for p in parts) + gap * (len(parts) - 1), max(p.height for p in parts))
    x = 0
    for part in parts:
        whole.paste(part, (x, 0))
        x += part.width + gap
    return whole


def _stacked(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    whole = _blank(max(p.width for p in parts), sum(p.height for p in parts) + gap * (len(parts) - 1))
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height + gap
    return whole


def _framed(page: Image.Image) -> Image.Image:
    whole = _blank(page.width + 2 * MARGIN, page.height + 2 * MARGIN)
    whole.paste(page, (MARGIN, MARGIN))
    return whole


def _blank(width: int, height: int) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (width, height), PAPER)
