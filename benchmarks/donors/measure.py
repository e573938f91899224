"""Judge a donor of pictures: how many of its garments the judge puts in the class that was asked for.

    python benchmarks/donors/measure.py fashion-dit
    python benchmarks/donors/measure.py benchmarks/donors/fashion-dit/75 --out outputs/early

Writes measured.json into benchmarks/donors/MODEL/, from where `publish.py` takes it into the card. The Frechet
distance in the judge's features is measured from 2,000 pictures on; below that it says more of the number than of the
model.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import torch
import tyro
from supervised import HERE, SIZE_PX
from torch import Tensor

import ditkit
from ditkit.data.sets.fashion import load
from ditkit.metrics.distribution import frechet_distance
from ditkit.nn.classifier import PictureClassifier
from ditkit.nn.frozen import load_network

ENOUGH = 2_000


def main(
    model: tyro.conf.Positional[str],
    count: int = 200,
    steps: int = 50,
    guidance: float = 2.0,
    out: Path | None = None,
) -> None:
    """Draw by DDIM, classes in turn, seeds 0, 1, 2 ..., and judge.

    Args:
        model: a shipped model, or a folder. count: pictures. out: folder of measured.json.
    """
    network, judge = ditkit.load(model), load_network(PictureClassifier, HERE / "judge")
    label = [i % network.config.classes for i in range(count)]
    drawn = ditkit.generate(
        network, label, range(count), steps=steps, guidance=guidance, solver="ddim", batch_size=20
    ).samples.clamp(-1, 1)
    test = load(SIZE_PX, split="test")
    real = test.images_float(slice(max(count, ENOUGH)))
    figures = {
        "pictures": count,
        "class_accuracy": share_right(judge, drawn, torch.tensor(label)),
        "class_accuracy_of_test_pictures": share_right(judge, real, test.labels[: len(real)]),
    }
    if count >= ENOUGH:
        figures["frechet_distance"] = round(frechet_distance(judge.features(real), judge.features(drawn)), 4)
    described = {
        "command": shlex.join(["python", f"benchmarks/donors/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "trained_steps": network.last_training["steps"],
        "figures": figures,
    }
    out = HERE / Path(model).name if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    (out / "measured.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(described, indent=2))


def share_right(judge: PictureClassifier, pictures: Tensor, label: Tensor) -> float:
    """Share of pictures [B, 1, 32, 32] that the judge puts in the class `label` [B]."""
    return round((judge(pictures).argmax(-1) == label).double().mean().item(), 4)


if __name__ == "__main__":
    tyro.cli(main)
