"""A forecast of a clip or a field as a strip of frames and as a film: observed, what followed, said, and the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.evaluate.example import FOLLOWED, OBSERVED, SAID, Example
from ditkit.evaluate.film import BETWEEN_PX, INDENT_PX, WIDEST_PX, headed, scale_of, tiled
from ditkit.evaluate.legend import NO_DATA_RGB, Scale, below_each_other, difference, legend
from ditkit.evaluate.sheet import LABEL_WIDTH, MARGIN, as_frames, sheet
from ditkit.evaluate.strips import at_size, chosen, columns, fitting, outlined

if TYPE_CHECKING:
    from PIL import Image

DIFFERENCE = "|difference|"
WHITE = 255
TILE_PX = (WIDEST_PX - BETWEEN_PX) // 2
"""Larger fields are made smaller in films, which would else be of gigabytes."""


@dataclass(frozen=True, eq=False)
class Painted:
    """An example as colours, uint8 [T or T', 3, H, W], and what they mean."""

    observed: Tensor
    followed: Tensor
    said: Tensor
    errors: Tensor
    heads: tuple[list[str], list[str]]  # of the observed frames, and of those that follow
    scales: tuple[Scale, ...]
    no_data: bool

    @classmethod
    def of(cls, example: Example) -> Painted:
        """Clips as they are; fields in colours over the span of what was and what followed, without their padding."""
        example = example.cropped()
        border, heads = example.observed.shape[1], example.heads()
        wrong = difference(example.errors.max().item(), example.unit)
        values = Scale(example.label, *example.span) if example.variable else None

        def drawn(frames: Tensor) -> Tensor:
            if values is None:
                return as_frames(frames * 2 - 1).expand(-1, 3, -1, -1)
            return _greyed(values.paint(frames[0]), example.valid)

        return cls(
            observed=drawn(example.observed),
            followed=drawn(example.followed),
            said=drawn(example.said),
            errors=_greyed(wrong.paint(example.errors), example.valid),
            heads=(heads[:border], heads[border:]),
            scales=(wrong,) if values is None else (values, wrong),
            no_data=example.valid is not None,
        )


def forecast_strip(example: Example) -> Image.Image:
    """Rows of frames under their lead times and dates; of many frames, evenly chosen ones."""
    painted = Painted.of(example)
    later = {FOLLOWED: painted.followed, SAID: painted.said, DIFFERENCE: painted.errors}
    pages = [_rows({OBSERVED: painted.observed}, painted.heads[0]), _rows(later, painted.heads[1])]
    width = max(page.width for page in pages)
    entries = legend(width, MARGIN + LABEL_WIDTH, painted.scales, no_data=painted.no_data)
    assert entries is not None
    return below_each_other([*pages, entries])


def forecast_film(example: Example) -> Tensor:
    """Truth and forecast beside each other, both after the observed frames, and the error if it fits.

    Returns:
        uint8 [T + T', 3, H', W'].
    """
    painted = Painted.of(example)
    height, width = painted.said.shape[-2:]
    across = 3 if 3 * width + 2 * BETWEEN_PX <= WIDEST_PX else 2
    share = min(scale_of(height, width, across), TILE_PX / max(height, width))
    cell = max(1, round(share * width)), max(1, round(share * height))
    observed, followed, said, errors = (
        at_size(x, cell) for x in (painted.observed, painted.followed, painted.said, painted.errors)
    )
    everywhere = torch.ones_like(observed[:, 0], dtype=torch.bool)
    tiles = {
        "truth": torch.cat([observed, followed]),
        SAID: torch.cat([outlined(observed, everywhere), said]),
        DIFFERENCE: torch.cat([torch.full_like(observed, WHITE), errors]),
    }
    film = tiled(list(tiles.values())[:across], list(tiles)[:across], columns=across)
    shown = painted.scales if across == 3 else painted.scales[:-1]
    entries = legend(film.shape[-1], INDENT_PX, shown, given=True, no_data=painted.no_data)
    assert entries is not None
    below = torch.from_numpy(np.array(entries)).permute(2, 0, 1).expand(len(film), -1, -1, -1)
    film = F.pad(film, (0, below.shape[-1] - film.shape[-1], 0, BETWEEN_PX), value=WHITE)
    heads = [" ".join(head.splitlines()) for part in painted.heads for head in part]
    return headed(torch.cat([film, below], 2), heads)


def _rows(rows: Mapping[str, Tensor], heads: Sequence[str]) -> Image.Image:
    """Frames uint8 [T, 3, H, W] by the name of their row, under the heads of those that fit."""
    height, width = next(iter(rows.values())).shape[-2:]
    cell = fitting(height, width)
    shown = chosen(len(heads), columns(cell[0]))
    pictures = {name: at_size(frames[shown], cell) for name, frames in rows.items()}
    return sheet(pictures, {name: [name] for name in rows}, [heads[i] for i in shown], cell)


def _greyed(pictures: Tensor, valid: Tensor | None) -> Tensor:
    """uint8 [T, 3, H, W] with the cells that hold no data in grey."""
    if valid is None:
        return pictures
    return torch.where(valid, pictures, torch.tensor(NO_DATA_RGB, dtype=torch.uint8).view(3, 1, 1))
