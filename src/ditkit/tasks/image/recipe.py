"""Images, by class or by caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.cond import Cond
from ditkit.core.labels import resolve_labels
from ditkit.core.model import Model
from ditkit.data.images import ImageSet
from ditkit.data.loading import load_images
from ditkit.nn.text_encoder import text_encoder
from ditkit.report.sheet import grid, write_png
from ditkit.tasks.denoiser import DenoiserRecipe
from ditkit.tasks.image.captions import Captions, check_captions, encoded_captions
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.randomness import SampleRNG

SHEET_CLASSES, SHEET_EACH, SHEET_STEPS = 8, 4, 25


@dataclass(frozen=True, kw_only=True)
class ClassImageRecipe(DenoiserRecipe):
    """A network that draws the classes of an image set, or, one that takes a text, what its captions say.

    Args:
        data: a named set, a folder of class folders, or a folder of images with or without captions; those are one
            class of the folder's name for a network that takes no text.
        model: its channels are taken from the data, and its classes and class names, or the width of its text.
    """

    sources: ClassVar[str] = (
        "A named set (emoji, fashion), or a folder with a folder of images for each class, or of images with captions "
        "in a metadata.jsonl, which a network that takes a prompt learns; without one they are a single class."
    )
    task: ClassVar[str] = "image"

    def read(self) -> ImageSet:
        return load_images(self.data, self.model.size, **self.loading)

    def signal_shape(self, data: ImageSet) -> tuple[int, ...]:
        return tuple(data.images.shape[1:])

    def decided(self, data: ImageSet) -> Mapping[str, Any]:
        """Return its classes, or the width of the text as its encoder has it."""
        if self.reads_captions:
            return {"text_width": text_encoder(self.model.text_encoder).width}
        names = data.classes or (data.name,)
        return {"classes": len(names), "class_names": names}

    @property
    def reads_captions(self) -> bool:
        """Return whether the network takes a prompt."""
        return bool(getattr(self.model, "text_encoder", ""))

    def dataset(self, data: ImageSet) -> ClassDataset:
        if not self.reads_captions:
            return ClassDataset(data)
        check_captions(data, allowed="blank" in self.options)
        model = self.model
        return CaptionedDataset(
            data, encoded_captions(data, self.data, model.text_encoder, model.text_tokens)
        )

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, ClassDataset)
        images = samples.images
        kinds = "captions" if self.reads_captions else f"{self.model.classes} classes"
        return (
            f"{len(images)} images {list(images.images.shape[1:])}, {kinds}, "
            f"{images.images.nbytes / 1e6:.1f} MB in memory"
        )

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        return partial(write_sheet, folder, prompts=sheet_prompts(samples))


class ClassDataset:
    """An image set as training samples."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        return self.images.images_float(indices), Cond(label=self.images.labels[indices])


class CaptionedDataset(ClassDataset):
    """An image set as training samples with their captions, which replace the class."""

    def __init__(self, images: ImageSet, captions: Captions) -> None:
        super().__init__(images)
        self.captions = captions

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        text, missing = self.captions.rows(indices), self.captions.missing(indices)
        absent = {"text": missing} if missing.any() else {}
        return self.images.images_float(indices), Cond(text=text.tokens, text_mask=text.mask, absent=absent)


def sheet_prompts(samples: TrainingSet) -> tuple[str, ...]:
    """Return captions from all over a set that has them, for the rows of a sheet; none for classes."""
    if not isinstance(samples, CaptionedDataset):
        return ()
    known = [caption for caption in samples.images.captions if caption.strip()]
    return tuple(known[i * len(known) // SHEET_CLASSES] for i in range(SHEET_CLASSES))


def write_sheet(folder: Path, model: Model, step: int, prompts: Sequence[str] = ()) -> None:
    """Draw samples of prompts, or of classes spread over all of them, a row each, as `folder`/STEP.png."""
    classes = resolve_labels(model, None, SHEET_CLASSES)
    labels = None if classes is None else [c for c in classes for _ in range(SHEET_EACH)]
    drawn = generate(
        model,
        labels,
        prompt=[prompt for prompt in prompts for _ in range(SHEET_EACH)] or None,
        seeds=range(SHEET_CLASSES * SHEET_EACH),
        steps=SHEET_STEPS,
        batch_size=16,
        policies=model.policies,
    )
    write_png(folder / f"{step:06d}.png", grid(drawn.samples, columns=SHEET_EACH))
