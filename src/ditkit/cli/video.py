"""`ditkit video`: clips that a model generates or completes, as films and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ditkit.cli.evaluate import save
from ditkit.cli.options import (
    ModelName,
    Number,
    Options,
    load_of,
    options_of,
    seeds_of,
    with_training_options,
    writable,
)
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.config import MOST_SAMPLES, integer
from ditkit.core.errors import ConfigError
from ditkit.core.terminal import progress
from ditkit.data.loading import names_of
from ditkit.sample import Sampling
from ditkit.tasks.video.evaluation import default_masks, evaluate_clips
from ditkit.tasks.video.masks import KINDS, MaskKind, mask_kind

KINDS_GIVE = "; ".join(f"{kind.name}: {kind.gives}" for kind in KINDS.values())
Masks = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="MASK",
        help=f"The part of each clip that is given ({KINDS_GIVE}). Repeat it for several; default: all but "
        "first-frame and first-last, without --data unconditional.",
    ),
]
ClipData = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="STR",
        help=f"A named set of clips ({', '.join(names_of('clips'))}), of which the test split is taken, or a folder of "
        "video files.",
    ),
]
Sides = Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")]
OwnSeeds = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SEED ...]")]


@on_device
def video(
    model: ModelName,
    *,
    mask: Masks = (),
    data: ClipData = None,
    option: Options = (),
    count: Number = None,
    frames: Number = None,
    size: Sides = (),
    seeds: OwnSeeds = (),
    flags: Flattened = SamplingFlags(),
    features: bool = False,
    max_bad: Number = None,
    out: Path = Path("outputs/video"),
) -> None:
    """Predict, complete or generate clips with a trained model, and measure them.

    Examples:
        ditkit video digits --data moving-digits
        ditkit video vizdoom --data vizdoom --mask predict --steps 25
        ditkit video runs/mine/model --data my-films --frames 24 --size 48 64
        ditkit video runs/vdt/model --mask unconditional --frames 32
        ditkit video runs/video-dit/model --data moving-digits --policy taylorseer

    A mask gives a part of each clip, and the model generates the rest.

    Writes into the folder of --out:
        MASK.mp4, .gif    truth, given, generated and baseline (MP4 needs PyAV)
        MASK.png          their frames, and the errors as colours
        leadtime.png      how fast the prediction gets worse, for predict
        video.json        every number, settings, and what each policy did

    Args:
        model: A shipped model (digits, vizdoom), a folder, or owner/name on the Hugging Face hub.
        option: Option of the loader of --data, such as fps=10 or split=train. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        count: Clips, spread over the whole set. Default: one a seed; without --seeds 8, or all if there are fewer.
        frames: Frames of a clip. Default: the model's own.
        size: Size of a frame: height and width, or one number for a square. Default: the model's own.
        seeds: One a clip; whole numbers, or ranges such as 0..7. Default: 0, 1, 2 ...
        features: Also measure in the features of EfficientNet-Lite0; of unconditional clips, from 400 on.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        out: Folder to write to.
    """
    network = load_of(model, "video")
    kinds, numbers = masks_of(mask, data), clip_seeds(seeds, count)
    option = with_training_options(data, option, network)
    options = options_of(data, option, max_bad)
    sampling = flags.make(numbers or Sampling().seeds).resolved(network)
    with writable(out), progress() as advance:
        found = evaluate_clips(
            network,
            data,
            sampling=sampling,
            options=options,
            masks=kinds,
            count=len(numbers) or None,
            frames=frames,
            size=size,
            features=features,
            progress=advance,
        )
        given = {
            "mask": [kind.name for kind in kinds],
            "data": data,
            "option": list(option),
            "count": len(found.seeds),
            "frames": found.shape[1],
            "size": found.shape[2:],
            "seeds": found.seeds,
            **flags.as_dict(sampling),
            "max_bad": max_bad,
            "features": features,
        }
        save(found, out, "video.json", ["video", model], given, settings={"model": model, **given})


def masks_of(names: Sequence[str], data: str | None) -> tuple[MaskKind, ...]:
    """Return the kinds of masks by their names; without data, of the default ones that which needs none.

    Raises:
        ConfigError: an unknown one, one named twice, or one that needs data without any.
    """
    for i, name in enumerate(names):
        kind = mask_kind(name)
        if name in names[:i]:
            raise ConfigError(f"--mask {name} is given twice, expected each mask once")
        if not kind.gives_nothing and data is None:
            raise ConfigError(
                f"--mask {name} needs clips: expected --data moving-digits, or a folder of video files"
            )
    return tuple(map(mask_kind, names)) or default_masks(data)


def clip_seeds(words: Sequence[str], count: int | None) -> tuple[int, ...]:
    """Return one seed a clip; none where neither seeds nor a number of clips is given.

    Raises:
        ConfigError: words that are no seeds, or another number of them than clips.
    """
    if count is not None:
        integer("--count", count, least=1, most=MOST_SAMPLES)
    seeds = seeds_of(words) if words else tuple(range(count or 0))
    if count is not None and len(seeds) != count:
        raise ConfigError(f"--seeds names {len(seeds)} seeds for --count={count}, expected one a clip")
    return seeds
