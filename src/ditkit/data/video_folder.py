"""A user's own folder of video files, at any depth."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import torch

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError
from ditkit.data.clips import MemoryClips, Windows, frame_size
from ditkit.data.folder import walk, warn_of_links
from ditkit.data.progress import tracked
from ditkit.data.video_decode import SUFFIXES, DamagedVideo, Film, read_film

logger = logging.getLogger(__name__)


class ShortVideo(DamagedVideo):
    """A file that is sound and holds no clip."""


def load(
    root: Path,
    size: int | Sequence[int] | None = None,
    frames: int = 16,
    stride: int = 1,
    step: int = 1,
    fps: float | None = None,
    max_bad: int = 10,
    max_bytes: int = 4 * 2**30,
) -> MemoryClips:
    """Decode every video below `root` into memory at `size`, a number (square) or (height, width), as RGB.

    Frames are turned, and their pixels widened, as a player does; what goes beyond `size` is cut off. A clip is
    `frames` frames, `stride` apart; the next begins `step` frames later. With `fps` each file is resampled: at each
    k / fps the frame whose time stamp is nearest. Without it all files must have one, constant rate. Damaged files,
    and those shorter than a clip, are logged by name and skipped.

    Raises:
        ConfigError: no size given, or a number out of range.
        DataError: unreadable folder, no videos, more than `max_bad` damaged or short ones, frames of differing sizes, a
            variable or differing frame rate, or more than `max_bytes` of pixels.
    """
    if size is None:
        raise ConfigError(f"{root}: a folder of videos needs a size in pixels, for example size=64")
    height, width = frame_size(size)
    windows = Windows((), frames, stride, step)
    integer("max_bad", max_bad, least=0)
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise ConfigError(f"fps={fps!r}, expected a positive number of frames a second")
    films: list[Film] = []
    for film in _sound_films(root, (height, width), fps, max_bad, max_bytes, windows):
        _check_rate(film, (films or [film])[0])
        films.append(film)
    return MemoryClips(
        name=root.resolve().name,
        films=tuple(torch.from_numpy(film.frames).permute(0, 3, 1, 2) for film in films),
        film_ids=tuple(film.path.relative_to(root).as_posix() for film in films),
        film_fps=films[0].rate(),
        frames=frames,
        stride=stride,
        step=step,
    )


def find_videos(root: Path) -> list[PurePath]:
    """Find the video files below `root`, relative to it, in order; hidden ones are left out."""
    videos = sorted(f for f in walk(root)[1] if f.suffix.lower() in SUFFIXES)
    if not videos:
        raise DataError(f"{root} holds no videos ({' '.join(sorted(SUFFIXES))})")
    return videos


def holds_videos(root: Path) -> bool:
    """Return whether a folder, which can be read, holds video files at any depth."""
    return any(f.suffix.lower() in SUFFIXES for f in walk(root)[1])


def _sound_films(
    root: Path, size: tuple[int, int], fps: float | None, max_bad: int, max_bytes: int, windows: Windows
) -> Iterator[Film]:
    """Decode the videos that can be and hold a clip, one by one, at `fps`."""
    bad: list[str] = []
    last = DamagedVideo("")
    videos = find_videos(root)
    warn_of_links(root, [root / file for file in videos])
    frames_left = max_bytes // (3 * size[0] * size[1])
    for file in tracked(videos, f"reading {root}"):
        try:
            film = read_film(root / file, size, fps, frames_left)
            _check_length(film, windows)
        except DamagedVideo as reason:
            bad.append(file.as_posix())
            kind = "short" if isinstance(reason, ShortVideo) else "damaged"
            logger.warning("skipped %s video %s: %s", kind, root / file, reason)
            if len(bad) > max_bad:
                raise DataError(
                    f"{root}: {len(bad)} damaged or short videos, more than max_bad={max_bad}: {', '.join(bad)}; the "
                    f"last: {reason}"
                ) from reason
            last = reason
        else:
            frames_left -= len(film.frames)
            yield film
    if len(bad) == len(videos):
        raise DataError(f"{root}: every video is damaged or short: {', '.join(bad)}; the last: {last}")


def _check_length(film: Film, windows: Windows) -> None:
    """Refuse a film that is shorter than a clip."""
    if len(film.frames) < windows.span:
        raise ShortVideo(
            f"{len(film.frames)} frames at {film.nominal_fps:.4g} a second, fewer than the "
            f"{windows.span} of a clip of frames={windows.frames} with stride={windows.stride}"
        )


def _check_rate(film: Film, first: Film) -> None:
    """Refuse a rate that is not constant, or not the first film's within one percent."""
    if not math.isclose(film.rate(), first.rate(), rel_tol=0.01):
        raise DataError(
            f"{film.path}: {film.rate():.4g} frames a second, but {first.path.name} has {first.rate():.4g}; "
            "give fps= to resample both"
        )
