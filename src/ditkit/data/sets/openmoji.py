"""OpenMoji, drawn from the SVG files of the npm package `openmoji` (CC BY-SA 4.0).

Class = Unicode subgroup (`animal-mammal`), caption = annotation ("pig", "light blue heart"). OpenMoji is the work of
the OpenMoji project, openmoji.org; what is made of its pictures carries its licence.
"""

from __future__ import annotations

import csv
import io
import logging
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditkit.core.checkpoint import read_state, write_state
from ditkit.core.errors import CheckpointError, ConfigError, DataError, unknown
from ditkit.data.images import ImageSet
from ditkit.data.pinned import find, read_pinned, roots
from ditkit.data.progress import tracked

LOG = logging.getLogger(__name__)

PACKAGE, VERSION = "openmoji", "17.0.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"  # the name that `npm pack` gives it
ARCHIVE_SHA256 = "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"
TABLE, PICTURE = "package/data/openmoji.csv", "package/color/svg/{}.svg"
LARGEST = 1024
SPLITS = ("all", "train", "test")
IMAGES, THERE = "images", "there"


def load(size: int | None = None, skin_tones: bool = False, split: str = "all") -> ImageSet:
    """2,465 pictures (4,495 with skin tones) on white, RGB, 119 classes; `size` is 32 unless given.

    They are drawn once a size, which takes half a minute, and kept in the cache of named sets. A few that cairosvg
    cannot draw are left out.

    Args:
        split: all of them, or those whose annotation is in "test", a twentieth, or in "train", the rest.

    Raises:
        DataError: the package, or cairosvg, which draws, is not found; or the package is not the pinned one.
        ConfigError: a size out of range, or an unknown split.
    """
    size = 32 if size is None else size
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"openmoji: size={size} is outside 1..{LARGEST}")
    if split not in SPLITS:
        raise ConfigError(unknown("split of openmoji", split, SPLITS))
    path = find([ARCHIVE])
    if path is None:
        raise DataError(
            f"the openmoji set is not on this machine: run `npm pack {PACKAGE}@{VERSION}` (4 MB) in the current "
            "folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
        )
    content = read_pinned(path, ARCHIVE_SHA256)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        every = list(csv.DictReader(io.StringIO(_read(archive, TABLE).decode(), newline="")))
        rows = [row for row in every if skin_tones or not row["skintone"]]
        codes = [row["hexcode"] for row in rows]
        pictures, there = _drawn(archive, codes, size, "tones" if skin_tones else "plain")
        rows = [row for row, drawn in zip(rows, there.tolist(), strict=True) if drawn]
    classes = tuple(sorted({row["subgroups"] for row in every}))
    index = {name: i for i, name in enumerate(classes)}
    whole = ImageSet(
        name=PACKAGE,
        images=pictures,
        labels=torch.tensor([index[row["subgroups"]] for row in rows], dtype=torch.int64),
        classes=classes,
        captions=tuple(row["annotation"].lower() for row in rows),
        ids=tuple(row["hexcode"].lower() for row in rows),
    )
    if split == "all":
        return whole
    tested = [zlib.crc32(caption.encode()) % 20 == 0 for caption in whole.captions]
    return whole.subset([i for i, is_test in enumerate(tested) if is_test == (split == "test")])


def _drawn(archive: tarfile.TarFile, codes: Sequence[str], size: int, which: str) -> tuple[Tensor, Tensor]:
    """Return the pictures that can be drawn, uint8 [n, 3, size, size], drawn now or before, and which they are, [N]."""
    kept = roots()[-1] / f"{PACKAGE}-{VERSION}-{which}-{size}.safetensors"
    known = _kept(kept, len(codes))
    if known is not None:
        return known
    try:
        from cairosvg import svg2png
    except (ImportError, OSError) as error:  # OSError: without the C library
        raise DataError(
            f"openmoji is drawn by cairosvg, which is missing ({error}); expected: pip install 'ditkit[text]'"
        ) from error
    pictures, there = [], torch.zeros(len(codes), dtype=torch.bool)
    side = {"output_width": size, "output_height": size, "background_color": "white"}
    for place, code in enumerate(tracked(codes, f"drawing {PACKAGE}")):
        source = _read(archive, PICTURE.format(code))
        try:
            pictures.append(_pixels(svg2png(bytestring=source, **side)))
        except Exception as error:  # cairosvg raises whatever a form of SVG that it does not know leads to
            LOG.debug("%s: %s cannot be drawn: %s", PACKAGE, code, error)
        else:
            there[place] = True
    if left := len(codes) - len(pictures):
        LOG.warning(
            "%s: %d of %d pictures cannot be drawn by cairosvg and are left out", PACKAGE, left, len(codes)
        )
    state = {IMAGES: torch.stack(pictures), THERE: there}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_state(kept, state)
    except (ConfigError, OSError) as error:
        LOG.info("the pictures of %s are not kept: %s", PACKAGE, error)
    return state[IMAGES], state[THERE]


def _kept(path: Path, count: int) -> tuple[Tensor, Tensor] | None:
    try:
        state = read_state(path) if path.is_file() else None
        if state is None or len(state[THERE]) != count or len(state[IMAGES]) != int(state[THERE].sum()):
            return None
    except (CheckpointError, KeyError) as error:
        LOG.warning("%s; the pictures are drawn again", error)
        return None
    return state[IMAGES], state[THERE]


def _pixels(png: bytes) -> Tensor:
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).copy()).permute(2, 0, 1)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{ARCHIVE}: {name} is not a file")
    return member.read()
