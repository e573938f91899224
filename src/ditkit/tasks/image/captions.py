"""Captions of pictures as tokens of a frozen text encoder: encoded once, and kept beside the data."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.core.checkpoint import read_state, write_state
from ditkit.core.errors import CheckpointError, ConfigError, DataError
from ditkit.data.images import ImageSet
from ditkit.data.pinned import roots
from ditkit.nn.text_encoder import EncodedText, text_encoder

LOG = logging.getLogger(__name__)
HIDDEN = ".ditkit"
"""Folder inside a user's own folder of pictures, which no loader reads."""
TOKENS, LENGTHS, CUT = "tokens", "lengths", "cut"


class Captions(NamedTuple):
    """Tokens of captions without their padding.

    Args:
        tokens: [R, D], those of all captions after one another. lengths: [n], how many each has; 0 where a picture
            has no caption.
        length: rows of a caption that is padded. cut: captions that were longer.
    """

    tokens: Tensor
    lengths: Tensor
    length: int
    cut: int

    def rows(self, index: Tensor) -> EncodedText:
        """Return the chosen captions padded; one without a word is one row of zeros."""
        ends = self.lengths.cumsum(0)
        out = self.tokens.new_zeros(len(index), self.length, self.tokens.shape[1])
        for row, i in zip(out, index.tolist(), strict=True):
            count = int(self.lengths[i])
            row[:count] = self.tokens[int(ends[i]) - count : int(ends[i])]
        mask = torch.arange(self.length) < self.lengths[index].clamp_min(1)[:, None]
        return EncodedText(out, mask)

    def missing(self, index: Tensor) -> Tensor:
        """Return which of the chosen pictures have no caption, [B] bool."""
        return self.lengths[index] == 0


def encoded_captions(images: ImageSet, data: str, encoder: str, length: int) -> Captions:
    """Encode the captions of a set, or read what was encoded before.

    Args:
        data: name or folder of the set, which decides where they are kept: a hidden folder inside the folder, or
            the folder of named sets. Where neither can be written, nothing is kept.
        encoder: name of a text encoder. length: the most tokens of a caption; longer ones are cut, and counted.

    Raises:
        DataError, ConfigError: those of the encoder.
    """
    path = _place(data) / f"captions-{_digest(images.captions, encoder, length)}.safetensors"
    try:
        state = read_state(path) if path.is_file() else None
    except CheckpointError as error:
        LOG.warning("%s; captions are encoded again", error)
        state = None
    if state is None:
        state = _encoded(images.captions, encoder, length)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_state(path, state)
        except (ConfigError, OSError) as error:
            LOG.info("captions of %s are not kept: %s", images.name, error)
    captions = Captions(state[TOKENS], state[LENGTHS], length, int(state[CUT]))
    if captions.cut:
        LOG.warning(
            "%s: %d of %d captions are longer than %d tokens and were cut",
            images.name,
            captions.cut,
            len(images),
            length,
        )
    return captions


def check_captions(images: ImageSet, allowed: bool) -> None:
    """Refuse pictures without a caption, unless that is wanted.

    Raises:
        DataError: names how many there are, and the first.
    """
    blank = [i for i, caption in enumerate(images.captions) if not caption.strip()]
    if len(blank) == len(images):
        raise DataError(
            f"{images.name}: none of {len(images)} pictures has a caption, expected one each: a metadata.jsonl or "
            "metadata.csv with file_name and text, or NAME.txt beside NAME.png"
        )
    if blank and not allowed:
        raise DataError(
            f"{images.name}: {len(blank)} of {len(images)} pictures have no caption, first {images.ids[blank[0]]!r}, "
            "expected one each; --option blank=drop leaves them out, blank=keep trains them as pictures without a "
            "prompt"
        )


def _encoded(captions: Sequence[str], encoder: str, length: int) -> dict[str, Tensor]:
    found = text_encoder(encoder).encode(captions, length)
    blank = torch.tensor([not caption.strip() for caption in captions])
    mask = found.mask & ~blank[:, None]
    return {TOKENS: found.tokens[mask], LENGTHS: mask.sum(1), CUT: torch.tensor(found.cut)}


def _place(data: str) -> Path:
    return Path(data) / HIDDEN if os.path.isdir(data) else roots()[-1]


def _digest(captions: Sequence[str], encoder: str, length: int) -> str:
    """Return the first 16 digits of what the tokens follow from."""
    total = hashlib.sha256(f"{text_encoder(encoder).version} {length}\n".encode())
    for caption in captions:
        total.update(caption.encode(errors="surrogatepass") + b"\0")
    return total.hexdigest()[:16]
