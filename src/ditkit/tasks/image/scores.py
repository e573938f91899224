"""Scores of pictures: how near a model's are to the real ones, and to which of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.bench.macs import count_macs
from ditkit.core.checkpoint import replacing
from ditkit.core.config import MOST_SAMPLES, integer
from ditkit.core.errors import ConfigError
from ditkit.core.labels import class_names
from ditkit.core.model import Denoiser, Model
from ditkit.core.task import Evaluation, Progress
from ditkit.data.images import ImageSet
from ditkit.data.loading import load_images
from ditkit.metrics.distribution import Distribution, distribution, nearest_neighbours
from ditkit.metrics.features import HEAD_TAP, WEIGHTS_REQUIREMENT, extract, load_efficientnet_lite0
from ditkit.metrics.retrieval import Retrieval, retrieval
from ditkit.report.sheet import as_pictures, grid, png, sheet, write_png
from ditkit.sample import Samples, Sampling
from ditkit.tasks.image.captions import check_captions

if TYPE_CHECKING:
    from ditkit.core.terminal import Table

FEWEST = 4
"""Pictures that KID, precision and recall need in each set."""
SHOWN = 64
"""Pictures of the sheet."""


@dataclass(frozen=True)
class Nearest:
    """The nearest real picture of each drawn one, by features and by pixels: distances, indices [n]."""

    features: tuple[Tensor, Tensor]
    pixels: tuple[Tensor, Tensor]

    def as_list(self, drawn: Samples, real: ImageSet) -> list[dict[str, Any]]:
        """Return one entry a drawn picture as JSON."""
        return [
            {
                "seed": seed,
                **({"label": drawn.labels[i]} if drawn.labels else {}),
                **({"prompt": drawn.prompts[i]} if drawn.prompts else {}),
                **{
                    space: {"id": real.ids[int(index[i])], "distance": float(distance[i])}
                    for space, (distance, index) in vars(self).items()
                },
            }
            for i, seed in enumerate(drawn.seeds)
        ]

    def sheet(self, drawn: Samples, real: ImageSet, count: int) -> bytes:
        """Return a PNG of the first `count` drawn pictures, above their nearest real ones."""
        rows = {
            "drawn": drawn.samples[:count],
            "nearest in features": real.images_float(self.features[1][:count]),
            "nearest in pixels": real.images_float(self.pixels[1][:count]),
        }
        captions = {
            "drawn": ["drawn", "above: distance in features,", "distance in pixels"],
            "nearest in features": [
                "nearest in features",
                f"{HEAD_TAP} of EfficientNet-Lite0",
            ],
            "nearest in pixels": ["nearest in pixels", "values in [-1, 1]"],
        }
        pairs = zip(self.features[0][:count], self.pixels[0][:count], strict=True)
        heads = [f"{float(a):.2f}, {float(b):.1f}" for a, b in pairs]
        return png(sheet({name: as_pictures(images) for name, images in rows.items()}, captions, heads))


@dataclass(frozen=True, eq=False)
class ImageEvaluation(Evaluation):
    """Pictures of a model, and their distances to the real ones.

    Args:
        macs_each: multiply-accumulates of drawing one picture.
        neighbours: pictures shown beside their nearest real ones.
        retrieval: of pictures that are drawn by the captions of the real ones.
    """

    drawn: Samples
    real: ImageSet
    result: Distribution
    nearest: Nearest
    macs_each: int
    neighbours: int
    retrieval: Retrieval | None = None

    @property
    def seconds_each(self) -> float:
        """Wall clock of drawing one picture."""
        return self.drawn.seconds / len(self.drawn.seeds)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.result),
            **({} if self.retrieval is None else {"retrieval": asdict(self.retrieval)}),
            "macs_each": self.macs_each,
            "seconds_each": self.seconds_each,
            "policy_bytes": self.drawn.policy_bytes,
            "receipts": [receipt.as_dict() for receipt in self.drawn.receipts],
            "nearest": self.nearest.as_list(self.drawn, self.real),
        }

    def save(self, folder: Path) -> list[list[str]]:
        count = min(self.neighbours, len(self.drawn.seeds))
        write_png(folder / "sheet.png", grid(self.drawn.samples[:SHOWN], columns=round(SHOWN**0.5)))
        with replacing(folder / "neighbours.png") as draft:
            draft.write_bytes(self.nearest.sheet(self.drawn, self.real, count))
        return [["sheet.png", "neighbours.png"]]

    def table(self) -> Table:
        return table(self.result, self.macs_each, self.seconds_each, self.retrieval)


def evaluate_pictures(
    model: Denoiser,
    data: str,
    *,
    sampling: Sampling,
    options: Mapping[str, Any],
    count: int = 1000,
    neighbours: int = 16,
    real_count: int | None = None,
    progress: Progress | None = None,
) -> ImageEvaluation:
    """Draw pictures with classes as often as in the data, and measure KID, FID, precision and recall.

    Of a model that takes a prompt, pictures are drawn by captions of the data, and retrieval is measured too.

    Args:
        sampling: of the pictures, but for its seeds, which are 0 to `count` - 1.
        options: of the data's loader.
        neighbours: pictures shown beside their nearest real ones, at most `count`.
        real_count: real pictures to measure against, from all over the set; None for all.

    Raises:
        ConfigError: too few pictures, or data of other classes or channels than the model's. Those of `load_images`.
        DataError: the data, or the extractor's weights, are missing or damaged.
    """
    integer("count", count, least=FEWEST, most=MOST_SAMPLES)
    integer("neighbours", neighbours, least=1)
    real = load_images(data, model.signal_shape[-1], **options)
    check_real(model, real)
    real = real if real_count is None else thinned(real, real_count)
    extractor, index = load_efficientnet_lite0(), drawn_index(real, count)
    words = words_of(model, real, index)

    def stage(name: str) -> Any:
        return None if progress is None else partial(progress, name)

    sampling = sampling.changed(seeds=range(count))
    first = {word: values[0] for word, values in words.items()}
    macs = count_macs(lambda: generate(model, **first, sampling=sampling, seeds=(0,))).total
    drawn = generate(model, **words, sampling=sampling, progress=stage("drawing"))
    fake = extract(extractor, drawn.samples, progress=stage("features, drawn"))
    features = extract(extractor, real.images_float(), progress=stage("features, real"))
    if progress is not None:
        progress("distances", 0, 1)
    result = distribution(features, fake, extractor=WEIGHTS_REQUIREMENT)
    near = nearest(drawn, real, fake[HEAD_TAP], features[HEAD_TAP])
    found = retrieval(fake[HEAD_TAP], features[HEAD_TAP], index) if "prompt" in words else None
    return ImageEvaluation(drawn, real, result, near, macs, neighbours, found)


def nearest(drawn: Samples, real: ImageSet, fake_features: Tensor, real_features: Tensor) -> Nearest:
    """Find the nearest real pictures by features [n, d] and by pixels."""
    return Nearest(
        features=nearest_neighbours(fake_features, real_features),
        pixels=nearest_neighbours(drawn.samples.clamp(-1, 1), real.images_float()),
    )


def check_real(model: Model, real: ImageSet) -> None:
    """Refuse data that is too little to measure, or whose classes or channels are not the model's.

    A model that takes a prompt needs captions instead. Images with captions instead of classes fit any model of one
    class.
    """
    if len(real) < FEWEST:
        raise ConfigError(f"{real.name} has {len(real)} pictures, expected at least {FEWEST}")
    if model.signal_shape[0] != real.images.shape[1]:
        given, expected = real.images.shape[1], model.signal_shape[0]
        raise ConfigError(f"{real.name} has {given} channels, the model draws {expected}")
    if getattr(model.config, "text_encoder", ""):
        check_captions(real, allowed=False)
        return
    known = class_names(model)
    if len(known) != max(1, len(real.classes)):
        raise ConfigError(f"{real.name} has {len(real.classes)} classes, the model has {len(known)}")
    for i, (ours, theirs) in enumerate(zip(known, real.classes or known, strict=True)):
        if ours not in (theirs, str(i)):
            raise ConfigError(f"class {i} of {real.name} is {theirs!r}, the model's is {ours!r}")


def thinned(real: ImageSet, count: int) -> ImageSet:
    """Return `count` pictures from all over a set."""
    if not FEWEST <= count <= len(real):
        raise ConfigError(f"real_count={count}, expected {FEWEST} to {len(real)}, as {real.name} has")
    return real.subset([i * len(real) // count for i in range(count)])


def drawn_index(real: ImageSet, count: int) -> Tensor:
    """Return `count` pictures of the data, each as likely as another, [count]: their classes or captions are drawn."""
    return torch.randint(len(real), (count,), generator=torch.Generator().manual_seed(0))


def words_of(model: Model, real: ImageSet, index: Tensor) -> dict[str, Any]:
    """Return the words of `generate` that ask for the class, or the caption, of the chosen pictures."""
    if getattr(model.config, "text_encoder", ""):
        return {"prompt": [real.captions[i] for i in index.tolist()]}
    return {"label": real.labels[index].tolist()}


def table(result: Distribution, macs_each: int, seconds_each: float, found: Retrieval | None = None) -> Table:
    """Return the figures with the features they are measured in."""
    from rich import box

    from ditkit.core.terminal import Table

    many, few = f"over {result.features}", f"over {result.fid_features}"
    fid = ("none", f"{few}, n too small") if result.fid is None else (f"{result.fid:.2f}", few)
    rows = [
        ("KID", f"{result.kid_mean:.5f} ± {result.kid_std:.5f}", f"{many}, subsets of {result.kid_subset}"),
        ("FID", *fid),
        ("MiFID", f"{result.mifid:.2f}", many),
        ("precision", f"{result.precision:.3f}", many),
        ("recall", f"{result.recall:.3f}", many),
        ("GMACs a picture", f"{macs_each / 1e9:.1f}", ""),
        ("seconds a picture", f"{seconds_each:.3f}", ""),
    ]
    if found is not None:
        guessing = f"{many}; chance {found.chance1:.3f}, {found.chance5:.3f}"
        rows.insert(5, ("retrieval, top 1, 5", f"{found.top1:.3f}, {found.top5:.3f}", guessing))
    n = f"n = {result.n_fake} drawn, {result.n_real} real; features of {result.extractor}"
    out = Table(box=box.SIMPLE_HEAD, caption=n, caption_justify="left", padding=(0, 1, 0, 0))
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("features")
    for row in rows:
        out.add_row(*row)
    return out
