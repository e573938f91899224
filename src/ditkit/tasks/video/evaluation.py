"""Evaluation of clip models: held-out clips under several kinds of masks, their scores, films and strips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.config import MOST_SAMPLES, MOST_STEPS, integer
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.task import Evaluation, Progress
from ditkit.data.clips import ClipSet, Subset, frame_size, spread
from ditkit.data.loading import accepts_option, load_held_out
from ditkit.metrics.features import load_efficientnet_lite0
from ditkit.sample import Sampling
from ditkit.tasks.video.figures import leadtime, write_films, write_strips
from ditkit.tasks.video.masks import KINDS, LEARNED, UNCONDITIONAL, MaskKind
from ditkit.tasks.video.recipe import labels_for
from ditkit.tasks.video.scores import CLIP_FEATURE, Completed, VideoScores, score
from ditkit.tasks.video.task import FPS

if TYPE_CHECKING:
    from ditkit.core.terminal import Table

COUNT = 8
"""Clips by default."""


@dataclass(frozen=True, eq=False)
class VideoEvaluation(Evaluation):
    """The first clips under each kind of mask with the scores of all, and the held-out clips, if any."""

    completed: tuple[Completed, ...]
    clips: ClipSet | None
    data: str | None
    features: bool
    seeds: tuple[int, ...]
    shape: tuple[int, int, int, int]

    @property
    def scores(self) -> VideoScores:
        """The scores of all kinds of masks."""
        return VideoScores(tuple(done.scores for done in self.completed))

    def as_dict(self) -> dict[str, Any]:
        clips = self.clips
        ids = None if clips is None else [clips.id(i) for i in range(len(clips))]
        return {"clips": ids, **self.scores.as_dict()}

    def table(self) -> Table | None:
        return self.scores.table() if self.scores.measured else None

    def save(self, folder: Path) -> list[list[str]]:
        return [[], *(self._save(folder, done) for done in self.completed)]

    def remarks(self) -> Iterator[str]:
        """Say what is left out, and what it takes to have it."""
        scores = self.scores.masks
        seconds, clips = sum(one.seconds for one in scores), sum(one.clips for one in scores)
        yield f"{clips} clips in {seconds:.1f} s, {seconds / clips:.2f} s each"
        if self.data is None:
            yield "no --data: nothing was given, so there is nothing to compare with"
        elif not accepts_option(self.data, "split"):
            yield f"{self.data} has no test split: clips of the training may be among them"
        if self.features and self.data is not None:
            for done in self.completed:
                if done.kind.gives_nothing and len(self.seeds) < CLIP_FEATURE.clips_needed:
                    needed = f"needs --count={CLIP_FEATURE.clips_needed} or more, got {len(self.seeds)}"
                    yield f"{done.kind.name}: a Frechet distance {needed}"
        if find_spec("av") is None:
            yield "no MP4, which needs PyAV: pip install 'ditkit[video]'"

    def _save(self, folder: Path, done: Completed) -> list[str]:
        files = [*write_films(folder, done, FPS if self.clips is None else self.clips.fps)]
        files.append(write_strips(folder, done))
        plot = leadtime(done.scores) if done.kind.predicts else None
        if plot is None:
            return files
        with replacing(folder / "leadtime.png") as draft:
            draft.write_bytes(plot.png())
        return [*files, "leadtime.png"]


def evaluate_clips(
    model: Denoiser,
    data: str | None,
    *,
    sampling: Sampling,
    options: Mapping[str, Any],
    masks: Sequence[MaskKind] | None = None,
    count: int | None = None,
    frames: int | None = None,
    size: Sequence[int] = (),
    features: bool = False,
    progress: Progress | None = None,
) -> VideoEvaluation:
    """Generate clips under each kind of mask, and measure them on held-out clips.

    Args:
        data: None for masks that give nothing.
        sampling: with a seed for each clip.
        options: of the data's loader.
        masks: kinds of masks; None for those that VDT learns.
        count: clips; None for one a seed, with seeds 0 to 7 or one for each clip of the data if they are fewer,
            where `sampling` has the one seed of its default.
        frames, size: of a clip, by default the model's.
        features: also measure in the features of EfficientNet-Lite0.

    Raises:
        ConfigError: numbers out of range, a clip that a mask or the model does not fit, or data that hold fewer clips.
        DataError: the data, or the extractor's weights, are missing or damaged.
    """
    kinds = default_masks(data) if masks is None else tuple(masks)
    shape = clip_shape(model, frames, size, kinds)
    own = sampling.seeds == Sampling().seeds
    if own or count is not None:
        sampling = with_seeds(sampling, COUNT if count is None else count)
    extractor = load_efficientnet_lite0() if features else None
    clips, truth, label = None, None, None
    if data is not None:
        whole = load_held_out(data, (shape[2], shape[3]), shape[1], **options)
        if own and count is None:
            sampling = sampling.changed(seeds=sampling.seeds[: len(whole)])
        clips = spread(whole, len(sampling.seeds))
        truth, label = clips_of(clips, shape[0]), labels_for(model, clips)
    done = (
        score(
            model,
            kind,
            truth,
            shape,
            label=label,
            sampling=sampling,
            extractor=extractor,
            progress=progress,
        )
        for kind in kinds
    )
    return VideoEvaluation(
        tuple(one.first(COUNT) for one in done), clips, data, features, sampling.seeds, shape
    )


def default_masks(data: str | None) -> tuple[MaskKind, ...]:
    """Return the kinds of masks that VDT learns; without data, the one that gives nothing."""
    return (*(KINDS[name] for name in LEARNED if data is not None), UNCONDITIONAL)


def with_seeds(sampling: Sampling, count: int) -> Sampling:
    """Return the settings with seeds 0 to `count` - 1, where they have another number of seeds."""
    integer("--count", count, least=1, most=MOST_SAMPLES)
    return sampling if len(sampling.seeds) == count else sampling.changed(seeds=range(count))


def clip_shape(
    model: Denoiser, frames: int | None, size: Sequence[int], kinds: Sequence[MaskKind]
) -> tuple[int, int, int, int]:
    """Return (C, T, H, W) of a clip, by default the model's.

    Raises:
        ConfigError: numbers below 1, more than two sides, or a clip that a mask does not fit.
        ShapeError: the model's patches do not divide it.
    """
    channels, own, *sides = model.signal_shape
    frames = own if frames is None else integer("--frames", frames, least=1, most=MOST_STEPS)
    given = tuple(size)
    height, width = frame_size(given if len(given) != 1 else given[0]) if given else sides
    shape = channels, frames, height, width
    model.layout(model.codec.latent_shape(shape))
    for kind in kinds:
        kind(shape[1:], torch.Generator())
    return shape


def held_out(model: Denoiser, data: str, count: int, **options: Any) -> Subset:
    """Load `count` clips spread evenly over the set, of the length and size that the model draws.

    Raises:
        ConfigError: the set has other channels, or fewer clips. Those of the loader.
    """
    channels, frames, height, width = model.signal_shape
    whole = load_held_out(data, (height, width), frames, **options)
    if len(whole) < count:
        raise ConfigError(
            f"{data} has {len(whole)} clips of {frames} frames for {count} seeds, try: --seeds 0..{len(whole) - 1}"
        )
    clips = spread(whole, count)
    if clips.channels != channels:
        raise ConfigError(f"{data} has {clips.channels} channels, the model draws {channels}")
    return clips


def clips_of(clips: ClipSet, channels: int) -> Tensor:
    """Return all clips of a set, [B, C, T, H, W].

    Raises:
        ConfigError: it has other channels than the model's.
    """
    if clips.channels != channels:
        raise ConfigError(f"{clips.name} has {clips.channels} channels, the model draws {channels}")
    return clips.clips(torch.arange(len(clips)))
