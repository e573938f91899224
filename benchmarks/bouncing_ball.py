"""Clips of a ball whose positions are known, and how far the ball of a made clip is from the laws of its motion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.config import integer
from ditkit.metrics.error import finite, pooled_psnr_db
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.recipe import conditioned

FAINT = 0.1
"""Share of full brightness that counts as black when the ball is looked for."""


class Track(NamedTuple):
    """Where balls are: centres [B, T, 2] in px from the upper left corner, and the walls each has met by then."""

    centres: Tensor
    walls: Tensor  # int64 [B, T, 2], the number of bounces along each axis


@dataclass(frozen=True)
class BouncingBall:
    """A white disc on black at constant speed between walls that reflect it without loss; a `ClipSet`.

    Nothing is stored: clip i of a seed is drawn when it is asked for.

    Args:
        side: of a frame. radius: of the disc, both in px. speed: range of speeds, px a frame.
    """

    frames: int = 16
    side: int = 16
    radius: float = 2.0
    speed: tuple[float, float] = (1.0, 2.0)
    seed: int = 0
    length: int = 100_000
    name: str = "bouncing_ball"
    channels: int = 1
    fps: float = 10.0

    def __len__(self) -> int:
        return self.length

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def id(self, index: int) -> str:
        return f"{self.seed}-{index:06d}"

    def clips(self, indices: Tensor) -> Tensor:
        """The chosen clips as float32 [n, 1, T, H, W] in [-1, 1]; edges are one pixel wide."""
        pixel = torch.arange(self.side) + 0.5
        rows, columns = self.track(indices).centres[..., None, None].unbind(2)  # [n, T, 1, 1]
        distance = torch.hypot(pixel[:, None] - rows, pixel - columns)
        return (self.radius + 0.5 - distance).clamp(0, 1).unsqueeze(1) * 2 - 1

    def track(self, indices: Tensor) -> Track:
        """The ball of each chosen clip; along an axis, a triangle wave of period 2 room."""
        numbers = [integer("clip", index, least=0, most=self.length - 1) for index in indices.tolist()]
        drawn = np.stack([np.random.default_rng((self.seed, number)).random(4) for number in numbers])
        start, pace, turn = torch.from_numpy(drawn).float().split([2, 1, 1], 1)
        low, high = self.speed
        angle = 2 * torch.pi * turn
        velocity = (low + pace * (high - low)) * torch.cat([angle.sin(), angle.cos()], 1)
        room = self.side - 2 * self.radius
        straight = start[:, None] * room + velocity[:, None] * torch.arange(self.frames)[:, None]
        inside = room - (straight % (2 * room) - room).abs()
        return Track(self.radius + inside, straight.div(room, rounding_mode="floor").long())


def centres(clips: Tensor) -> Tensor:
    """Centroids of what is brighter than `FAINT`: [B, 1, T, H, W] -> [B, T, 2] in px; of a black frame, its middle."""
    bright = ((clips[:, 0] + 1) / 2 - FAINT).clamp_min(1e-6)
    rows, columns = (torch.arange(n, device=clips.device) + 0.5 for n in clips.shape[-2:])
    moments = [(bright.sum(3) * rows).sum(2), (bright.sum(2) * columns).sum(2)]
    return torch.stack(moments, -1) / bright.sum((2, 3))[..., None]


def velocity_error(found: Tensor, truth: Track, given: int) -> float:
    """Mean distance, px a frame, of the velocity after a bounce from the reflected one; NaN where none bounces.

    Counted are steps from frame to frame that follow a bounce off a wall after the last given frame, and in which
    there is none. A ball that stands still is off by its speed.

    Args:
        found: centres [B, T, 2]. given: frames at the beginning that were given, at least 1.
    """
    walls = truth.walls[:, given - 1 :]
    reflected = (walls[:, :-1] != walls[:, :1]).any(-1) & (walls.diff(dim=1) == 0).all(-1)
    off = (found - truth.centres)[:, given - 1 :].diff(dim=1).norm(dim=-1)
    return off[reflected].mean().item()


@dataclass(frozen=True, eq=False)
class Exam:
    """Held-out clips [B, 1, T, H, W], where their balls are, and what each mask leaves of them."""

    clips: Tensor
    track: Track
    told: Mapping[str, Cond]

    @classmethod
    def of(cls, balls: BouncingBall, kinds: Sequence[str]) -> Exam:
        every = torch.arange(len(balls))
        clips = balls.clips(every)
        told = {kind: conditioned(clips, mask_kind(kind), range(len(balls))) for kind in kinds}
        return cls(clips, balls.track(every), told)

    def scores(
        self, complete: Callable[[Cond], Tensor], kinds: Iterable[str] | None = None
    ) -> dict[str, float | None]:
        """PSNR of what `complete` makes under masks of some kinds, by default all, and the velocity of predictions."""
        found: dict[str, float | None] = {}
        for kind in self.told if kinds is None else kinds:
            cond = self.told[kind]
            made = complete(cond).clamp(-1, 1)
            found[f"{kind}_psnr_db"] = pooled_psnr_db(made, self.clips, cond.mask)
            if kind == "predict":
                found["after_bounce_px"] = self.after_bounce(made)
        return found

    def after_bounce(self, made: Tensor) -> float | None:
        return finite(velocity_error(centres(made), self.track, given=made.shape[2] // 2))
