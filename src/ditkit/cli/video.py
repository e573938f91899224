"""`ditkit video`: clips from a model, or what is missing of them, as films and scores."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ditkit.cli.evaluate import flags
from ditkit.cli.guiding import GUIDED, GuidingFlags
from ditkit.cli.options import (
    DataName,
    ModelName,
    Number,
    Options,
    Policies,
    load_maker,
    options_of,
    policies_of,
    progress,
    seeds_of,
    solver_of,
    with_training_options,
    writable,
)
from ditkit.core.checkpoint import replacing, write_json
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.spec import spec
from ditkit.data.clips import ClipSet, frame_size, spread
from ditkit.data.loading import accepts_option, load_held_out
from ditkit.metrics.features import load_efficientnet_lite0
from ditkit.sample import Guidance
from ditkit.tasks.video.figures import leadtime, write_films, write_strips
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.recipe import labels_for
from ditkit.tasks.video.scores import (
    CLIP_FEATURE,
    UNCONDITIONAL,
    Completed,
    VideoScores,
    complete,
    imagine,
)

Masks = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="MASK")]
Sides = Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")]
OwnSeeds = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SEED ...]")]

TOLD = ("predict", "backward", "interpolate", "single-frame", "random-frames", "region")
"""Masks that are drawn unless others are asked for; `unconditional` as well."""
COUNT = 8
"""Clips unless others are asked for."""
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
    steps: int = 50,
    guiding: GuidingFlags = GUIDED,
    policy: Policies = (),
    solver: str = "euler",
    features: bool = False,
    batch_size: int = 8,
    max_bytes: Number = None,
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
        MASK.mp4, .gif    truth, given, made and baseline (MP4 needs PyAV)
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
        seeds: Of what is made, one a clip: whole numbers, or ranges such as 0..7. Default: 0, 1, 2 ...
        steps: Steps of the solver.
        policy: What makes it faster, such as taylorseer:interval=4,order=2. Repeat it for several at once.
        solver: From noise to clip: euler, heun, ddim, ancestral, eulermaruyama.
        features: Also measure in the features of EfficientNet-Lite0; of unconditional clips, from 400 on.
        batch_size: Clips drawn at once.
        max_bytes: Memory that the policies may hold; more is refused.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        out: Folder to write to.
    """
    network = load_maker(model, "clips")
    masks, numbers = masks_of(mask, data), clip_seeds(seeds, count)
    policies, way, guidance = policies_of(policy), solver_of(solver), guiding.make()
    shape = clip_shape(network, frames, size, masks)
    extractor = load_efficientnet_lite0() if features else None
    option = with_training_options(data, option, network)
    loading = options_of(data, option, max_bad)
    clips = None
    if data is not None:
        whole = load_held_out(data, (shape[2], shape[3]), shape[1], **loading)
        numbers = numbers if count is not None or seeds else numbers[: len(whole)]
        clips = spread(whole, len(numbers))
    count = len(numbers)
    truth = None if clips is None else clips_of(clips, shape[0])
    label = None if clips is None else labels_for(network, clips)
    given = {
        "mask": list(masks),
        "data": data,
        "option": list(option),
        "count": count,
        "frames": shape[1],
        "size": shape[2:],
        "seeds": numbers,
        "steps": steps,
        **asdict(guiding),
        "policies": list(map(spec, policies)),
        "solver": spec(way),
        "batch_size": batch_size,
        "max_bytes": max_bytes,
        "max_bad": max_bad,
    }
    options: dict[str, Any] = {"steps": steps, "solver": way, "policies": policies}
    options |= {"batch_size": batch_size, "max_bytes": max_bytes, "network": extractor}
    scores, files = [], []
    with writable(out), progress() as advance:
        for name in masks:
            done = made(network, name, truth, shape, numbers, guidance, label, progress=advance, **options)
            scores.append(done.scores)
            files.append(write(out, done, FPS if clips is None else clips.fps))
        command = ["ditkit", "video", model, *flags(given), *(["--features"] if features else [])]
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


def masks_of(names: Sequence[str], data: str | None) -> tuple[str, ...]:
    """The masks to draw; without data, of those that are drawn by default the one that needs none.

    Raises:
        ConfigError: an unknown one, one named twice, or one that needs data without any.
    """
    for i, name in enumerate(names):
        mask_kind(name)
        if name in names[:i]:
            raise ConfigError(f"--mask {name} is given twice, expected each mask once")
        if name != UNCONDITIONAL and data is None:
            raise ConfigError(
                f"--mask {name} needs clips: expected --data moving-digits, or a folder of video files"
            )
    return tuple(names) or (*(TOLD if data else ()), UNCONDITIONAL)


def clip_seeds(words: Sequence[str], count: int | None) -> tuple[int, ...]:
    """One seed a clip; unless told otherwise `COUNT` of them.

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
    network: Denoiser, frames: int | None, size: tuple[int, ...], masks: Sequence[str]
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
    for name in masks:
        mask_kind(name)(shape[1:], torch.Generator())
    return shape


def clips_of(clips: ClipSet, channels: int) -> Tensor:
    """All clips of a set, [B, C, T, H, W].

    Raises:
        ConfigError: it has other channels than the model's.
    """
    if clips.channels != channels:
        raise ConfigError(f"{clips.name} has {clips.channels} channels, the model makes {channels}")
    return clips.clips(torch.arange(len(clips)))


def made(
    model: Denoiser,
    mask: str,
    truth: Tensor | None,
    shape: Sequence[int],
    seeds: Sequence[int],
    guidance: Guidance,
    label: Tensor | None,
    **options: Any,
) -> Completed:
    """What the model makes under one kind of mask, by the classes `label` [n] of the clips if they have any.

    Where nothing is given, only a class or a guide can guide.
    """
    known: dict[str, Any] = {} if label is None else {"label": label.tolist()}
    if mask == UNCONDITIONAL:
        own = guidance if guidance.networks() or known else 1.0
        return imagine(model, shape, seeds, real=truth, guidance=own, **known, **options)
    assert truth is not None  # `masks_of` has refused the others
    return complete(model, truth, mask, seeds, guidance=guidance, **known, **options)


def write(out: Path, done: Completed, fps: float) -> list[str]:
    """The pictures of one kind of mask; the names of the files."""
    files = [*write_films(out, done, fps), write_strips(out, done)]
    plot = leadtime(done.scores) if done.scores.mask == "predict" else None
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


def remarks(masks: Sequence[str], data: str | None, count: int, features: bool) -> Iterator[str]:
    """What was left out, and what it takes to have it."""
    if data is None:
        yield "no --data: nothing was given, so there is nothing to compare with"
    if data is not None and not accepts_option(data, "split"):
        yield f"{data} has no test split: what the model was trained on may be among the clips"
    if UNCONDITIONAL in masks and features and data is not None and count < CLIP_FEATURE.clips_needed:
        yield f"unconditional: a Frechet distance needs --count={CLIP_FEATURE.clips_needed} or more, got {count}"
    if find_spec("av") is None:
        yield "no MP4, which needs PyAV: pip install 'ditkit[video]'"
