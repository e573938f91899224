"""Small pictures that several experiments learn: Fashion-MNIST at 16 x 16 pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.data.loading import load_images
from ditkit.train.randomness import SampleRNG

SIZE, CLASSES = 16, 10


class Garments:
    """Grey garments in [-1, 1], [1, 16, 16]: means of 2 x 2 pixels of the padded pictures.

    Args:
        split: train, or test for held-out pictures.
    """

    def __init__(self, split: str) -> None:
        self.images = load_images("fashion", 2 * SIZE, split=split)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, rng: SampleRNG | None = None) -> tuple[Tensor, Cond]:
        pictures = F.avg_pool2d(self.images.images_float(indices), 2)
        return pictures, Cond(label=self.images.labels[indices])
