"""Clips: one network that makes what a mask leaves out, whatever that is (VDT, arXiv 2305.13311, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.checkpoint import replacing
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.labels import class_names
from ditkit.core.model import Denoiser, Model
from ditkit.data.clips import ClipSet, LabelledClips, class_labels
from ditkit.data.loading import load_clips
from ditkit.report.sheet import png
from ditkit.report.strips import strip
from ditkit.sample.noise import distinct
from ditkit.tasks.denoiser import DenoiserRecipe
from ditkit.tasks.video.masks import KINDS, MaskKind, MaskMixture
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.randomness import SampleRNG

EVERY_MASK = MaskMixture()
SHEET_KINDS, SHEET_STEPS = ("predict", "backward", "interpolate", "region", "unconditional"), 25


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(DenoiserRecipe):
    """A network that makes clips, or the missing part of them.

    Args:
        data: a named set of clips, or a folder of video files. options: of its loader, beside size and frames.
        model: its channels are taken from the data; of clips with labels, its classes and their names too.
        masks: what of a training clip is given and what is to be made.
    """

    sources: ClassVar[str] = "A named set of clips (moving-digits, vizdoom), or a folder of video files."
    task: ClassVar[str] = "video"
    masks: MaskMixture = EVERY_MASK

    def read(self) -> ClipSet:
        return load_clips(self.data, self.model.size, frames=self.model.frames, **self.loading)

    def signal_shape(self, data: ClipSet) -> tuple[int, ...]:
        return (data.channels, data.frames, *data.size)

    def decided(self, data: ClipSet) -> Mapping[str, Any]:
        return self._classes(data)

    def dataset(self, data: ClipSet) -> TrainingSet:
        return MaskedClipDataset(data, self.masks)

    def _classes(self, clips: ClipSet) -> dict[str, Any]:
        """Return the model's fields on classes, as clips with labels decide them.

        Raises:
            ConfigError: the network takes classes, and the clips have none.
        """
        names = clips.classes if isinstance(clips, LabelledClips) else ()
        if not names and self.model.classes > 1:  # a VDT of one class takes no labels
            raise ConfigError(
                f"{self.data}: its clips have no labels, the network has {self.model.classes} classes; "
                "try: --option labels=true"
            )
        return {"classes": len(names), "class_names": names} if names else {}

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, MaskedClipDataset)
        clips, (height, width) = samples.clips, samples.clips.size
        return f"{len(clips)} clips [{clips.channels}, {clips.frames}, {height}, {width}] at {clips.fps:g} frames/s"

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, MaskedClipDataset)
        first = torch.tensor([0])
        return partial(write_strips, folder, samples.clips.clips(first), label=samples.label(first))


class MaskedClipDataset:
    """Clips as training samples, each with a mask of its own, and with its class where they have one."""

    def __init__(self, clips: ClipSet, masks: MaskMixture) -> None:
        self.clips, self.masks = clips, masks

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        clips = self.clips.clips(indices)
        size = clips.shape[2], clips.shape[3], clips.shape[4]
        mask = self.masks.masks(size, list(rng.of_data()))
        return clips, Cond(label=self.label(indices), context=clips, mask=mask)

    def label(self, indices: Tensor) -> Tensor | None:
        """Return the class of each chosen clip, int64 [n]; None where they have none."""
        labelled = isinstance(self.clips, LabelledClips) and self.clips.classes
        return class_labels(self.clips, indices) if labelled else None


def labels_for(model: Model, clips: ClipSet) -> Tensor | None:
    """Return the class of each clip of a set, int64 [n], for a model of the same classes; None for any other."""
    if not isinstance(clips, LabelledClips) or not clips.classes or clips.classes != class_names(model):
        return None
    return clips.class_labels(torch.arange(len(clips)))


def conditioned(clips: Tensor, kind: MaskKind, seeds: Sequence[int], label: Tensor | None = None) -> Cond:
    """Give of clips [B, C, T, H, W] what masks of this kind leave, drawn by one seed a clip, and `label` [B].

    Raises:
        ConfigError: a clip too short for it, or not one distinct seed a clip.
    """
    size = clips.shape[2], clips.shape[3], clips.shape[4]
    generators = [torch.Generator().manual_seed(seed) for seed in distinct(seeds)]
    return Cond(label=label, context=clips, mask=torch.stack([kind(size, g) for g in generators]))


def write_strips(
    folder: Path, clip: Tensor, model: Denoiser, step: int, *, label: Tensor | None = None
) -> None:
    """Write one clip [1, C, T, H, W] as the model completes it under the masks that fit it, as `folder`/STEP.png."""
    rows, masks = {"the clip": clip[0]}, {}
    size = clip.shape[2], clip.shape[3], clip.shape[4]
    for kind in (KINDS[name] for name in SHEET_KINDS if KINDS[name].fits(size)):
        cond = conditioned(clip, kind, [0], label)
        assert cond.mask is not None
        masks[kind.name] = cond.mask[0]
        rows[kind.name] = generate(
            model,
            cond=Cond(label=label) if kind.gives_nothing else cond,
            shape=clip.shape[1:],
            steps=SHEET_STEPS,
            guidance=1.0,
            policies=model.policies,
        ).samples[0]
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{step:06d}.png") as draft:
        draft.write_bytes(png(strip(rows, masks=masks)))
