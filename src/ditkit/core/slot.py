"""A tensor beside the samples of a file, and the part of a model's conditioning that it fills."""

from __future__ import annotations

from typing import NamedTuple


class Slot(NamedTuple):
    """A tensor of the file, a row a sample.

    Args:
        field: of `Cond`, that it fills. shape: of a row; a letter stands for any length, the same for all rows.
        below: whole numbers from 0 to below this; 0 for other numbers. optional: may be missing.
    """

    field: str
    shape: tuple[int | str, ...]
    below: int = 0
    optional: bool = False
