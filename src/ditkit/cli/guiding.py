"""The flags of guidance, and the guidance they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ditkit.core.errors import ConfigError
from ditkit.core.loading import load
from ditkit.sample import Autoguidance, ClassifierFree, Guidance, Unguided

Interval = Annotated[tuple[float, float], tyro.conf.arg(metavar="LOW HIGH")]
ALL_TIMES = (0.0, 1.0)


@dataclass(frozen=True)
class Guiding:
    """How a class, what is given of a clip, or the better of two models is favoured.

    Args:
        guidance: Scale of classifier-free guidance, or of --guide; 1 is none, which halves the time.
        guidance_interval: Lowest and highest noise-time that is guided; 1 is pure noise.
        guidance_channels: Guide only the first so many channels. Default: all.
        guide: A weaker model to be guided away from, named as MODEL is, instead of the missing class or frames.
    """

    guidance: float = 2.0
    guidance_interval: Interval = ALL_TIMES
    guidance_channels: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    guide: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None

    def make(self) -> Guidance:
        """The guidance asked for; a guide is loaded.

        Raises:
            ConfigError: two flags contradict each other, or a value is out of range. Those of `load`.
        """
        narrowed = self._narrowed()
        if self.guide is not None and narrowed:
            raise ConfigError(f"got --guide {self.guide} with {narrowed}, expected one of the two")
        asked = narrowed or (f"--guide {self.guide}" if self.guide is not None else "")
        if self.guidance == 1 and asked:
            raise ConfigError(f"--guidance=1 guides nothing, expected another scale with {asked}")
        if self.guide is not None:
            return Autoguidance(self.guidance, load(self.guide))
        if self.guidance == 1:
            return Unguided()
        return ClassifierFree(self.guidance, self.guidance_channels, self.guidance_interval)

    def _narrowed(self) -> str:
        """The first flag that only classifier-free guidance has, or nothing."""
        if self.guidance_interval != ALL_TIMES:
            low, high = self.guidance_interval
            return f"--guidance-interval {low:g} {high:g}"
        return "" if self.guidance_channels is None else f"--guidance-channels {self.guidance_channels}"


GuidingFlags = Annotated[Guiding, tyro.conf.arg(name="")]
GUIDED = Guiding()
