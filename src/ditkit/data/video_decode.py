"""One video file to upright RGB pictures of one size, with the time of each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ditkit.core.errors import DataError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

T = TypeVar("T")

REQUIREMENT = "av>=18"
SUFFIXES = frozenset(
    {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
)


class DamagedVideo(Exception):
    """A file that cannot be decoded to its end; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Film:
    """A decoded file."""

    path: Path
    frames: NDArray[np.uint8]  # RGB [length, height, width, 3]
    seconds: NDArray[np.float64]  # [length], increasing, the first is 0
    tick: float  # seconds; the grain of the file's clock
    nominal_fps: float  # what the header says

    def rate(self) -> float:
        """Frames a second. Raises `DataError` when they are not evenly spaced, up to the file's own rounding."""
        length = len(self.seconds)
        if length == 1:
            return self.nominal_fps
        interval = self.seconds[-1] / (length - 1)
        even = interval * np.arange(length)
        off = np.abs(self.seconds - even)
        # each time is a multiple of a tick, and so are the two that give the interval
        allowed = min(max(1.5 * self.tick, 0.02 * interval), 0.4 * interval)
        if off.max() > allowed:
            raise DataError(f"{self.path}: variable frame rate: {self._oddest()}; give fps= to resample it")
        measured = float(1 / interval)
        return self.nominal_fps if math.isclose(measured, self.nominal_fps, rel_tol=0.01) else measured

    def _oddest(self) -> str:
        """Describe the first frame whose distance from the one before is least like the usual one."""
        intervals = np.diff(self.seconds)
        usual = np.quantile(intervals, 0.5, method="lower")  # one that occurs, also of an even number
        ticks_off = np.rint(np.abs(intervals - usual) / self.tick)
        i = int(np.argmax(ticks_off)) + 1
        return (
            f"frame {i} is at {self.seconds[i]:.4f} s, expected {self.seconds[i - 1] + usual:.4f} s "
            f"for {1 / usual:.4g} frames a second"
        )


def read_film(path: Path, size: tuple[int, int], fps: float | None, max_frames: int) -> Film:
    """All frames, or those nearest to each k / `fps`; scaled to cover `size` (height, width), cut to its centre.

    Raises:
        DamagedVideo: corrupt, truncated, or without a picture.
        DataError: the frames differ in size, there are more than `max_frames`, or PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(f"a folder of videos needs PyAV: run `pip install '{REQUIREMENT}'`") from error
    pictures: list[NDArray[np.uint8]] = []
    seconds: list[float] = []
    if not os.path.isfile(path):
        raise DamagedVideo("not a regular file")
    try:
        with av.open(path) as container:
            stream = _film_of(container)
            decoded = _sound_frames(path, container, stream)
            for frame, second in decoded if fps is None else nearest_in_time(decoded, fps):
                if len(pictures) == max_frames:
                    raise DataError(
                        f"{path}: from frame {max_frames} on, the frames read at {size[0]} x {size[1]} need more "
                        "memory than max_bytes; give a smaller size or raise max_bytes"
                    )
                pictures.append(cover(_upright(frame), size, _pixel_aspect(frame, stream)))
                seconds.append(second)
            tick = _seconds(1, stream)
            nominal_fps = fps or float(stream.average_rate or 1 / tick)
    except (av.FFmpegError, OSError) as error:
        raise DamagedVideo(error.strerror or type(error).__name__) from error
    except (MemoryError, OverflowError) as error:
        raise DamagedVideo(f"its pictures do not fit into memory ({type(error).__name__})") from error
    if not pictures:
        raise DamagedVideo("it holds no frame")
    return Film(path, np.stack(pictures), np.array(seconds), tick, nominal_fps)


def _film_of(container: InputContainer) -> VideoStream:
    """Find the stream of the film: not the artwork of a cover, which players show beside it.

    Raises:
        DamagedVideo: there is no film.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise DamagedVideo("it holds no video stream" + " but a picture" * bool(container.streams.video))
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def nearest_in_time(frames: Iterable[tuple[T, float]], fps: float) -> Iterator[tuple[T, float]]:
    """For each k / fps up to the last frame the frame nearest to it, the earlier of two; (frame, seconds) pairs."""
    kept: tuple[T, float] | None = None
    number = 0
    for frame, second in frames:
        while kept is not None and number / fps <= (kept[1] + second) / 2:
            yield kept[0], number / fps
            number += 1
        kept = frame, second
    while kept is not None and number / fps <= kept[1] + 1e-6:  # seconds come from rounded fractions
        yield kept[0], number / fps
        number += 1


def cover(picture: NDArray[np.uint8], size: tuple[int, int], aspect: float = 1.0) -> NDArray[np.uint8]:
    """Crop the largest centred part with the proportions of `size` (height, width), scaled to it (bicubic).

    Args:
        aspect: width of a pixel of the picture over its height.
    """
    from PIL import Image

    (tall, wide), (height, width) = picture.shape[:2], (size[0], size[1] / aspect)
    scale = min(tall / height, wide / width)
    kept_wide, kept_tall = min(width * scale, wide), min(height * scale, tall)  # rounding may go beyond
    left, top = (wide - kept_wide) / 2, (tall - kept_tall) / 2
    box = (left, top, left + kept_wide, top + kept_tall)
    image = Image.fromarray(picture)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _sound_frames(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[VideoFrame, float]]:
    """Each frame and its seconds after the first; FFmpeg would go on after damage with guessed pictures."""
    first: VideoFrame | None = None
    second = before = lasted = -math.inf
    number = -1
    for number, frame in enumerate(container.decode(stream)):
        first = first or frame
        if frame.is_corrupt:
            raise DamagedVideo(f"frame {number} is corrupt")
        if frame.pts is None or first.pts is None:
            raise DamagedVideo(f"frame {number} has no time stamp")
        before, second = second, _seconds(frame.pts - first.pts, stream)
        if second <= before:
            raise DamagedVideo(f"frame {number} is at {second:.4f} s, the one before it at {before:.4f} s")
        if (frame.height, frame.width) != (first.height, first.width):
            raise DataError(
                f"{path}: frame {number} is {frame.height} x {frame.width} pixels (height x width), "
                f"expected {first.height} x {first.width} as frame 0"
            )
        lasted = second + _seconds(frame.duration, stream)
        yield frame, second
    declared = _declared_seconds(container, stream)
    # the last frame may carry no duration, and a header may count a frame that is not shown
    if declared is not None and number > 0 and declared - lasted > 2.5 * second / number:
        raise DamagedVideo(f"it ends at {lasted:.2f} s of the {declared:.2f} s that its header declares")


def _seconds(ticks: int, stream: VideoStream) -> float:
    assert stream.time_base is not None  # every stream of a file that could be opened has a clock
    return float(ticks * stream.time_base)


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    """Turn the pixels as a player does, since phones store portraits lying down: RGB [height, width, 3]."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _pixel_aspect(frame: VideoFrame, stream: VideoStream) -> float:
    """Width over height of the pixels of `_upright`, as a player shows them; 1 where the file does not say."""
    stored = float(stream.sample_aspect_ratio or 1)
    return 1 / stored if frame.rotation // 90 % 2 else stored


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Read the length of the pictures from the header; None where it says nothing, or means the sound as well."""
    if stream.duration is not None:
        return _seconds(stream.duration, stream)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6  # FFmpeg's AV_TIME_BASE
    return None
