"""Frames of clips side by side, a row a clip, with what was given outlined and errors as colours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, ShapeError, unknown
from ditkit.report.film import enlarged
from ditkit.report.legend import GIVEN_RGB, OUTLINE_PX, difference, with_legend
from ditkit.report.sheet import GAP, LABEL_WIDTH, MARGIN, as_frames, sheet

if TYPE_CHECKING:
    from PIL import Image

LEAST_PX, MOST_PX = 80, 160
"""Frames are enlarged a whole number of times until their longer side has the first, or made smaller to the second."""
WIDEST_PX = 1600
FEWEST_COLUMNS = 2
BETWEEN_PX = 2  # of the frames of one clip


def strip(
    clips: Mapping[str, Tensor],
    *,
    masks: Mapping[str, Tensor] | None = None,
    errors_to: str | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """Draw a row of frames for each clip [C, T, H, W] in [-1, 1], under frame numbers; of many, those `chosen`.

    Args:
        masks: [1, T, H, W] by the name of a clip, as in `Cond`: what is 0 was given, and is outlined.
        errors_to: the clip from which all others are subtracted: |difference|, averaged over channels, in a row
            below each, all of one scale of colours that ends at the largest one shown.
        notes: lines of text under a clip's name.

    Raises:
        ShapeError: no clip, clips of several shapes, or masks of another.
        ConfigError: a mask, note or reference of an unknown clip.
        DataError: values that are not finite.
    """
    masks, notes = dict(masks or {}), dict(notes or {})
    _check(clips, masks, notes, errors_to)
    _, frames, height, width = next(iter(clips.values())).shape
    cell = fitting(height, width)
    shown = chosen(frames, columns(cell[0]), _given(masks.values()))
    errors = {} if errors_to is None else _errors({n: c[:, shown] for n, c in clips.items()}, errors_to)
    scale = difference(max((float(error.max()) for error in errors.values()), default=0.0))
    rows: dict[str, Tensor] = {}
    captions: dict[str, Sequence[str]] = {}
    for name, clip in clips.items():
        rows[name] = at_size(as_frames(clip[:, shown]).expand(-1, 3, -1, -1), cell)
        if name in masks:
            rows[name] = outlined(rows[name], masks[name][0, shown] == 0)
        captions[name] = [name, *notes.get(name, ())]
        if name in errors:
            below = f"{name}: error"
            rows[below] = scale.paint(errors[name])
            captions[below] = ["", f"|difference| to {errors_to}"]
    page = sheet(rows, captions, [f"frame {i}" for i in shown], cell)
    return with_legend(page, bool(masks), [scale] if errors else [])


def side_by_side(clips: Tensor, shown: Sequence[int], generated: Tensor | None = None) -> Tensor:
    """Join the frames `shown` of each clip into one picture, at a visible size: uint8 [n, 3, H', W'].

    Args:
        clips: uint8 [n, T, 1 or 3, H, W].
        made: bool [n, 1, T, H, W], false where content was given, which is outlined.
    """
    frames = clips[:, shown].expand(-1, -1, 3, -1, -1).flatten(0, 1)
    frames = at_size(frames, fitting(frames.shape[-2], frames.shape[-1]))
    if generated is not None:
        frames = outlined(frames, ~generated[:, 0, shown].flatten(0, 1))
    spaced = F.pad(frames, (0, BETWEEN_PX), value=255).unflatten(0, (len(clips), len(shown)))
    return spaced.permute(0, 2, 3, 1, 4).flatten(3)[..., :-BETWEEN_PX]


def fitting(height: int, width: int) -> tuple[int, int]:
    """Width and height of a frame on the page: a whole multiple of its own, or smaller."""
    longer = max(height, width)
    if longer > MOST_PX:
        return max(1, round(width * MOST_PX / longer)), max(1, round(height * MOST_PX / longer))
    scale = -(-LEAST_PX // longer)
    return scale * width, scale * height


def columns(width: int) -> int:
    """Count the frames of this width that a page takes."""
    return (WIDEST_PX - 2 * MARGIN - LABEL_WIDTH) // (width + GAP)


def chosen(frames: int, columns: int, given: Collection[int] = ()) -> list[int]:
    """Choose the frames to show: all that fit in `columns`, else evenly from the first to the last.

    A stretch of `given` frames that would stay unseen takes the place of the frame next to it, as long as half of the
    columns show others.
    """
    columns = max(columns, FEWEST_COLUMNS)
    if frames <= columns:
        return list(range(frames))
    shown = [round(i * (frames - 1) / (columns - 1)) for i in range(columns)]
    for stretch in _stretches(given):
        free = [place for place in range(1, columns - 1) if shown[place] not in given]
        if len(free) > columns // 2 and not set(stretch) & set(shown):
            shown[min(free, key=lambda place: abs(shown[place] - stretch[0]))] = stretch[0]
            shown.sort()
    return shown


def _stretches(numbers: Collection[int]) -> Iterator[list[int]]:
    """Numbers that follow each other, in order."""
    for _, stretch in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        yield [number for _, number in stretch]


def _given(masks: Iterable[Tensor]) -> set[int]:
    """Collect the frames that some mask [1, T, H, W] leaves whole."""
    return {t for mask in masks for t in (~mask[0].bool().flatten(1).any(1)).nonzero().flatten().tolist()}


def outlined(pictures: Tensor, given: Tensor) -> Tensor:
    """uint8 [T, 3, H', W'] with an inner border about the regions bool [T, H, W] that were given."""
    area = F.interpolate(given[:, None].float(), pictures.shape[2:], mode="nearest-exact")
    reach = 2 * OUTLINE_PX + 1
    beyond = F.max_pool2d(1 - F.pad(area, [OUTLINE_PX] * 4), reach, stride=1)
    colour = torch.tensor(GIVEN_RGB, dtype=torch.uint8).view(3, 1, 1)
    return torch.where((area * beyond).bool(), colour, pictures)


def at_size(pictures: Tensor, cell: tuple[int, int]) -> Tensor:
    """uint8 [T, 3, H, W] at the size of a cell: a whole number of times larger, or smaller."""
    width, height = cell
    if width < pictures.shape[-1]:
        return F.interpolate(pictures.float(), (height, width), mode="area").round().to(torch.uint8)
    return enlarged(pictures, width // pictures.shape[-1])


def _errors(clips: Mapping[str, Tensor], reference: str) -> dict[str, Tensor]:
    """|difference| to the reference, averaged over channels: [T, H, W] of every other clip."""
    ref = clips[reference].float().cpu()
    return {
        name: (clip.float().cpu() - ref).abs().mean(0) for name, clip in clips.items() if name != reference
    }


def _check(
    clips: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    notes: Mapping[str, Sequence[str]],
    errors_to: str | None,
) -> None:
    shapes = {tuple(clip.shape) for clip in clips.values()}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 4:
        raise ShapeError(f"a strip needs clips [C, T, H, W] of one shape, got {sorted(map(list, shapes))}")
    for name in [*masks, *notes, *([] if errors_to is None else [errors_to])]:
        if name not in clips:
            raise ConfigError(unknown("clip", name, clips))
    for name, mask in masks.items():
        if mask.shape != (1, *shape[1:]):
            raise ShapeError(f"strip: mask of {name!r} {list(mask.shape)}, expected {[1, *shape[1:]]}")
    for name, clip in clips.items():
        if not clip.isfinite().all():
            raise DataError(f"strip: {name!r} holds NaN or infinite values, expected finite ones")
