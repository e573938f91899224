"""Noto colour emoji, 64 x 64, from the npm package `emoji-datasource-google` (code MIT, art Apache-2.0).

Class = Unicode subgroup (`animal-mammal`), caption = Unicode name in lower case.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.images import ImageSet
from ditkit.data.pinned import find, read_pinned

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"  # the name that `npm pack` gives it
ARCHIVE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
TABLE = "emoji.json"
# The one sheet that equals the single files pixel by pixel; sheets-128 and sheets-256 are palette images.
SHEET = "img/google/sheets-clean/64.png"
FILE_SHA256 = {
    TABLE: "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
    SHEET: "795a0c598d162c9a4aae23f2188c607b8c9bc1912cb7d84382459f8de91a3ae1",
}
CELL_PX = 64
PITCH_PX = CELL_PX + 2  # each cell of the sheet has a transparent border of one pixel
SPLITS = ("all", "train", "test")
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def load(size: int | None = None, skin_tones: bool = False, split: str = "all") -> ImageSet:
    """1,911 emoji (3,786 with skin tones) on white, RGB, 99 classes; `size` is 32 unless given, at most 64.

    Args:
        split: all of them, or those whose name is in "test", a twentieth, or in "train", the rest.

    Raises:
        DataError: the package is not found, or is not the pinned one.
        ConfigError: a size above 64, which would only enlarge the pictures; or an unknown split.
    """
    size = 32 if size is None else size
    if not 1 <= size <= CELL_PX:
        raise ConfigError(f"emoji: size={size} is outside 1..{CELL_PX}, the size of the pictures")
    if split not in SPLITS:
        raise ConfigError(unknown("split of emoji", split, SPLITS))
    read = _open_package()
    emoji = [e for e in json.loads(read(TABLE)) if e["has_img_google"]]
    kept = [e for e in emoji if split == "all" or (split == "test") == _is_test(e["name"])]
    entries = [entry for e in kept for entry in _entries(e, skin_tones)]
    classes = tuple(sorted({e["subcategory"] for e in emoji}))
    index = {name: i for i, name in enumerate(classes)}
    return ImageSet(
        name="emoji",
        images=_cut(read(SHEET), [(e["sheet_x"], e["sheet_y"]) for e in entries], size),
        labels=torch.tensor([index[e["subcategory"]] for e in entries], dtype=torch.int64),
        classes=classes,
        captions=tuple(e["caption"] for e in entries),
        ids=tuple(e["image"].removesuffix(".png") for e in entries),
    )


def _is_test(name: str) -> bool:
    """Return whether a name belongs to the test split, by its checksum."""
    return zlib.crc32(name.lower().encode()) % 20 == 0


def _open_package() -> Callable[[str], bytes]:
    """Open a reader of the package's files by name, from the archive or from an installed package."""
    path = find([ARCHIVE, f"node_modules/{PACKAGE}", PACKAGE])
    if path is None:
        raise DataError(
            f"the emoji set is not on this machine: run `npm pack {PACKAGE}@{VERSION}` (74 MB) in the "
            "current folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
        )
    if path.is_dir():
        return lambda name: read_pinned(path / name, FILE_SHA256[name])
    return _open_archive(read_pinned(path, ARCHIVE_SHA256))


def _open_archive(content: bytes) -> Callable[[str], bytes]:
    archive = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115  (it lies in memory)

    def read(name: str) -> bytes:
        member = archive.extractfile(f"package/{name}")
        if member is None:
            raise DataError(f"{ARCHIVE}: package/{name} is not a file")
        return member.read()

    return read


def _entries(emoji: dict[str, Any], skin_tones: bool) -> Iterator[dict[str, Any]]:
    caption = emoji["name"].lower()
    yield emoji | {"caption": caption}
    if not skin_tones:
        return
    for tones, variation in emoji.get("skin_variations", {}).items():
        if variation["has_img_google"]:
            spoken = " and ".join(SKIN_TONES[tone] for tone in tones.split("-"))
            yield emoji | variation | {"caption": f"{caption}, {spoken} skin tone"}


def _cut(sheet: bytes, cells: list[tuple[int, int]], size: int) -> Tensor:
    """Cells (column, row) of the sheet composited on white and area-averaged: uint8 [N, 3, size, size]."""
    import numpy as np
    from PIL import Image

    rgba = Image.open(io.BytesIO(sheet)).convert("RGBA")
    page = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    pictures = []
    for column, row in cells:
        x, y = column * PITCH_PX + 1, row * PITCH_PX + 1
        picture = page.crop((x, y, x + CELL_PX, y + CELL_PX))
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
