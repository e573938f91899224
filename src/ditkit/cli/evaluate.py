"""`ditkit evaluate`: how near a model's pictures are to the real ones, and to which of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.bench.macs import count_macs
from ditkit.cli.options import (
    ModelName,
    Number,
    Options,
    for_stage,
    load_maker,
    options_of,
    progress,
    with_training_options,
    writable,
)
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.checkpoint import replacing, write_json
from ditkit.core.errors import ConfigError
from ditkit.core.labels import class_names
from ditkit.core.model import Model
from ditkit.data.images import ImageSet
from ditkit.data.loading import load_images
from ditkit.metrics.distribution import Distribution, distribution, nearest_neighbours
from ditkit.metrics.features import HEAD_TAP, WEIGHTS_REQUIREMENT, extract, load_efficientnet_lite0
from ditkit.report.sheet import as_pictures, grid, png, sheet, write_png
from ditkit.sample import Samples

FEWEST = 4
"""Pictures that KID, precision and recall need in each set."""
SHOWN = 64
"""Pictures of the sheet."""


def evaluate(
    model: ModelName,
    *,
    data: str = "emoji",
    option: Options = (),
    count: int = 1000,
    flags: Flattened = SamplingFlags(batch_size=50),
    neighbours: int = 16,
    max_bad: Number = None,
    real_count: Number = None,
    out: Path = Path("outputs/evaluate"),
) -> None:
    """Measure a model against real pictures: KID, FID, precision, recall.

    Examples:
        ditkit evaluate emoji
        ditkit evaluate emoji --count 200 --policy taylorseer:interval=4
        ditkit evaluate runs/mine/model --data photos --out outputs/mine

    Writes into the folder of --out:
        evaluation.json    every number, and each picture's nearest real one
        sheet.png          the first 64 pictures
        neighbours.png     pictures above their nearest real ones

    Args:
        model: A shipped model (emoji), a folder, or owner/name on the Hugging Face hub.
        data: A named set (emoji, fashion), or a folder with a folder of images for each class, or with a
            metadata.jsonl of captions; those images are all of one class.
        option: Of the loader of --data, such as split=test of fashion. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        count: Pictures to draw, with classes as often as in the data; seeds 0, 1, 2 ...
        neighbours: Pictures shown beside their nearest real ones, at most --count.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        real_count: Real pictures to measure against, from all over the set. Default: all.
        out: Folder to write to.
    """
    if count < FEWEST:
        raise ConfigError(f"--count={count}, expected at least {FEWEST}")
    if neighbours < 1:
        raise ConfigError(f"--neighbours={neighbours}, expected at least 1")
    network, sampling = load_maker(model, "pictures"), flags.make(range(count))
    option = with_training_options(data, option, network)
    real = load_images(data, network.signal_shape[-1], **options_of(data, option, max_bad))
    check_real(network, real)
    real = real if real_count is None else thinned(real, real_count)
    extractor = load_efficientnet_lite0()
    with writable(out):
        labels = drawn_labels(real, count)
        with progress() as advance:
            macs = count_macs(lambda: generate(network, labels[0], sampling=sampling, seeds=(0,))).total
            drawn = generate(network, labels, sampling=sampling, progress=for_stage(advance, "drawing"))
            fake = extract(extractor, drawn.samples, progress=for_stage(advance, "features, drawn"))
            features = extract(extractor, real.images_float(), progress=for_stage(advance, "features, real"))
            advance("distances", 0, 1)
            result = distribution(features, fake, extractor=WEIGHTS_REQUIREMENT)
            near = nearest(drawn, real, fake[HEAD_TAP], features[HEAD_TAP])
        given = {
            "data": data,
            "option": list(option),
            "max_bad": max_bad,
            "real_count": real_count,
            "count": count,
            **flags.as_dict(sampling),
        }
        measured = {
            "command": shlex.join(["ditkit", "evaluate", model, *words_of(given)]),
            **asdict(result),
            "macs_each": macs,
            "seconds_each": drawn.seconds / count,
            "policy_bytes": drawn.policy_bytes,
            "settings": {"model": model, **given},
            "receipts": [receipt.as_dict() for receipt in drawn.receipts],
            "nearest": near.as_list(drawn, real),
        }
        write_json(out / "evaluation.json", measured)
        write_png(out / "sheet.png", grid(drawn.samples[:SHOWN], columns=round(SHOWN**0.5)))
        with replacing(out / "neighbours.png") as draft:
            draft.write_bytes(near.sheet(drawn, real, min(neighbours, count)))
    Console().print(table(result, measured))
    print(f"wrote {out}: evaluation.json, sheet.png, neighbours.png")


def words_of(options: Mapping[str, Any]) -> Iterator[str]:
    """`options` as words of a command line; a list is a flag that is repeated, a tuple one of several words."""
    for name, value in options.items():
        word = "--policy" if name == "policies" else f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            yield from (word, *map(str, item if isinstance(item, tuple) else (item,)))


@dataclass(frozen=True)
class Nearest:
    """The nearest real picture of each drawn one, by features and by pixels: distances, indices [n]."""

    features: tuple[Tensor, Tensor]
    pixels: tuple[Tensor, Tensor]

    def as_list(self, drawn: Samples, real: ImageSet) -> list[dict[str, Any]]:
        """One entry a drawn picture, JSON-able."""
        return [
            {
                "seed": seed,
                "label": drawn.labels[i],
                **{
                    space: {"id": real.ids[int(index[i])], "distance": float(distance[i])}
                    for space, (distance, index) in vars(self).items()
                },
            }
            for i, seed in enumerate(drawn.seeds)
        ]

    def sheet(self, drawn: Samples, real: ImageSet, count: int) -> bytes:
        """A PNG of the first `count` drawn pictures, above their nearest real ones."""
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


def nearest(drawn: Samples, real: ImageSet, fake_features: Tensor, real_features: Tensor) -> Nearest:
    return Nearest(
        features=nearest_neighbours(fake_features, real_features),
        pixels=nearest_neighbours(drawn.samples.clamp(-1, 1), real.images_float()),
    )


def check_real(model: Model, real: ImageSet) -> None:
    """Refuse data that is too little to measure, or whose classes or channels are not the model's.

    Images with captions instead of classes fit any model of one class.
    """
    if len(real) < FEWEST:
        raise ConfigError(f"{real.name} has {len(real)} pictures, expected at least {FEWEST}")
    if model.signal_shape[0] != real.images.shape[1]:
        given, expected = real.images.shape[1], model.signal_shape[0]
        raise ConfigError(f"{real.name} has {given} channels, the model draws {expected}")
    known = class_names(model)
    if len(known) != max(1, len(real.classes)):
        raise ConfigError(f"{real.name} has {len(real.classes)} classes, the model has {len(known)}")
    for i, (ours, theirs) in enumerate(zip(known, real.classes or known, strict=True)):
        if ours not in (theirs, str(i)):
            raise ConfigError(f"class {i} of {real.name} is {theirs!r}, the model's is {ours!r}")


def thinned(real: ImageSet, count: int) -> ImageSet:
    """`count` pictures from all over a set."""
    if not FEWEST <= count <= len(real):
        raise ConfigError(f"--real-count={count}, expected {FEWEST} to {len(real)}, as {real.name} has")
    return real.subset([i * len(real) // count for i in range(count)])


def drawn_labels(real: ImageSet, count: int) -> list[int]:
    """`count` classes, each as likely as in the data."""
    index = torch.randint(len(real), (count,), generator=torch.Generator().manual_seed(0))
    labels: list[int] = real.labels[index].tolist()
    return labels


def table(result: Distribution, measured: Mapping[str, Any]) -> Table:
    """The numbers with what they were measured in."""
    many, few = f"over {result.features}", f"over {result.fid_features}"
    fid = ("none", f"{few}, n too small") if result.fid is None else (f"{result.fid:.2f}", few)
    rows = [
        ("KID", f"{result.kid_mean:.5f} ± {result.kid_std:.5f}", f"{many}, subsets of {result.kid_subset}"),
        ("FID", *fid),
        ("MiFID", f"{result.mifid:.2f}", many),
        ("precision", f"{result.precision:.3f}", many),
        ("recall", f"{result.recall:.3f}", many),
        ("GMACs a picture", f"{measured['macs_each'] / 1e9:.1f}", ""),
        ("seconds a picture", f"{measured['seconds_each']:.3f}", ""),
    ]
    n = f"n = {result.n_fake} drawn, {result.n_real} real; features of {result.extractor}"
    out = Table(box=box.SIMPLE_HEAD, caption=n, caption_justify="left", padding=(0, 1, 0, 0))
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("features")
    for row in rows:
        out.add_row(*row)
    return out
