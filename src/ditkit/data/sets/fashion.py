"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747; MIT) as Debian's `dataset-fashion-mnist` ships it."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.images import ImageSet
from ditkit.data.pinned import find, read_pinned

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILE_SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
PREFIX = {"train": "train", "test": "t10k"}
CLASSES = (
    "t-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
PICTURE_PX = 28
PADDED_PX = 32  # divides by patches of 2, 4 and 8


def load(size: int | None = None, split: str = "train") -> ImageSet:
    """60,000 (test: 10,000) grey garments in ten classes; `size` is 28 (as is) or 32 (padded with black).

    Raises:
        DataError: the package is not found, or is not the pinned one.
        ConfigError: another size, or an unknown split.
    """
    size = PICTURE_PX if size is None else size
    if size not in (PICTURE_PX, PADDED_PX):
        raise ConfigError(f"fashion: size={size}, expected {PICTURE_PX} (as is) or {PADDED_PX} (padded)")
    if split not in PREFIX:
        raise ConfigError(unknown("split of fashion", split, PREFIX))
    images = _read_idx(f"{PREFIX[split]}-images-idx3-ubyte.gz")
    labels = _read_idx(f"{PREFIX[split]}-labels-idx1-ubyte.gz").long()
    margin = (size - PICTURE_PX) // 2
    return ImageSet(
        name="fashion",
        images=torch.nn.functional.pad(images[:, None], (margin,) * 4),
        labels=labels,
        classes=CLASSES,
        captions=tuple(CLASSES[i] for i in labels.tolist()),
        ids=tuple(f"{split}-{i:05d}" for i in range(len(labels))),
    )


def _folder() -> Path:
    path = DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else find(["fashion-mnist"])
    if path is None:
        raise DataError(
            "the fashion set is not on this machine: run `apt-get install --no-install-recommends "
            "dataset-fashion-mnist` (Debian), or put its four .gz files in a folder `fashion-mnist` in the "
            "current folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
        )
    return path


def _read_idx(name: str) -> Tensor:
    """Read an IDX array of bytes: two zero bytes, type 8, rank, big-endian 32-bit lengths, then the data."""
    content = gzip.decompress(read_pinned(_folder() / name, FILE_SHA256[name]))
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4).tolist()
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if content[:3] != b"\0\0\x08" or data.size != math.prod(shape):
        raise DataError(f"{name}: header {content[: 4 + 4 * rank].hex()} does not fit {data.size} data bytes")
    return torch.from_numpy(data.reshape(shape).copy())
