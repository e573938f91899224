"""Train the teacher of alignment: a ViT of 8 x 8 tokens that tells garments apart and puts patches in their place.

python benchmarks/donors/train_teacher.py

Writes benchmarks/donors/vit/: config.json, model.safetensors, training.json. 37 TMAC.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import tyro
from supervised import HERE, SIZE_PX, accuracy, cross_entropy, keep, train_on_fashion
from torch import Tensor

from ditkit.data.sets.fashion import CLASSES, load
from ditkit.nn.vit import ViT, ViTConfig


def main(epochs: float = 2.0, jigsaw: float = 0.2, precision: str = "bf16") -> None:
    """Train, measure on the test split, and keep.

    Args:
        epochs: passes over the 60,000 pictures. precision: bf16 or float32.
        jigsaw: weight of the places of half of each picture's patches beside its class.
    """
    torch.manual_seed(0)
    teacher = ViT(ViTConfig(classes=len(CLASSES), class_names=CLASSES))
    of_class = cross_entropy(teacher)

    def loss(x: Tensor, label: Tensor) -> Tensor:
        return of_class(x, label) + jigsaw * of_places(teacher, x)

    facts = train_on_fashion(teacher, loss, epochs=epochs, learning_rate=1e-3, precision=precision)
    keep(teacher, HERE / "vit", {**facts, "jigsaw": jigsaw, **accuracy(teacher), **placed(teacher)})


def of_places(teacher: ViT, x: Tensor) -> Tensor:
    """Cross-entropy of the places of half of the patches, drawn anew for each picture (Jigsaw-ViT, section 3)."""
    kept = torch.rand(len(x), teacher.config.tokens).argsort(1)[:, : teacher.config.tokens // 2]
    return F.cross_entropy(teacher.places(x, kept).float().flatten(0, 1), kept.flatten())


@torch.no_grad()
def placed(teacher: ViT, count: int = 1000) -> dict[str, float]:
    """Share of half of the patches of test pictures that are put in their place; of patches that are not black, too."""
    x = load(SIZE_PX, split="test").images_float(slice(count))
    kept = torch.rand(count, teacher.config.tokens).argsort(1)[:, : teacher.config.tokens // 2]
    hits = (teacher.eval().places(x, kept).argmax(-1) == kept).double()
    lit = (teacher.patches(x) > -1).any(-1).gather(1, kept)
    return {"places": round(hits.mean().item(), 4), "places_not_black": round(hits[lit].mean().item(), 4)}


if __name__ == "__main__":
    tyro.cli(main)
