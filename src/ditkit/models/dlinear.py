"""DLinear (arXiv 2205.13504): a linear layer for the moving average of a series and one for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor, nn

from ditkit.core.config import FROM_DATA, Count, ModelConfig
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.decomposition import moving_average


@dataclass(frozen=True)
class DLinearConfig(ModelConfig):
    """Architecture of a DLinear; one pair of layers serves all series.

    Args:
        frames: steps observed.
        horizon: steps forecast in one pass.
        kernel: steps of the moving average.
        steps: of time between two values, of the series that it was trained on.
    """

    task: ClassVar[str] = "forecast"
    per_series: ClassVar[bool] = True

    frames: Count = 336
    horizon: Count = 96
    kernel: Count = 25
    steps: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ConfigError(f"DLinear: kernel={self.kernel} should be odd")

    @classmethod
    def tiny(cls) -> Self:
        return cls(frames=12, horizon=5, kernel=5)


class DLinear(Model):
    """y = Wt average(x) + Ws (x - average(x)), without normalisation of the window."""

    Config = DLinearConfig
    task = "forecast"
    config: DLinearConfig

    def __init__(self, config: DLinearConfig) -> None:
        super().__init__()
        self.config = config
        self.trend = nn.Linear(config.frames, config.horizon)
        self.season = nn.Linear(config.frames, config.horizon)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (1, self.config.frames, 1, 1)

    def sites(self) -> tuple[Site, ...]:
        return (Site("head", "head", "series"),)

    def forward(self, x: Tensor, run: Run = DIRECT) -> Tensor:
        """Forecast each series by itself.

        Args:
            x: [B, C, L, H, W] observed.

        Returns:
            [B, C, H', H, W], H' steps.

        Raises:
            ShapeError: another number of steps than the config's.
        """
        if x.ndim != 5 or x.shape[2] != self.config.frames:
            raise ShapeError(f"DLinear: input {list(x.shape)} should be [B, C, {self.config.frames}, H, W]")
        series = x.movedim(2, -1).flatten(0, -2)
        out: Tensor = run.site("head", self.head, series)
        return out.unflatten(0, (*x.shape[:2], *x.shape[3:])).movedim(-1, 2)

    def head(self, x_NL: Tensor) -> Tensor:
        """[N, L] to [N, H']."""
        smooth = moving_average(x_NL, self.config.kernel)
        return self.trend(smooth) + self.season(x_NL - smooth)
