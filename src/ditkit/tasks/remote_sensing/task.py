"""The task of satellite series: what clouds hide, what comes later, what covers the land."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.task import Evaluation, Progress, Task


class RemoteSensingTask(Task):
    """Series [C, T, H, W] of bands, or of classes of land cover, of a place whose images are given."""

    name, noun, data, axes = "remote_sensing", "satellite series", "satellite series", ("C", "T", "H", "W")
    command, has_frames = "ditkit satellite", True
    settings = ("count",)

    @property
    def recipe(self) -> type:
        from ditkit.tasks.remote_sensing.recipe import SatelliteRecipe

        return SatelliteRecipe

    def evaluate(
        self, model: Any, data: str, *, sampling: Any, progress: Progress | None, **settings: Any
    ) -> Evaluation:
        from ditkit.tasks.remote_sensing.scores import evaluate_series

        return evaluate_series(model, data, sampling=self.settle(sampling), progress=progress, **settings)

    def error(self, x: Tensor, ref: Tensor, generated: Tensor | None = None) -> Mapping[str, Any]:
        from ditkit.metrics.error import clip_errors

        return clip_errors(x, ref, generated)

    def draw(self, samples: Tensor) -> Tensor:
        import torch

        from ditkit.tasks.remote_sensing.figures import composite

        return torch.stack([composite(series) for series in samples])

    def write(self, folder: Path, samples: Sequence[Tensor], names: Sequence[str], columns: int) -> list[str]:
        from ditkit.core.checkpoint import replacing
        from ditkit.report.sheet import png
        from ditkit.tasks.remote_sensing.figures import plain_strip

        with replacing(folder / "sheet.png") as draft:
            draft.write_bytes(png(plain_strip(dict(zip(names, samples, strict=True)))))
        return ["sheet.png"] * len(names)

    def settle(self, sampling: Any) -> Any:
        """Return the settings without classifier-free guidance, which the paper does not have.

        Raises:
            ConfigError: a guidance is asked for.
        """
        from ditkit.sample import Sampling
        from ditkit.sample.guidance import guided

        if sampling.guidance not in (Sampling().guidance, guided(1.0)):
            raise ConfigError(f"guidance={sampling.guidance}: a UniTS is not guided, expected guidance=1")
        return sampling.changed(guidance=1.0)

    def reference(
        self, model: Any, data: str | None, mask: Any, seeds: Sequence[int], **options: Any
    ) -> tuple[Tensor | None, Cond]:
        from ditkit.tasks.remote_sensing.jobs import given
        from ditkit.tasks.remote_sensing.scores import held_out

        if mask is not None:
            raise ConfigError(f"--mask {mask.name}: {self.noun} have clouds of their own, expected none")
        if data is None:
            raise ConfigError(f"{self.noun} are made of images, expected --data, such as landsat")
        _, _, scenes = held_out(model, data, len(seeds), options)
        return None, given(model.config, scenes)
