"""Clips as files that play everywhere: MP4, and GIF that loops. Complete, or not there at all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.report.sheet import INK, LINE, PAPER, as_frames, clipped, font, image

SEEN_PX = 256
"""Small clips are enlarged a whole number of times, to at most this side."""
WIDEST_PX = 1920
BETWEEN_PX, INDENT_PX = 8, 2
GIF_FASTEST = 50  # frames a second: the format counts hundredths, and browsers slow down below two of them
CODECS = ("libx264", "mpeg4")  # the first that this PyAV has; builds without GPL parts lack H.264
NEARLY_LOSSLESS = {"libx264": {"crf": "12"}, "mpeg4": {"qscale": "2"}}
BT709 = 1  # the number that H.264 gives to these primaries, to this curve, and to this matrix


def side_by_side(clips: Sequence[Tensor] | Tensor, names: Sequence[str] = (), *, columns: int = 4) -> Tensor:
    """Clips [C, T, H, W] in [-1, 1] as one film uint8 [T, 3, H', W'], each under its name.

    At most `columns` in a row, on white; small ones are enlarged by nearest neighbour so that they can be seen.

    Raises:
        ShapeError: no clip, or clips of several shapes.
        ConfigError: another number of names, or columns below 1.
        DataError: values that are not finite.
    """
    shapes = {tuple(clip.shape) for clip in clips}
    if len(shapes) != 1:
        raise ShapeError(f"a film needs clips of one shape, got {len(clips)} of {sorted(map(list, shapes))}")
    if names and len(names) != len(clips):
        raise ConfigError(f"a film of {len(clips)} clips needs as many names, got {len(names)}")
    return tiled([as_frames(clip).expand(-1, 3, -1, -1) for clip in clips], names, columns=columns)


def tiled(tiles: Sequence[Tensor], names: Sequence[str] = (), *, columns: int = 4) -> Tensor:
    """Lay films that are frames already beside each other: uint8 [T, 3, H, W] of one shape.

    Raises:
        ConfigError: columns below 1.
    """
    columns = min(integer("columns", columns, least=1), len(tiles))
    frames, _, height, width = tiles[0].shape
    scale = scale_of(height, width, columns)
    height, width = scale * height, scale * width
    head = LINE + 2 if names else 0
    places = [
        (i // columns * (height + head + BETWEEN_PX) + head, i % columns * (width + BETWEEN_PX))
        for i in range(len(tiles))
    ]
    page = _page(places[-1][0] + height, columns * (width + BETWEEN_PX) - BETWEEN_PX, width, places, names)
    film = page.repeat(frames, 1, 1, 1)
    for tile, (y, x) in zip(tiles, places, strict=True):
        film[:, :, y : y + height, x : x + width] = enlarged(tile, scale)
    return film


def scale_of(height: int, width: int, columns: int) -> int:
    """Choose the factor by which clips are enlarged, so that they can be seen and all `columns` fit."""
    return max(1, min(SEEN_PX // max(height, width), WIDEST_PX // (columns * width)))


def headed(film: Tensor, heads: Sequence[str]) -> Tensor:
    """Add a line of text over each frame of a film."""
    width = film.shape[-1]
    lines = [_page(LINE + 2, width, width, [(LINE + 2, 0)], [head]) for head in heads]
    return torch.cat([torch.stack(lines), film], 2)


def enlarged(pictures: Tensor, scale: int) -> Tensor:
    """Every pixel of [..., H, W] as a square of `scale` x `scale`."""
    return pictures.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def write_mp4(path: Path, film: Tensor, fps: float) -> Path:
    """Write a film uint8 [T, 1 or 3, H, W] as H.264, 4:2:0, which browsers play (MPEG-4 where PyAV lacks it).

    An odd height or width, which 4:2:0 cannot have, is made even by repeating the last line.

    Raises:
        ConfigError: PyAV is missing, `fps` is not positive, or the file cannot be written; an earlier one stays.
        ShapeError: no such film.
    """
    av = _pyav()
    rate = _rate(fps)
    film = _checked(film).expand(-1, 3, -1, -1)
    film = torch.cat([film, film[:, :, -1:]], 2) if film.shape[2] % 2 else film
    film = torch.cat([film, film[..., -1:]], 3) if film.shape[3] % 2 else film
    codec = next(name for name in CODECS if name in av.codecs_available)
    with (
        replacing(path) as draft,
        # faststart: the index comes first, so that a browser plays while it loads
        av.open(str(draft), "w", format="mp4", options={"movflags": "+faststart"}) as file,
    ):
        stream = file.add_stream(codec, rate=rate, options=NEARLY_LOSSLESS[codec])
        stream.height, stream.width, stream.pix_fmt = film.shape[2], film.shape[3], "yuv420p"
        coded = stream.codec_context
        coded.color_primaries = coded.color_trc = coded.colorspace = BT709
        for frame in film:
            shown = av.VideoFrame.from_ndarray(_array(frame), format="rgb24")
            file.mux(stream.encode(shown.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode(None))
    return path


def write_gif(path: Path, film: Tensor, fps: float) -> Path:
    """Write a film uint8 [T, 1 or 3, H, W] as a looping GIF; exact up to 256 colours in all its frames.

    All frames share one palette: one for each would flicker where the film does not.

    Raises:
        ConfigError: `fps` is not in (0, 50], or the file cannot be written; an earlier one stays.
        ShapeError: no such film.
    """
    from PIL import Image

    if _rate(fps) > GIF_FASTEST:
        raise ConfigError(f"fps={fps}: a GIF shows at most {GIF_FASTEST} frames a second; write an MP4")
    film = _checked(film).expand(-1, 3, -1, -1)
    frames, _, height, width = film.shape
    tall = image(film.transpose(0, 1).flatten(1, 2)).quantize(256, dither=Image.Dither.NONE)
    first, *rest = [tall.crop((0, height * t, width, height * (t + 1))) for t in range(frames)]
    # hundredths of a second, rounded so that the whole film is as long as it should be
    ends = [round(i * 100 / _rate(fps)) for i in range(frames + 1)]
    durations_ms = [10 * (end - start) for start, end in pairwise(ends)]
    with replacing(path) as draft:
        first.save(draft, "GIF", save_all=True, append_images=rest, duration=durations_ms, loop=0)
    return path


def write_film(folder: Path, name: str, film: Tensor, fps: float) -> list[str]:
    """NAME.mp4 where PyAV is installed, and NAME.gif, slowed down to 50 frames a second; the file names.

    Raises:
        ConfigError: a file cannot be written, or there is no such `fps`.
        ShapeError: no such film.
    """
    gif = write_gif(folder / f"{name}.gif", film, min(fps, GIF_FASTEST)).name
    return [write_mp4(folder / f"{name}.mp4", film, fps).name, gif] if find_spec("av") else [gif]


def _page(
    height: int, width: int, tile: int, places: Sequence[tuple[int, int]], names: Sequence[str]
) -> Tensor:
    """White uint8 [3, height, width] with each name above its place (y, x)."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for name, (y, x) in zip(names, places, strict=False):
        draw.text((x + INDENT_PX, y - LINE - 2), clipped(name, tile - INDENT_PX, 14), INK, font(14))
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def _array(frame: Tensor) -> np.ndarray:
    return frame.permute(1, 2, 0).contiguous().numpy()


def _rate(fps: float) -> Fraction:
    """`fps` as the ratio of small numbers that a container can hold."""
    if not 0 < fps <= 1000:
        raise ConfigError(f"fps={fps} should be above 0 and at most 1000 frames a second")
    return Fraction(fps).limit_denominator(1001)


def _checked(film: Tensor) -> Tensor:
    if film.ndim != 4 or film.shape[1] not in (1, 3) or film.numel() == 0 or film.dtype != torch.uint8:
        raise ShapeError(
            f"a film is uint8 [T, 1 or 3, H, W], got {str(film.dtype).removeprefix('torch.')} {list(film.shape)}"
        )
    return film


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError("writing MP4 needs PyAV; expected: pip install 'ditkit[video]'") from error
    return av
