"""The convention of a network: its path, its unit of time and its prediction; written in every model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ditkit.core.config import Checked
from ditkit.core.ddpm import DISCRETE
from ditkit.core.errors import ConfigError
from ditkit.core.path import PATHS, Path, Prediction

Clock = Literal["noise", "data", "index"]
Extra = Literal["none", "variance", "unused"]
PathName = Literal["linear", "cosine", "vp", "trig", "ddpm", "ddpm-sd", "ddpm-cosine"]


@dataclass(frozen=True)
class Convention(Checked):
    """Edges between a network and the noise-time core.

    Args:
        path: linear, cosine, vp, trig, or 1000 discrete steps: ddpm (linear betas), ddpm-sd (Stable Diffusion's),
            ddpm-cosine (Improved DDPM's).
        prediction: what the first C output channels are.
        time: what the network is fed: noise-time t, SiT's data-time 1 - t (whose velocity points to the data), or
            DDPM's integer index.
        extra: a second set of C output channels: none, DDPM's learned variance, or present and unused (SiT's code).
    """

    path: PathName = "linear"
    prediction: Prediction = "velocity"
    time: Clock = "noise"
    extra: Extra = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.discrete != (self.time == "index"):
            raise ConfigError(
                f"path={self.path!r} cannot be fed time={self.time!r}; ddpm goes with index, only"
            )
        if self.discrete and self.prediction == "velocity":
            raise ConfigError(
                f"path={self.path!r} is discrete and has no velocity; predict noise, data or score"
            )

    @property
    def discrete(self) -> bool:
        """True if the path is a table of steps, of which the network is fed the index."""
        return self.path in DISCRETE

    def make_path(self) -> Path:
        return DISCRETE[self.path]() if self.discrete else PATHS[self.path]()

    @property
    def unit(self) -> float:
        """Noise-time 1 on the network's clock: pi / 2 on the path trig, whose clock is an angle, else 1."""
        return 1.0 if self.discrete else PATHS[self.path].unit

    def model_time(self, t: Tensor) -> Tensor:
        """Noise-time (or a discrete index) as the network wants it."""
        t = 1 - t if self.time == "data" else t
        return t if self.unit == 1 else t * self.unit

    def split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Network output [B, C or 2C, ...] to the prediction in noise-time and the variance fraction, if learned.

        The fraction is f = (v + 1) / 2, not clamped (Nichol and Dhariwal 2021, eq. 15).
        """
        value, fraction = out, None
        if self.extra != "none":
            value, raw = out.chunk(2, dim=1)
            fraction = (raw + 1) / 2 if self.extra == "variance" else None
        if self.prediction == "velocity":
            value = -value if self.time == "data" else value
            value = value if self.unit == 1 else value * self.unit
        return value, fraction


DDPM = Convention("ddpm", "noise", "index", "variance")
"""DiT's published checkpoints."""
SIT = Convention("linear", "velocity", "data", "unused")
"""SiT's published checkpoints."""
