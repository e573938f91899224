"""Windows of long outputs: the frames that each holds and owns, and one prediction from those that overlap.

A plan knows no model. At each step of a sampler the long latent is cut, each window predicted by itself, the
predictions merged, and one step made of the whole: a multistep solver's history belongs to the long latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, ShapeError, unknown

Blend = Literal["owner", "linear", "closed"]
"""The share of the later of two windows at frame k of the n that they have in common: none, k / n, or k / (n - 1)."""


class Window(NamedTuple):
    """Frames `start` to `stop` (without it), of which those before `own` are owned by windows before it."""

    start: int
    stop: int
    own: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class WindowPlan:
    """Windows from left to right that cover all frames; the owner of a frame is the first window that holds it.

    Args:
        frames: of the whole. spans: (start, stop) of each window; starts do not fall, stops rise.
        blend: how frames that several windows hold are merged.

    Raises:
        ConfigError: an unknown blend, no frames, or windows that leave a frame out or bring none.
    """

    frames: int
    spans: tuple[tuple[int, int], ...]
    blend: Blend = "owner"
    windows: tuple[Window, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        integer("frames", self.frames, least=1)
        if self.blend not in get_args(Blend):
            raise ConfigError("WindowPlan: " + unknown("blend", self.blend, get_args(Blend)))
        windows, reached, begun = [], 0, 0
        for start, stop in self.spans:
            if not begun <= start <= reached < stop:
                raise ConfigError(
                    f"WindowPlan: window {start}..{stop} after frame {reached} should start from {begun} to {reached} "
                    "and go beyond"
                )
            windows.append(Window(start, stop, reached))
            begun, reached = start, stop
        if reached != self.frames:
            raise ConfigError(f"WindowPlan: the windows end at frame {reached}, expected {self.frames}")
        object.__setattr__(self, "windows", tuple(windows))

    @property
    def owners(self) -> Tensor:
        """The window that owns each frame, [frames] int64."""
        lengths = torch.tensor([window.stop - window.own for window in self.windows])
        return torch.arange(len(self.windows)).repeat_interleave(lengths)

    @property
    def weights(self) -> Tensor:
        """The weight of each window's prediction at each frame, [windows, frames] float64; sums of 1."""
        weights = torch.zeros(len(self.windows), self.frames, dtype=torch.float64)
        for i, window in enumerate(self.windows):
            share = self.share(i)
            weights[:i, window.start : window.stop] *= 1 - share
            weights[i, window.start : window.stop] = share
        return weights

    def share(self, index: int) -> Tensor:
        """Return the share of a window, [its frames] float64, against what the windows before it were merged to."""
        window = self.windows[index]
        share = torch.ones(window.length, dtype=torch.float64)
        common = window.own - window.start
        position = torch.arange(common, dtype=torch.float64)
        if self.blend == "owner":
            share[:common] = 0
        elif self.blend == "linear":
            share[:common] = position / max(common, 1)
        else:
            share[:common] = position / (common - 1) if common > 1 else 0.5
        return share

    def cut(self, x: Tensor, axis: int = 2) -> list[Tensor]:
        """Cut `x`, which has the frames along `axis`, into its windows: views.

        Raises:
            ShapeError: another number of frames.
        """
        if x.shape[axis] != self.frames:
            raise ShapeError(
                f"cut: axis {axis} of {list(x.shape)} should have the plan's {self.frames} frames"
            )
        return [x.narrow(axis, window.start, window.length) for window in self.windows]


def merge(plan: WindowPlan, predictions: Sequence[Tensor], axis: int = 2) -> Tensor:
    """Merge predictions of the windows, [B, C, its frames, ...], to one of all frames, by the plan's weights.

    Where windows agree the result is theirs to the bit; a plan of one window returns its prediction.

    Args:
        axis: along which the frames lie.

    Raises:
        ShapeError: another number of predictions or of frames in one.
    """
    lengths = [window.length for window in plan.windows]
    given = [prediction.shape[axis] for prediction in predictions]
    if given != lengths:
        raise ShapeError(f"merge: predictions of {given} frames, expected {lengths} along axis {axis}")
    merged = predictions[0]
    for i, (window, prediction) in enumerate(zip(plan.windows, predictions, strict=True)):
        common = window.own - window.start
        if common and plan.blend != "owner":
            before = merged.narrow(axis, window.start, common)
            shape = [-1 if a == axis else 1 for a in range(prediction.ndim)]
            share = plan.share(i)[:common].to(prediction.device, prediction.dtype).reshape(shape)
            mixed = torch.lerp(before, prediction.narrow(axis, 0, common), share)
            merged = torch.cat([merged.narrow(axis, 0, window.start), mixed], dim=axis)
        if i:
            own = prediction.narrow(axis, common, window.length - common)
            merged = torch.cat([merged, own], dim=axis)
    return merged


class Windows(ABC):
    """A frozen dataclass: how a sample longer than a model's is cut, step by step."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.sample",)

    @abstractmethod
    def plan(self, frames: int, step: int, steps: int) -> WindowPlan:
        """Plan the windows of `frames` frames in step `step` of `steps`, counted from the noise.

        Raises:
            ConfigError: no frames, or no such step.
        """


@final
@dataclass(frozen=True)
class Chunks(Windows):
    """Chunks of one length, each with the last frames of the one before (VIN, arXiv 2503.17539; DualParal, 2505.21070).

    The last chunk may be shorter. Shared frames are blended in the first steps; later the owner's prediction alone
    counts, and the overlap is context.

    Args:
        length: frames that a chunk owns. overlap: frames before them that it sees.
        first: frames of the first chunk, if another number (DualParal: length + overlap).
        blended: share of the steps, from the noise on, in which shared frames are blended (VIN: 30 of 50).
    """

    length: int = 20
    overlap: int = 12
    first: int | None = None
    blended: float = 0.6

    def __post_init__(self) -> None:
        integer("Chunks: length", self.length, least=1)
        integer("Chunks: overlap", self.overlap, least=0)
        if self.first is not None:
            integer("Chunks: first", self.first, least=1)
        if not 0 <= self.blended <= 1:
            raise ConfigError(f"Chunks: blended={self.blended} should be a share of the steps, from 0 to 1")

    def plan(self, frames: int, step: int, steps: int) -> WindowPlan:
        _check_step(step, steps)
        spans, start = [], 0
        while start < frames:
            stop = start + (self.length if start or self.first is None else self.first)
            spans.append((max(0, start - self.overlap), min(stop, frames)))
            start = stop
        return WindowPlan(frames, tuple(spans), "linear" if step < round(self.blended * steps) else "owner")


@final
@dataclass(frozen=True)
class MovingWindows(Windows):
    """Windows whose seams move from step to step (YingVideo-MV, timestep-aware dynamic window range).

    The first window is shorter by an offset that grows by `shift` a step and starts again from 0 beyond `most`; it is
    never wrapped around. The last window grows backwards to `shortest`. What fits into one window is one.

    Args:
        length, overlap: frames of a window, and those that it shares with the next.
        shift, most: frames by which the offset grows, and the largest.
        shortest: frames of the shortest window.
        blend: of shared frames; "closed" is StableAvatar's.
    """

    length: int = 21
    overlap: int = 5
    shift: int = 3
    most: int = 9
    shortest: int = 12
    blend: Blend = "linear"

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("overlap", 0), ("shift", 0), ("most", 0)):
            integer(f"MovingWindows: {name}", getattr(self, name), least=least)
        if self.blend not in get_args(Blend):
            raise ConfigError("MovingWindows: " + unknown("blend", self.blend, get_args(Blend)))
        if not self.overlap < self.shortest <= self.length:
            raise ConfigError(
                f"MovingWindows: shortest={self.shortest} should lie above overlap={self.overlap} and be at most "
                f"length={self.length}"
            )
        if self.most > self.length - self.shortest:
            raise ConfigError(
                f"MovingWindows: most={self.most} leaves the first window fewer than shortest={self.shortest} frames; "
                f"expected at most {self.length - self.shortest}"
            )

    def offset(self, step: int) -> int:
        """Return the frames by which the first window is shorter in a step."""
        return self.shift * (step % (self.most // self.shift + 1)) if self.shift else 0

    def plan(self, frames: int, step: int, steps: int) -> WindowPlan:
        _check_step(step, steps)
        if frames <= self.length:
            return WindowPlan(frames, ((0, frames),), self.blend)
        spans = [(0, self.length - self.offset(step))]
        while spans[-1][1] < frames:
            start = spans[-1][1] - self.overlap
            stop = min(start + self.length, frames)
            spans.append((min(start, max(0, stop - self.shortest)), stop))
        return WindowPlan(frames, tuple(spans), self.blend)


def _check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise ConfigError(f"step={step} should be one of the {steps} steps, counted from 0")
