"""What the trainings of the judge and the teacher share: batches of Fashion-MNIST, a cosine schedule, the card."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.data.images import ImageSet
from ditkit.data.sets.fashion import load
from ditkit.nn.frozen import save_network

HERE = Path(__file__).parent
SIZE_PX = 32
FACTS = "training.json"


def train_on_fashion(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: float,
    batch: int = 128,
    learning_rate: float = 2e-3,
    warmup: int = 100,
    weight_decay: float = 0.05,
    precision: str = "float32",
) -> dict[str, object]:
    """Train in place by AdamW on flipped and shifted pictures of the train split; what came out, as JSON.

    Args:
        loss: of pictures [B, 1, 32, 32] and labels [B]; a scalar.
    """
    pictures = load(SIZE_PX)
    steps = round(epochs * len(pictures) / batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    began, spent = time.perf_counter(), time.process_time()
    network.train()
    for step in range(steps):
        up = min((step + 1) / warmup, 1)
        down = 0.5 + 0.5 * math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1))
        optimizer.param_groups[0]["lr"] = learning_rate * up * down
        chosen = torch.randint(len(pictures), (batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(varied(pictures.images_float(chosen)), pictures.labels[chosen])
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step + 1} of {steps}: loss {value.item():.4f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return {
        "epochs": epochs,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "precision": precision,
        "processor_seconds": round(time.process_time() - spent),
        "seconds": round(time.perf_counter() - began),
    }


def varied(pictures: Tensor) -> Tensor:
    """Each picture [B, 1, H, W] turned left to right in half of the cases, and the batch moved by up to 2 pixels."""
    flipped = torch.where(torch.rand(len(pictures), 1, 1, 1) < 0.5, pictures.flip(-1), pictures)
    down, right = (int(torch.randint(-2, 3, ())) for _ in range(2))
    return flipped.roll((down, right), (-2, -1))  # the border of 2 pixels is black: nothing comes round


@torch.no_grad()
def right(predict: Callable[[Tensor], Tensor], pictures: ImageSet, batch: int = 500) -> Tensor:
    """The classes that `predict` gives the highest logit: int64 [N]."""
    parts = [
        predict(pictures.images_float(slice(i, i + batch))).argmax(-1) for i in range(0, len(pictures), batch)
    ]
    return torch.cat(parts)


def accuracy(network: nn.Module) -> dict[str, object]:
    """Shares of the test split, all and by class, that the network puts in their class."""
    test = load(SIZE_PX, split="test")
    hits = (right(network.eval(), test) == test.labels).double()
    each = {name: round(hits[test.labels == i].mean().item(), 4) for i, name in enumerate(test.classes)}
    return {"test_pictures": len(test), "accuracy": round(hits.mean().item(), 4), "accuracy_by_class": each}


def keep(network: nn.Module, folder: Path, facts: dict[str, object]) -> None:
    """Write weights, config, `training.json`, which names the command and the versions, and the card."""
    save_network(network, folder)
    described = {
        "command": shlex.join(["python", f"benchmarks/donors/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "ditkit": version("ditkit"),
        },
        "parameters": sum(p.numel() for p in network.parameters()),
        **facts,
    }
    (folder / FACTS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    write_card(folder)
    print(json.dumps(described, indent=2))


def write_card(folder: Path) -> None:
    """Write README.md of tools/cards/NAME.md and the facts in the folder."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    text = (HERE.parents[1] / "tools" / "cards" / f"{folder.name}.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.format(**facts), encoding="utf-8")


def cross_entropy(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The classifier's loss of pictures and labels."""
    return lambda x, label: F.cross_entropy(network(x).float(), label)
