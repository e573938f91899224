"""Masks: the part of a clip that is given, and the part to generate, as one video model learns (VDT, section 3.3).

A mask is bool [1, T, H, W] on the grid of the network's input, true where content is to be generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ditkit.core.config import Checked, Fraction
from ditkit.core.errors import ConfigError, unknown

Size = tuple[int, int, int]
"""Frames, height and width."""

SMALLEST, ASPECT = 4, 0.3
"""Cells of a block of `region`, and its narrowest shape (BEiT, algorithm 1)."""
TRIMMED = 3
"""Most frames at either end of a clip that `region` gives whole."""
HIDDEN = 0.8
"""Chance of a frame to be generated in `random-frames`."""


@dataclass(frozen=True)
class MaskKind:
    """Masks of one kind: which part of a clip is given.

    Args:
        gives: the part of a clip that is given, for a person.
        draw: from (T, H, W) and a CPU generator to the mask, bool [1, T, H, W].
        frames, cells: the fewest frames, and cells of a frame, of which it leaves some given and some to be generated.
        gives_nothing: whether all of a clip is generated.
        predicts: whether frames follow those that are given, so that their errors have a lead time.
    """

    name: str
    gives: str
    draw: Callable[[Size, Generator], Tensor]
    frames: int = 2
    cells: int = 1
    gives_nothing: bool = False
    predicts: bool = False

    def fits(self, size: Size) -> bool:
        return size[0] >= self.frames and size[1] * size[2] >= self.cells

    def __call__(self, size: Size, generator: Generator) -> Tensor:
        """Draw a mask of `size`.

        Raises:
            ConfigError: the clip is too short or too small for this task.
        """
        if not self.fits(size):
            T, H, W = size
            raise ConfigError(
                f"mask {self.name!r} needs {self.frames} frames of {self.cells} cells or more, got {T} of {H} x {W}"
            )
        return self.draw(size, generator)


def _frames(given: Callable[[int], Tensor | Sequence[int]]) -> Callable[[Size, Generator], Tensor]:
    """Make a kind that draws nothing and gives the frames `given(T)`."""

    def draw(size: Size, generator: Generator) -> Tensor:
        mask = torch.ones(1, *size, dtype=torch.bool)
        mask[:, given(size[0])] = False
        return mask

    return draw


def _single_frame(size: Size, generator: Generator) -> Tensor:
    frame = _integer(size[0], generator)
    return _frames(lambda T: [frame])(size, generator)


def _random_frames(size: Size, generator: Generator) -> Tensor:
    """Drawn again until a frame is given and one is to be generated: at 16 frames, once in 36 times."""
    hidden = torch.ones(size[0], dtype=torch.bool)
    while hidden.all() or not hidden.any():
        hidden = torch.rand(size[0], generator=generator) < HIDDEN
    return hidden[None, :, None, None].expand(1, *size).clone()


def _region(size: Size, generator: Generator) -> Tensor:
    """Blocks of half a frame's cells, in all frames but up to three at either end, which are given."""
    T = size[0]
    before = _integer(min(TRIMMED, T - 1) + 1, generator)
    after = _integer(min(TRIMMED, T - 1 - before) + 1, generator)
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, before : T - after] = _blocks(size[1], size[2], generator)
    return mask


def _blocks(H: int, W: int, generator: Generator) -> Tensor:
    """BEiT's blockwise mask: rectangles of random area and shape until half the cells are covered, or none fits."""
    mask, most = torch.zeros(H, W, dtype=torch.bool), H * W // 2
    while (left := most - int(mask.sum())) > 0:
        block = _block(mask, left, generator)
        if block is None:
            break
        mask[block] = True
    if not mask.any():  # a grid on which no rectangle fits
        mask.view(-1)[_integer(H * W, generator)] = True
    return mask


def _block(mask: Tensor, left: int, generator: Generator) -> tuple[slice, slice] | None:
    """One of ten tries that covers between 1 and `left` new cells."""
    H, W = mask.shape
    for _ in range(10):
        area = _uniform(min(SMALLEST, left), left, generator)
        aspect = math.exp(_uniform(math.log(ASPECT), -math.log(ASPECT), generator))
        h, w = max(round(math.sqrt(area * aspect)), 1), max(round(math.sqrt(area / aspect)), 1)
        if h >= H or w >= W:
            continue
        top, start = _integer(H - h + 1, generator), _integer(W - w + 1, generator)
        block = (slice(top, top + h), slice(start, start + w))
        if 0 < h * w - int(mask[block].sum()) <= left:
            return block
    return None


def _integer(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


UNCONDITIONAL = MaskKind("unconditional", "nothing", _frames(lambda T: []), frames=1, gives_nothing=True)
KINDS: Mapping[str, MaskKind] = {
    kind.name: kind
    for kind in (
        UNCONDITIONAL,
        MaskKind("predict", "the first half of the frames", _frames(lambda T: range(T // 2)), predicts=True),
        MaskKind("backward", "the last half", _frames(lambda T: range(T - T // 2, T))),
        MaskKind("interpolate", "every fourth frame", _frames(lambda T: range(0, T, 4))),
        MaskKind("single-frame", "one frame, any", _single_frame),
        MaskKind("random-frames", "some frames", _random_frames),
        MaskKind(
            "region", "half of the picture, and a few whole frames at the ends", _region, frames=1, cells=2
        ),
        MaskKind("first-frame", "the first frame", _frames(lambda T: [0])),
        MaskKind("first-last", "the first frame and the last", _frames(lambda T: [0, T - 1]), frames=3),
    )
}
"""Every kind by name; the last two are not among the paper's training tasks (image animation, and inbetweening)."""

PREDICT = KINDS["predict"]
LEARNED = ("predict", "backward", "interpolate", "single-frame", "random-frames", "region")
"""Kinds that a model is evaluated under by default, with `unconditional`."""

TEMPORAL = ("predict", "backward", "interpolate", "unconditional", "single-frame", "random-frames")
"""The paper's training tasks on whole frames."""


def mask_kind(name: str) -> MaskKind:
    """Return the task called `name`.

    Raises:
        ConfigError: there is none; the message quotes the nearest.
    """
    if name not in KINDS:
        raise ConfigError(unknown("mask", name, KINDS))
    return KINDS[name]


@dataclass(frozen=True)
class MaskMixture(Checked):
    """A task for each training sample: `region` with its chance, else one of `frames`, all alike (VDT's code).

    The code draws one mask a batch; here every sample has its own. Tasks that a clip is too short for are
    left out.

    Args:
        region: chance of the task "region". frames: names of the other tasks.
    """

    region: Fraction = 0.2
    frames: tuple[str, ...] = TEMPORAL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.frames and self.region < 1:
            raise ConfigError(f"MaskMixture: region={self.region} without other frames, expected 1")
        for name in self.frames:
            mask_kind(name)

    def kind(self, size: Size, generator: Generator) -> MaskKind:
        """Draw the next task.

        Raises:
            ConfigError: a clip of `size` is too short or small for all of them.
        """
        region = KINDS["region"]
        region_share = self.region if region.fits(size) else 0.0
        kinds = [KINDS[name] for name in self.frames if KINDS[name].fits(size)]
        if not kinds and not region_share:
            raise ConfigError(f"MaskMixture: clips of {size} (frames, height, width) fit none of its tasks")
        if not kinds or float(torch.rand((), generator=generator)) < region_share:
            return region
        return kinds[_integer(len(kinds), generator)]

    def masks(self, size: Size, generators: Sequence[Generator]) -> Tensor:
        """One mask a generator, bool [B, 1, T, H, W], whatever else is in the batch."""
        return torch.stack([self.kind(size, g)(size, g) for g in generators])
