"""One image file to one square uint8 picture, whatever its mode, size and orientation."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = frozenset(
    {
        ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2",
        ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd",
        ".qoi", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm"
    }
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM", "MPO", "ICO", "QOI")
"""The kinds of pictures that are known by their first bytes, whatever their files are called."""
# What the decoders of Pillow let through on damaged files
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    MemoryError,
    OverflowError,
)


OTHERS = frozenset(
    {
        ".cfg", ".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md",
        ".npy", ".npz", ".parquet", ".pdf", ".pkl", ".pt", ".py", ".safetensors", ".sh", ".tar", ".toml",
        ".txt", ".xml", ".yaml", ".yml", ".zip"
    }
)  # fmt: skip
"""Endings of files that nobody takes for pictures, and that are not opened to find out."""


class DamagedImage(Exception):
    """A file that cannot be decoded; the message is the reason, without the file's name."""


def is_image(path: Path) -> bool:
    """Return whether a file is a picture: by its ending, or by its first bytes where the ending says nothing."""
    from PIL import Image

    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix.lower() in OTHERS or not os.path.isfile(path):
        return False
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]):
            return True
    except (*DAMAGE, Image.DecompressionBombError):
        return False


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    """Read the first frame upright, transparency on white, centre-cropped: RGB [size, size, 3].

    Raises `DamagedImage` for a file that is corrupt, truncated, too large to be honest, or of no known kind.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not os.path.isfile(path):
        raise DamagedImage("not a regular file" if os.path.exists(path) else "it does not exist")
    try:
        with Image.open(path) as image:
            _check_extent(image.size, size)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.asarray(centre_crop(_rgb(upright), size))
    except UnidentifiedImageError as error:
        raise DamagedImage("not an image of any known format") from error
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise DamagedImage(str(error) or type(error).__name__) from error


def _check_extent(extent: tuple[int, int], size: int) -> None:
    """Refuse a strip that would be scaled to more pixels than an honest picture has: its short side becomes `size`."""
    from PIL import Image

    short, long = sorted(extent)
    most = 2 * (Image.MAX_IMAGE_PIXELS or 2**28)
    if not short or size * size * long > most * short:
        raise DamagedImage(f"{extent[0]} x {extent[1]} pixels, too long a strip for {size} x {size}")


def centre_crop(image: Picture, size: int) -> Picture:
    """Crop as ADM does (Dhariwal & Nichol 2021): BOX halvings, BICUBIC to the short side, centre square."""
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _rgb(image: Picture) -> Picture:
    from PIL import Image

    if image.mode.startswith("I"):
        # convert() would clip 16-bit values at 255 instead of scaling them
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(
                f"mode {image.mode} with values {values.min()}..{values.max()}, expected 16 bits"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
