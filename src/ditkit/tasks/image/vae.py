"""Autoencoding of images: a codec of a user's own pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.bench.rows import NOTHING
from ditkit.codecs.image_vae import ImageVae
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError
from ditkit.core.task import Evaluation, Progress
from ditkit.data.loading import load_images
from ditkit.metrics.error import picture_errors
from ditkit.report.sheet import grid, write_png
from ditkit.tasks.image.recipe import ClassDataset
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.train.autoencoding import Autoencoding
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.terms.latent_kl import LatentKL
from ditkit.train.terms.regression import AbsoluteError

LATENT_DIFFUSION = Autoencoding((AbsoluteError(), LatentKL()))
SHEET_PICTURES = 8
MEASURED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class ImageVaeRecipe(Recipe):
    """A VAE of an image set; its statistics are measured on all of the set when training is done.

    Args:
        data: a named set, or a folder of images as `ditkit.data.folder` takes it.
        model: its channels are taken from the data.
    """

    sources: ClassVar[str] = "A named set of images (emoji, fashion), or a folder of images."
    task: ClassVar[str] = "image-codec"
    has_sites: ClassVar[bool] = False
    objective: Objective = LATENT_DIFFUSION

    def prepared(self) -> Prepared:
        images = load_images(self.data, self.model.size, **self.loading)
        model = replace(self.model, channels=images.images.shape[1])
        return Prepared(replace(self, model=model), ClassDataset(images))

    def network(self) -> Any:
        return ImageVae(self.model)

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, ClassDataset)
        images = samples.images.images
        return f"{len(images)} images {list(images.shape[1:])}, {images.nbytes / 1e6:.1f} MB in memory"

    def example(self, model: Any) -> tuple[Any, ...]:
        shape = (self.model.channels, self.model.size, self.model.size)
        return torch.empty(1, *shape), torch.empty(1, *model.latent_shape(shape))

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, ClassDataset)
        places = torch.linspace(0, len(samples) - 1, min(SHEET_PICTURES, len(samples))).long()
        return partial(write_sheet, folder, samples.images.images_float(places))

    def finish(self, model: Any, samples: TrainingSet) -> None:
        """Measure the statistics of a trained codec, before it is saved."""
        assert isinstance(samples, ClassDataset)
        parts = torch.arange(len(samples)).split(MEASURED_AT_ONCE)
        device = next(model.parameters()).device
        model.fit_statistics(samples.images.images_float(part).to(device) for part in parts)


@torch.no_grad()
def write_sheet(folder: Path, pictures: Tensor, codec: ImageVae, step: int) -> None:
    """Pictures above what the codec makes of them, as `folder`/STEP.png."""
    device = next(codec.parameters()).device
    again = codec.decode(codec.encode(pictures.to(device))).cpu()
    write_png(folder / f"{step:06d}.png", grid(torch.cat([pictures, again]), columns=len(pictures)))


@dataclass(frozen=True, eq=False)
class CodecEvaluation(Evaluation):
    """Pictures and their reconstructions, [n, C, H, W], with the errors of all."""

    pictures: Tensor
    reconstructed: Tensor
    count: int
    psnr_db: float | None
    ssim: float | None

    def as_dict(self) -> dict[str, Any]:
        return {"pictures": self.count, "psnr_db": self.psnr_db, "ssim": self.ssim}

    def table(self) -> Any:
        from rich import box

        from ditkit.core.terminal import Table

        out = Table(
            "PSNR, dB",
            "SSIM",
            title=f"{self.count} pictures, coded and decoded",
            box=box.SIMPLE_HEAD,
            min_width=40,
        )
        cells = [(self.psnr_db, 2), (self.ssim, 4)]
        out.add_row(*(NOTHING if value is None else f"{value:.{digits}f}" for value, digits in cells))
        return out

    def save(self, folder: Path) -> list[list[str]]:
        page = grid(torch.cat([self.pictures, self.reconstructed]), columns=len(self.pictures))
        return [[write_png(folder / "sheet.png", page).name]]


@torch.no_grad()
def evaluate_codec(
    codec: ImageVae,
    data: str,
    *,
    options: Mapping[str, Any],
    count: int = 1000,
    progress: Progress | None = None,
) -> CodecEvaluation:
    """Measure how near pictures from all over a set come back from the mean of their latents.

    Raises:
        ConfigError: a number below 1, or pictures of other channels. DataError: the data are missing or damaged.
    """
    images = load_images(data, codec.config.size, **options)
    if images.images.shape[1] != codec.config.channels:
        raise ConfigError(
            f"{data} has {images.images.shape[1]} channels, the codec takes {codec.config.channels}"
        )
    count = min(integer("count", count, least=1), len(images))
    indices = torch.arange(count) * len(images) // count
    pictures, again = images.images_float(indices), []
    for part in pictures.split(MEASURED_AT_ONCE):
        again.append(codec.decode(codec.encode(part)))
        if progress is not None:
            progress("reconstructing", sum(map(len, again)), count)
    reconstructed = torch.cat(again)
    found = picture_errors(reconstructed.clamp(-1, 1), pictures)
    shown = slice(SHEET_PICTURES)
    return CodecEvaluation(pictures[shown], reconstructed[shown], count, found["psnr_db"], found["ssim"])
