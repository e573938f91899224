"""One image file to one square uint8 picture, whatever its mode, size and orientation."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
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
)


class DamagedImage(Exception):
    """A file that cannot be decoded; the message is the reason, without the file's name."""


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    """Read the first frame upright, transparency on white, centre-cropped: RGB [size, size, 3].

    Raises `DamagedImage` for a file that is corrupt, truncated, too large to be honest, or of no known kind.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.asarray(centre_crop(_rgb(upright), size))
    except UnidentifiedImageError as error:
        raise DamagedImage("not an image of any known format") from error
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise DamagedImage(str(error) or type(error).__name__) from error


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
