"""Train the judge of pictures: a classifier of Fashion-MNIST, for class accuracy and distances in its features.

python benchmarks/donors/train_judge.py

Writes benchmarks/donors/judge/: config.json, model.safetensors, training.json. 18 TMAC.
"""

from __future__ import annotations

import torch
import tyro
from supervised import HERE, accuracy, cross_entropy, keep, train_on_fashion

from ditkit.data.sets.fashion import CLASSES
from ditkit.nn.classifier import PictureClassifier, PictureClassifierConfig


def main(epochs: float = 3.0, precision: str = "bf16") -> None:
    """Train, measure on the test split, and keep.

    Args:
        epochs: passes over the 60,000 pictures. precision: bf16 or float32.
    """
    torch.manual_seed(0)
    judge = PictureClassifier(PictureClassifierConfig(classes=len(CLASSES), class_names=CLASSES))
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third less time on a CPU
    facts = train_on_fashion(judge, cross_entropy(judge), epochs=epochs, precision=precision)
    keep(judge, HERE / "judge", {**facts, **accuracy(judge)})


if __name__ == "__main__":
    tyro.cli(main)
