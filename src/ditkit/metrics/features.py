"""Features of sets of pictures, from the named extractor: EfficientNet-Lite0 (`ditkit.nn.efficientnet`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ditkit.core.errors import DataError
from ditkit.nn.efficientnet import (
    HEAD_TAP,
    POOLED_TAP,
    STAGES,
    TAPS,
    WEIGHTS_REQUIREMENT,
    EfficientNetLite0,
    load_efficientnet_lite0,
    normalised,
)

__all__ = [
    "HEAD_TAP",
    "POOLED_TAP",
    "STAGES",
    "TAPS",
    "WEIGHTS_REQUIREMENT",
    "EfficientNetLite0",
    "extract",
    "load_efficientnet_lite0",
    "normalised",
]

Progress = Callable[[int, int], None]  # (images done, images in all)


def extract(
    network: EfficientNetLite0,
    images: Iterable[Tensor] | Tensor,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Features on the CPU, "blocks.14" [n, 192] and "head" [n, 1280], of pictures [n, C, H, W] in [-1, 1].

    An iterable of single pictures [C, H, W] need not share a size. Raises DataError if there is no picture.
    """
    pictures = list(images)
    if not pictures:
        raise DataError("features: got 0 pictures, expected at least 1")
    device = network._fc.weight.device
    parts: dict[str, list[Tensor]] = {tap: [] for tap in TAPS}
    for start in range(0, len(pictures), batch):
        chunk = [normalised(p.unsqueeze(0).to(device)) for p in pictures[start : start + batch]]
        with torch.no_grad():
            for tap, value in network.taps(torch.cat(chunk)).items():
                parts[tap].append(value.cpu())
        if progress is not None:
            progress(min(start + batch, len(pictures)), len(pictures))
    return {tap: torch.cat(values) for tap, values in parts.items()}
