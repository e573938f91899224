"""The task of pictures: class-conditional images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.task import Evaluation, Progress, Task


class ImageTask(Task):
    """Pictures [C, H, W], by class."""

    name, noun, data, axes = "image", "picture", "images", ("C", "H", "W")
    settings: ClassVar[tuple[str, ...]] = ("count", "neighbours", "real_count")

    @property
    def recipe(self) -> type:
        from ditkit.tasks.image.recipe import ClassImageRecipe

        return ClassImageRecipe

    def error(self, x: Tensor, ref: Tensor, generated: Tensor | None = None) -> Mapping[str, Any]:
        from ditkit.metrics.error import picture_errors

        return picture_errors(x, ref, generated)

    def draw(self, samples: Tensor) -> Tensor:
        from ditkit.report.sheet import as_pictures

        return as_pictures(samples)

    def write(self, folder: Path, samples: Sequence[Tensor], names: Sequence[str], columns: int) -> list[str]:
        from ditkit.report.sheet import grid, write_png

        files = [
            write_png(folder / f"{name}.png", one).name for name, one in zip(names, samples, strict=True)
        ]
        write_png(folder / "sheet.png", grid(torch.stack(list(samples)), columns))
        return files

    def judge(self, real: Tensor, count: int, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
        from ditkit.bench.bench import DistributionMetric

        return DistributionMetric(real, count, shape)

    def reference(
        self, model: Any, data: str | None, mask: Any, seeds: Sequence[int], **options: Any
    ) -> tuple[Tensor | None, Cond]:
        from ditkit.data.loading import load_images

        if mask is not None:
            raise ConfigError(f"--mask {mask.name} with a model of {self.noun}s, expected one of clips")
        real = None if data is None else load_images(data, model.signal_shape[-1], **options).images_float()
        return real, Cond()

    def evaluate(
        self, model: Any, data: str, *, sampling: Any, progress: Progress | None, **settings: Any
    ) -> Evaluation:
        from ditkit.sample import Sampling
        from ditkit.tasks.image.scores import evaluate_pictures

        sampling = Sampling(batch_size=50) if sampling is None else sampling
        return evaluate_pictures(model, data, sampling=sampling, progress=progress, **settings)


class ImageCodecTask(ImageTask):
    """Pictures coded as latents and decoded again."""

    name, command, generates = "image-codec", "ditkit train emoji --codec", False
    settings = ("count",)

    @property
    def recipe(self) -> type:
        from ditkit.tasks.image.vae import ImageVaeRecipe

        return ImageVaeRecipe

    def evaluate(
        self, model: Any, data: str, *, sampling: Any, progress: Progress | None, **settings: Any
    ) -> Evaluation:
        from ditkit.tasks.image.vae import evaluate_codec

        return evaluate_codec(model, data, progress=progress, **settings)
