"""An image set in memory: what every loader returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, unknown


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square images with their labels and captions, all in memory.

    A set without classes (captions only) has `classes == ()` and every label 0, which is the index of the
    null class of a model with no classes.
    """

    name: str
    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    classes: tuple[str, ...]
    captions: tuple[str, ...]
    ids: tuple[str, ...]  # file name or Unicode code points, unique within the set

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"{self.name}: images are {self.images.dtype} {list(self.images.shape)}, "
                f"expected torch.uint8 [N, C, H, W]"
            )
        counts = {
            "images": len(self.images),
            "labels": len(self.labels),
            "captions": len(self.captions),
            "ids": len(self.ids),
        }
        if len(set(counts.values())) != 1:
            raise DataError(f"{self.name}: lengths differ: {counts}")
        highest = max(len(self.classes), 1) - 1
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) <= highest:
            raise DataError(
                f"{self.name}: labels span {int(self.labels.min())}..{int(self.labels.max())}, "
                f"expected 0..{highest} for {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def images_float(self, index: Tensor | Sequence[int] | slice = slice(None)) -> Tensor:
        """Return the chosen images as float32 [n, C, H, W] in [-1, 1]."""
        chosen = index if isinstance(index, slice | Tensor) else torch.tensor(index, dtype=torch.int64)
        return self.images[chosen].float() / 127.5 - 1

    def label(self, class_name: str) -> int:
        """Index of a class by its name. Raises `ConfigError` for an unknown one."""
        if class_name not in self.classes:
            raise ConfigError(unknown(f"class of {self.name}", class_name, self.classes))
        return self.classes.index(class_name)

    def subset(self, index: Sequence[int]) -> ImageSet:
        """Select images, in that order, with the same classes."""
        chosen = torch.tensor(index, dtype=torch.int64)
        return ImageSet(
            name=self.name,
            images=self.images[chosen],
            labels=self.labels[chosen],
            classes=self.classes,
            captions=tuple(self.captions[i] for i in index),
            ids=tuple(self.ids[i] for i in index),
        )
