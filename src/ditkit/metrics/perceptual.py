"""Distances in the features of EfficientNet-Lite0: between two frames, and between two sets of clips.

Neither is the number that papers print: LPIPS has learned weights over VGG or AlexNet, FVD has I3D. Ours
carry the name of what they measure, `FEATURE_DISTANCE` and `ClipFeature.name`, to be printed with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, ShapeError, unknown
from ditkit.metrics.distribution import frechet_distance, pictures_for_fid
from ditkit.metrics.features import STAGES, EfficientNetLite0, Progress, normalised

LAST_OF_STAGE = tuple(n - 1 for n in accumulate(stage.repeats for stage in STAGES))
WIDTHS = dict(zip(LAST_OF_STAGE, (stage.width for stage in STAGES), strict=True))
"""The last block of each stage, and its channels: 0: 16, 2: 24, 4: 40, 7: 80, 10: 112, 14: 192, 15: 320."""

COMPARED = (0, 2, 4, 10, 15)  # the last block at each of the five resolutions, 112 to 7, as LPIPS has of VGG
FEATURE_DISTANCE = f"{EfficientNetLite0.name} blocks.{'+'.join(map(str, COMPARED))} unit weights"
FRAMES_AT_ONCE = 16
TINY = 1e-10  # added to the norm of a position's channels


@torch.no_grad()
def feature_distance(network: EfficientNetLite0, x: Tensor, ref: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1 with all weights 1: pictures [B, 1 or 3, H, W] -> [B], 0 where equal.

    Squared difference of features whose channels are scaled to unit length at each position, averaged over
    positions and summed over the blocks `COMPARED`; at most 4 a block. Not LPIPS: name it `FEATURE_DISTANCE`.

    Raises ShapeError for unequal or other shapes, DataError for values that are not finite.
    """
    if x.shape != ref.shape:
        raise ShapeError(f"feature_distance: expected one shape, got {list(x.shape)} and {list(ref.shape)}")
    total = torch.zeros(len(x), device=_device(network))
    for a, b in zip(_activations(network, x, COMPARED), _activations(network, ref, COMPARED), strict=True):
        total += (_unit(a) - _unit(b)).square().sum(1).mean((1, 2))
    return total.cpu()


def frame_feature_distance(
    network: EfficientNetLite0, x: Tensor, ref: Tensor, *, progress: Progress | None = None
) -> Tensor:
    """`feature_distance` of every frame of clips: [B, 1 or 3, T, H, W] -> [B, T]. Raises as it does."""
    if x.shape != ref.shape or x.ndim != 5 or x.numel() == 0:
        raise ShapeError(
            f"frame_feature_distance: expected two clips [B, C, T, H, W] of one shape, got {list(x.shape)} "
            f"and {list(ref.shape)}"
        )
    frames, ref_frames = (clips.transpose(1, 2).flatten(0, 1) for clips in (x, ref))
    found = []
    for a, b in zip(frames.split(FRAMES_AT_ONCE), ref_frames.split(FRAMES_AT_ONCE), strict=True):
        found.append(feature_distance(network, a, b))
        if progress is not None:
            progress(min(len(found) * FRAMES_AT_ONCE, len(frames)), len(frames))
    return torch.cat(found).unflatten(0, (x.shape[0], x.shape[2]))


@dataclass(frozen=True)
class ClipDistance:
    """A Frechet distance over the feature `name`, and over each half of it: looks, and motion."""

    name: str
    n_real: int
    n_fake: int
    frechet: float
    looks: float
    motion: float


@dataclass(frozen=True)
class ClipFeature:
    """Appearance and motion of a clip as features: 2 C numbers from the C channels of one block.

    The first C: the mean over frames and positions. The last C: the mean over positions of |a_{t+1} - a_t|,
    averaged over pairs of frames. The difference is taken at each position, before the mean over positions,
    which an object that moves would leave nearly as it was.

    An early block is used for its few channels: 5 clips a number are needed, 400 with block 4. A position
    of block 4 sees 67 of the 224 pixels a side: edges and textures, not what the frame shows.

    Args:
        block: the last of a stage, 0 (16 channels, 160 clips), 2 (24, 240), 4 (40, 400), 7 (80, 800) ...

    Raises:
        ConfigError: there is no such block.
    """

    block: int = 4

    def __post_init__(self) -> None:
        if self.block not in WIDTHS:
            raise ConfigError(unknown("block", self.block, WIDTHS))

    @property
    def name(self) -> str:
        """To be printed with every number: "efficientnet-lite0 blocks.4 mean+motion:2x40"."""
        return f"{EfficientNetLite0.name} blocks.{self.block} mean+motion:2x{WIDTHS[self.block]}"

    @property
    def clips_needed(self) -> int:
        """The fewest clips in each set for which a distance is computed."""
        return pictures_for_fid(2 * WIDTHS[self.block])

    def check(self, n_real: int, n_fake: int) -> None:
        """Check the number of clips before they are made. Raises ConfigError for too few."""
        if min(n_real, n_fake) < self.clips_needed:
            raise ConfigError(
                f"Frechet distance over {self.name} needs {self.clips_needed} clips in each set, got {n_real} "
                f"real and {n_fake} generated; take more, or the feature of an earlier block"
            )

    def extract(
        self,
        network: EfficientNetLite0,
        clips: Iterable[Tensor] | Tensor,
        *,
        progress: Progress | None = None,
    ) -> Tensor:
        """Features [n, 2 C] on the CPU of clips [1 or 3, T, H, W] in [-1, 1], which need not share a size.

        Raises DataError if there is no clip or a value is not finite, ShapeError for clips of other shapes
        or fewer than 2 frames.
        """
        clips = list(clips)
        if not clips:
            raise DataError("clip features: got 0 clips, expected at least 1")
        found = []
        for done, clip in enumerate(clips, start=1):
            found.append(self._of(network, clip))
            if progress is not None:
                progress(done, len(clips))
        return torch.stack(found)

    def distance(self, real: Tensor, fake: Tensor) -> ClipDistance:
        """Frechet distance of two sets of features [n, 2 C]. Raises ConfigError for too few clips."""
        self.check(len(real), len(fake))
        width = WIDTHS[self.block]
        return ClipDistance(
            name=self.name,
            n_real=len(real),
            n_fake=len(fake),
            frechet=frechet_distance(real, fake),
            looks=frechet_distance(real[:, :width], fake[:, :width]),
            motion=frechet_distance(real[:, width:], fake[:, width:]),
        )

    @torch.no_grad()
    def _of(self, network: EfficientNetLite0, clip: Tensor) -> Tensor:
        if clip.ndim != 4 or clip.shape[1] < 2:
            raise ShapeError(
                f"clip features: expected clips [1 or 3, T, H, W] with T > 1, got {list(clip.shape)}"
            )
        parts = clip.transpose(0, 1).split(FRAMES_AT_ONCE)
        a = torch.cat([next(_activations(network, part, (self.block,))) for part in parts])  # [T, C, h, w]
        return torch.cat([a.mean((0, 2, 3)), a.diff(dim=0).abs().mean((0, 2, 3))]).cpu()


def _activations(network: EfficientNetLite0, pictures: Tensor, blocks: tuple[int, ...]) -> Iterator[Tensor]:
    """Compute outputs [B, C, h, w] of the `blocks`, in their order; no block after the last of them runs."""
    x = normalised(pictures.to(_device(network)))
    x = F.relu6(network._bn0(network._conv_stem(x)))
    for i, block in enumerate(network._blocks[: max(blocks) + 1]):
        x = block(x)
        if i in blocks:
            yield x


def _unit(x: Tensor) -> Tensor:
    """Channels of length 1 at each position of [B, C, h, w]."""
    return x / (x.norm(dim=1, keepdim=True) + TINY)


def _device(network: EfficientNetLite0) -> torch.device:
    return network._fc.weight.device
