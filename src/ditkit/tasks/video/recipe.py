"""Clips: one network that makes what a mask leaves out, whatever that is (VDT, arXiv 2305.13311, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.checkpoint import replacing
from ditkit.core.cond import Cond
from ditkit.core.model import Denoiser, Model
from ditkit.data.clips import ClipSet
from ditkit.data.loading import load_clips
from ditkit.models.vdt import VDTConfig
from ditkit.models.video_dit import VideoDiTConfig
from ditkit.report.sheet import png
from ditkit.report.strips import strip
from ditkit.sample.noise import distinct
from ditkit.tasks.latent import coded, load_codec
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.tasks.video.masks import KINDS, MaskKind, MaskMixture
from ditkit.train.denoising import Denoising
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG

FLOW_MATCHING = Denoising()
EVERY_MASK = MaskMixture()
SHEET_KINDS, SHEET_STEPS = ("predict", "backward", "interpolate", "region", "unconditional"), 25


@dataclass(frozen=True)
class VideoNetwork:
    """What of a VDT does not follow from the data.

    Args:
        frames: Of a clip.
        size: Height and width of a frame.
        patch: Side of a token.
        width: Of a token's vector.
        depth: Number of blocks.
        heads: Of attention.
    """

    frames: int
    size: int
    patch: int
    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class FullVideoNetwork:
    """What of a video DiT does not follow from the data.

    Args:
        frames: Of a clip.
        size: Height and width of a frame.
        patch: Frames, height and width of a token.
        width: Of a token's vector.
        depth: Number of blocks.
        heads: Of attention.
    """

    frames: int
    size: int
    patch: tuple[int, int, int]
    width: int
    depth: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(Recipe):
    """A network that makes clips, or the missing part of them.

    Args:
        data: a named set of clips, or a folder of video files. options: of its loader, beside size and frames.
        model: its channels are taken from the data.
        masks: what of a training clip is given and what is to be made.
    """

    sources: ClassVar[str] = "A named set of clips (moving-digits, vizdoom), or a folder of video files."
    task: ClassVar[str] = "video"
    latent: ClassVar[bool] = True
    Network: ClassVar[type] = VideoNetwork
    model: VDTConfig | VideoDiTConfig
    objective: Objective = FLOW_MATCHING
    masks: MaskMixture = EVERY_MASK

    def prepared(self) -> Prepared:
        codec = load_codec(self.codec)
        clips = load_clips(self.data, self.model.size, frames=self.model.frames, **self.loading)
        channels, _, *size = codec.latent_shape((clips.channels, clips.frames, *clips.size))
        model = replace(self.model, channels=channels, size=(size[0], size[1]))
        return Prepared(replace(self, model=model), coded(MaskedClipDataset(clips, self.masks), codec), codec)

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, MaskedClipDataset)
        clips, (height, width) = samples.clips, samples.clips.size
        return f"{len(clips)} clips [{clips.channels}, {clips.frames}, {height}, {width}] at {clips.fps:g} frames/s"

    def example(self, model: Model) -> tuple[Any, ...]:
        return torch.empty(1, *model.sample_shape), torch.empty(1), Cond()

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, MaskedClipDataset)
        return partial(write_strips, folder, samples.clips.clips(torch.tensor([0])))


@dataclass(frozen=True, kw_only=True)
class FullVideoRecipe(VideoRecipe):
    """The same for a video DiT, whose tokens may span several frames."""

    Network: ClassVar[type] = FullVideoNetwork


class MaskedClipDataset:
    """Clips as training samples, each with a mask of its own."""

    def __init__(self, clips: ClipSet, masks: MaskMixture) -> None:
        self.clips, self.masks = clips, masks

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        clips = self.clips.clips(indices)
        size = clips.shape[2], clips.shape[3], clips.shape[4]
        return clips, Cond(context=clips, mask=self.masks.masks(size, list(rng.of_data())))


def conditioned(clips: Tensor, kind: MaskKind, seeds: Sequence[int]) -> Cond:
    """Give of clips [B, C, T, H, W] what masks of this kind leave, drawn by one seed a clip.

    Raises:
        ConfigError: a clip too short for it, or not one distinct seed a clip.
    """
    size = clips.shape[2], clips.shape[3], clips.shape[4]
    generators = [torch.Generator().manual_seed(seed) for seed in distinct(seeds)]
    return Cond(context=clips, mask=torch.stack([kind(size, g) for g in generators]))


def write_strips(folder: Path, clip: Tensor, model: Denoiser, step: int) -> None:
    """Write one clip [1, C, T, H, W] as the model completes it under the masks that fit it, as `folder`/STEP.png."""
    rows, masks = {"the clip": clip[0]}, {}
    size = clip.shape[2], clip.shape[3], clip.shape[4]
    for kind in (KINDS[name] for name in SHEET_KINDS if KINDS[name].fits(size)):
        cond = conditioned(clip, kind, [0])
        assert cond.mask is not None
        masks[kind.name] = cond.mask[0]
        rows[kind.name] = generate(
            model,
            cond=Cond() if kind.gives_nothing else cond,
            shape=clip.shape[1:],
            steps=SHEET_STEPS,
            guidance=1.0,
            policies=model.policies,
        ).samples[0]
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{step:06d}.png") as draft:
        draft.write_bytes(png(strip(rows, masks=masks)))
