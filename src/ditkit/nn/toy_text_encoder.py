"""Captions as letters: what stands for a text encoder where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHABET = "abcdefghijklmnopqrstuvwxyz -'"
LETTERS = len(ALPHABET) + 1
"""The last stands for every other character."""


def encode_letters(texts: Sequence[str], length: int) -> Tensor:
    """[n, length, LETTERS] one-hot letters, in lower case, cut at `length`; what is left over is zero."""
    table = torch.zeros(len(texts), length, LETTERS)
    for row, text in zip(table, texts, strict=True):
        for place, letter in enumerate(text.lower()[:length]):
            row[place, ALPHABET.find(letter)] = 1  # -1, the last, where it is not found
    return table


def pooled(letters: Tensor) -> Tensor:
    """Count each letter in a caption, [B, S, LETTERS] to [B, LETTERS]."""
    return letters.sum(1)
