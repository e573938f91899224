"""`ditkit video`: clips from a model, or what is missing of them, as films and scores."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ditkit.cli.evaluate import words_of
from ditkit.cli.options import (
    DataName,
    ModelName,
    Number,
    Options,
    load_maker,
    options_of,
    progress,
    seeds_of,
    with_training_options,
    writable,
)
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.checkpoint import replacing, write_json
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.numbers import integer
from ditkit.data.clips import ClipSet, frame_size, spread
from ditkit.data.loading import accepts_option, load_held_out
from ditkit.metrics.features import load_efficientnet_lite0
from ditkit.tasks.video.figures import leadtime, write_films, write_strips
from ditkit.tasks.video.masks import KINDS, UNCONDITIONAL, MaskKind, mask_kind
from ditkit.tasks.video.scores import CLIP_FEATURE, Completed, VideoScores, score

Masks = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="MASK")]
Sides = Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")]
OwnSeeds = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SEED ...]")]

LEARNED = ("predict", "backward", "interpolate", "single-frame", "random-frames", "region")
"""Masks by default, which VDT is trained on; `unconditional` as well."""
COUNT = 8
"""Clips by default."""
FPS = 10.0
"""Of films without data, whose rate nothing says."""


def video(
    model: ModelName,
    *,
    mask: Masks = (),
    data: DataName = None,
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
    """Predict, complete or invent clips with a trained model, and measure how well.

    Examples:
        ditkit video digits --data moving-digits
        ditkit video vizdoom --data vizdoom --mask predict --steps 25
        ditkit video runs/mine/model --data my-films --frames 24 --size 48 64
        ditkit video runs/vdt/model --mask unconditional --frames 32
        ditkit video runs/video-dit/model --data moving-digits --policy taylorseer

    A mask leaves something of each clip, of which the model makes the rest:
        predict          the first half of the frames is given
        backward         the last half
        interpolate      every fourth frame
        single-frame     one frame, any
        random-frames    some frames
        region           half of the picture, and a few whole frames at the ends
        first-frame      the first frame
        first-last       the first frame and the last
        unconditional    nothing; needs no --data

    Writes into the folder of --out:
        MASK.mp4, .gif    truth, given, generated and baseline (MP4 needs PyAV)
        MASK.png          their frames, and the errors as colours
        leadtime.png      how fast the prediction gets worse, for predict
        video.json        every number, settings, and what each policy did

    Args:
        model: A shipped model (digits, vizdoom), a folder, or owner/name on the Hugging Face hub.
        mask: What is given, one of those above. Repeat it for several; default: all but first-frame and
            first-last.
        data: A named set of clips (moving-digits, vizdoom), of which the test split is taken, or a folder of video
            files.
        option: Of the loader of --data, such as fps=10 or split=train. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        count: Clips, spread over the whole set. Default: one a seed; without --seeds 8, or all if there are fewer.
        frames: Of a clip. Default: the model's own.
        size: Of a frame: height and width, or one number for a square. Default: the model's own.
        seeds: One a clip: whole numbers, or ranges such as 0..7. Default: 0, 1, 2 ...
        features: Also measure in the features of EfficientNet-Lite0; of unconditional clips, from 400 on.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        out: Folder to write to.
    """
    network = load_maker(model, "clips")
    masks, numbers = masks_of(mask, data), clip_seeds(seeds, count)
    sampling = flags.make(numbers)
    shape = clip_shape(network, frames, size, masks)
    extractor = load_efficientnet_lite0() if features else None
    option = with_training_options(data, option, network)
    loading = options_of(data, option, max_bad)
    clips = None
    if data is not None:
        whole = load_held_out(data, (shape[2], shape[3]), shape[1], **loading)
        numbers = numbers if count is not None or seeds else numbers[: len(whole)]
        clips = spread(whole, len(numbers))
    sampling, count = sampling.changed(seeds=numbers), len(numbers)
    truth = None if clips is None else clips_of(clips, shape[0])
    given = {
        "mask": [kind.name for kind in masks],
        "data": data,
        "option": list(option),
        "count": count,
        "frames": shape[1],
        "size": shape[2:],
        "seeds": numbers,
        **flags.as_dict(sampling),
        "max_bad": max_bad,
    }
    scores, files = [], []
    with writable(out), progress() as advance:
        for kind in masks:
            done = score(
                network, kind, truth, shape, sampling=sampling, extractor=extractor, progress=advance
            )
            scores.append(done.scores)
            files.append(write(out, done, FPS if clips is None else clips.fps))
        command = ["ditkit", "video", model, *words_of(given), *(["--features"] if features else [])]
        described = {
            "command": shlex.join(command),
            "settings": {"model": model, **given, "features": features},
            "clips": None if clips is None else [clips.id(i) for i in range(count)],
            **VideoScores(tuple(scores)).as_dict(),
        }
        write_json(out / "video.json", described)
    tell(VideoScores(tuple(scores)), [*files, ["video.json"]], out)
    for line in remarks(masks, data, count, features):
        print(line)


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
    return tuple(map(mask_kind, names)) or (*(KINDS[name] for name in LEARNED if data), UNCONDITIONAL)


def clip_seeds(words: Sequence[str], count: int | None) -> tuple[int, ...]:
    """Return one seed a clip, by default of `COUNT` clips.

    Raises:
        ConfigError: words that are no seeds, or another number of them than clips.
    """
    if count is not None:
        integer("--count", count, least=1)
    seeds = seeds_of(words) if words else tuple(range(COUNT if count is None else count))
    if count is not None and len(seeds) != count:
        raise ConfigError(f"--seeds names {len(seeds)} seeds for --count={count}, expected one a clip")
    return seeds


def clip_shape(
    network: Denoiser, frames: int | None, size: tuple[int, ...], masks: Sequence[MaskKind]
) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a clip, by default the model's.

    Raises:
        ConfigError: numbers below 1, more than two sides, or a clip that a mask does not fit.
        ShapeError: the model's patches do not divide it.
    """
    channels, own, *sides = network.signal_shape
    frames = own if frames is None else integer("--frames", frames, least=1)
    height, width = frame_size(size if len(size) != 1 else size[0]) if size else sides
    shape = channels, frames, height, width
    network.layout(network.codec.latent_shape(shape))
    for kind in masks:
        kind(shape[1:], torch.Generator())
    return shape


def clips_of(clips: ClipSet, channels: int) -> Tensor:
    """All clips of a set, [B, C, T, H, W].

    Raises:
        ConfigError: it has other channels than the model's.
    """
    if clips.channels != channels:
        raise ConfigError(f"{clips.name} has {clips.channels} channels, the model draws {channels}")
    return clips.clips(torch.arange(len(clips)))


def write(out: Path, done: Completed, fps: float) -> list[str]:
    """The pictures of one kind of mask; the names of the files."""
    files = [*write_films(out, done, fps), write_strips(out, done)]
    plot = leadtime(done.scores) if done.kind.predicts else None
    if plot is None:
        return files
    with replacing(out / "leadtime.png") as draft:
        draft.write_bytes(plot.png())
    return [*files, "leadtime.png"]


def tell(scores: VideoScores, files: Sequence[Sequence[str]], out: Path) -> None:
    """The table if there are figures, the time, and where everything lies."""
    if scores.measured:
        Console().print(scores.table())
    seconds, clips = sum(m.seconds for m in scores.masks), sum(m.clips for m in scores.masks)
    print(f"{clips} clips in {seconds:.1f} s, {seconds / clips:.2f} s each")
    print(f"wrote {out}:", *(", ".join(names) for names in files), sep="\n  ")


def remarks(masks: Sequence[MaskKind], data: str | None, count: int, features: bool) -> Iterator[str]:
    """Say what is left out, and what it takes to have it."""
    if data is None:
        yield "no --data: nothing was given, so there is nothing to compare with"
    if data is not None and not accepts_option(data, "split"):
        yield f"{data} has no test split: what the model was trained on may be among the clips"
    if UNCONDITIONAL in masks and features and data is not None and count < CLIP_FEATURE.clips_needed:
        yield f"unconditional: a Frechet distance needs --count={CLIP_FEATURE.clips_needed} or more, got {count}"
    if find_spec("av") is None:
        yield "no MP4, which needs PyAV: pip install 'ditkit[video]'"
