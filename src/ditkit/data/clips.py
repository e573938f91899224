"""Sets of clips: the interface that every video loader returns, and the one that lies in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ditkit.core.config import Checked, Count, integer
from ditkit.core.errors import ConfigError, DataError, unknown


@runtime_checkable
class ClipSet(Protocol):
    """Clips of one length and size, drawn by index; the same index gives the same clip in any batch."""

    @property
    def name(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    @property
    def fps(self) -> float:
        """Frames a second of a clip."""
        ...

    def __len__(self) -> int: ...
    def clips(self, indices: Tensor) -> Tensor:
        """Read the chosen clips as float32 [n, C, T, H, W] in [-1, 1]."""
        ...

    def id(self, index: int) -> str:
        """Name the clip, uniquely within the set."""
        ...


@runtime_checkable
class LabelledClips(ClipSet, Protocol):
    """Clips that may have a class each, as `classes` says by name; it is empty where they have none."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    def class_labels(self, indices: Tensor) -> Tensor:
        """Return the class of each chosen clip, int64 [n]."""
        ...


@dataclass(frozen=True)
class Windows(Checked):
    """Clips cut out of longer films: `frames` frames, `stride` apart; the next clip starts `step` later.

    A film shorter than `span` gives no clip.
    """

    lengths: tuple[int, ...]  # frames of each film
    frames: Count
    stride: Count = 1
    step: Count = 1

    @property
    def span(self) -> int:
        """Frames of the film from the first to the last of a clip, both included."""
        return (self.frames - 1) * self.stride + 1

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """For each film the number of clips in it and in those before it."""
        return tuple(accumulate(max(0, (n - self.span) // self.step + 1) for n in self.lengths))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, index: int) -> tuple[int, int]:
        """Locate a clip: its film, and its first frame there. Raises `ConfigError` beyond the last clip."""
        index = integer("clip", index, least=0, most=len(self) - 1)
        film = bisect_right(self.ends, index)
        return film, (index - (self.ends[film - 1] if film else 0)) * self.step

    def take(self, films: Sequence[Tensor], indices: Tensor) -> Tensor:
        """Cut the chosen clips [n, frames, ...] out of films [length, ...]."""
        places = [self.place(i) for i in indices.tolist()]
        cut = [films[film][start : start + self.span : self.stride] for film, start in places]
        return torch.stack(cut) if cut else films[0].new_empty(0, self.frames, *films[0].shape[1:])


@dataclass(frozen=True, eq=False)
class MemoryClips:
    """Films in memory as bytes, and every window of them as a clip; overlapping windows share the memory.

    `tracks` are aligned with the films frame by frame; `meanings` says what a track's numbers stand for.
    """

    name: str
    films: tuple[Tensor, ...]  # uint8 [length, C, H, W]
    film_ids: tuple[str, ...]
    film_fps: float
    frames: int
    stride: int = 1
    step: int = 1
    tracks: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    meanings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        forms = {(film.dtype, *film.shape[1:]) for film in self.films}
        if len(forms) != 1 or {(film.dtype, film.ndim) for film in self.films} != {(torch.uint8, 4)}:
            raise DataError(f"{self.name}: films are {forms}, expected uint8 [length, C, H, W] of one size")
        if len(self.film_ids) != len(self.films):
            raise DataError(f"{self.name}: {len(self.film_ids)} ids for {len(self.films)} films")
        for name, track in self.tracks.items():
            if (lengths := tuple(len(part) for part in track)) != self.windows.lengths:
                raise DataError(
                    f"{self.name}: track {name!r} has lengths {lengths}, the films {self.windows.lengths}"
                )
        if not len(self):
            raise DataError(
                f"{self.name}: the longest film has {max(self.windows.lengths)} frames, a clip of "
                f"frames={self.frames} with stride={self.stride} spans {self.windows.span}"
            )

    @cached_property
    def windows(self) -> Windows:
        return Windows(tuple(len(film) for film in self.films), self.frames, self.stride, self.step)

    @property
    def channels(self) -> int:
        return self.films[0].shape[1]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.films[0].shape[-2:]
        return height, width

    @property
    def fps(self) -> float:
        return self.film_fps / self.stride

    def __len__(self) -> int:
        return len(self.windows)

    def clips(self, indices: Tensor) -> Tensor:
        """Read the chosen clips as float32 [n, C, T, H, W] in [-1, 1]."""
        return to_clips(self.windows.take(self.films, indices))

    def id(self, index: int) -> str:
        """Name the film and the frame that the clip starts with: `walk.mp4@12`."""
        film, start = self.windows.place(index)
        return f"{self.film_ids[film]}@{start}"

    def actions(self, indices: Tensor) -> Tensor:
        """Read the actions taken after each frame, which led to the next: int64 [n, T]."""
        return self._track("actions", indices).long()

    def depth(self, indices: Tensor) -> Tensor:
        """Distance from the camera, 0 near to 1 far: float32 [n, 1, T, H, W]."""
        return self._track("depth", indices).unsqueeze(1).float() / 255

    def labels(self, indices: Tensor) -> Tensor:
        """Read the class of the object that each pixel shows: int64 [n, 1, T, H, W]."""
        return self._track("labels", indices).unsqueeze(1).long()

    def _track(self, name: str, indices: Tensor) -> Tensor:
        if name not in self.tracks:
            raise DataError(unknown(f"track of {self.name}", name, self.tracks or ("none",)))
        return self.windows.take(self.tracks[name], indices)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some clips of a set, by their indices there."""

    whole: ClipSet
    indices: Tensor

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def channels(self) -> int:
        return self.whole.channels

    @property
    def frames(self) -> int:
        return self.whole.frames

    @property
    def size(self) -> tuple[int, int]:
        return self.whole.size

    @property
    def fps(self) -> float:
        return self.whole.fps

    def __len__(self) -> int:
        return len(self.indices)

    def clips(self, indices: Tensor) -> Tensor:
        return self.whole.clips(self.indices[indices])

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes if isinstance(self.whole, LabelledClips) else ()

    def class_labels(self, indices: Tensor) -> Tensor:
        return class_labels(self.whole, self.indices[indices])

    def id(self, index: int) -> str:
        return self.whole.id(int(self.indices[index]))


def class_labels(clips: ClipSet, indices: Tensor) -> Tensor:
    """Return the class of each chosen clip, int64 [n].

    Raises:
        DataError: the clips have no classes.
    """
    if not isinstance(clips, LabelledClips) or not clips.classes:
        raise DataError(f"{clips.name}: its clips have no labels, expected a set with classes")
    return clips.class_labels(indices)


def spread(clips: ClipSet, count: int) -> Subset:
    """`count` clips from all over a set; neighbours may overlap.

    Raises:
        ConfigError: the set has fewer.
    """
    if not 1 <= count <= len(clips):
        raise ConfigError(f"{clips.name} has {len(clips)} clips of {clips.frames} frames, asked for {count}")
    return Subset(clips, torch.arange(count) * len(clips) // count)


def to_clips(films: Tensor) -> Tensor:
    """Bytes [n, T, C, H, W] as float32 [n, C, T, H, W] in [-1, 1]."""
    return films.transpose(1, 2).float() / 127.5 - 1


def frame_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one number (a square) or two. Raises `ConfigError` for anything else."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ConfigError(f"size={size!r}, expected a number or (height, width)")
    height, width = (integer("size", side, least=1) for side in sides)
    return height, width
