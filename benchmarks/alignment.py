"""The network, data and measurements that the claims of SRA (32) and of HASTE with REPA (42) share.

A SiT of 8 blocks learns Fashion-MNIST, 32 x 32 pixels in 64 tokens. The plain run is the baseline of both scripts: it
is trained once and kept in runs/, by the digest of what it was trained by.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.bench.paired import bootstrap
from ditkit.bench.timing import alternated
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.data.images import ImageSet
from ditkit.data.loading import load_images
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import Training
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.taps import run_with_taps

SIZE, CLASSES, DEPTH, BATCH = 32, 10, 8, 32
FLOW = Convention()
CONFIG = DiTConfig(
    size=SIZE, patch=4, channels=1, width=48, depth=DEPTH, heads=4, classes=CLASSES, convention=FLOW
)
RUNS = Path(__file__).parents[1] / "runs"
PROBED_AT = 0.3
"""Noise-time of the features that are probed."""
Watch = Callable[[Training], None]


class Pictures:
    """Grey garments in [-1, 1], [1, 32, 32], with their classes.

    Args:
        split: train, or test for held-out pictures.
    """

    def __init__(self, split: str) -> None:
        self.images: ImageSet = load_images("fashion", SIZE, split=split)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, rng: SampleRNG | None = None) -> tuple[Tensor, Cond]:
        return self.images.images_float(indices), Cond(label=self.images.labels[indices])


def settings(steps: int) -> Settings:
    return Settings(
        steps=steps,
        batch=BATCH,
        learning_rate=1e-3,
        warmup=max(1, steps // 10),
        clip=1.0,
        averages=(Power(0.1),),
        save_every=0,
        sheet_every=0,
    )


def network() -> DiT:
    torch.manual_seed(0)
    return DiT(CONFIG)


def trained(objective: Objective, steps: int, watch: Watch | None = None) -> DiT:
    """Train a fresh network; its averaged weights.

    Args:
        watch: called before every step.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Training(network(), Pictures("train"), objective, settings(steps), Path(folder))
        run.open({}, False)
        while run.done < steps:
            if watch is not None:
                watch(run)
            run.step()
        averaged = cast(DiT, run.averaged())
        run.accelerator.end_training()
    return averaged


def plain(steps: int) -> DiT:
    """Return the plain run, trained now unless runs/ holds it."""
    what = f"{CONFIG} {settings(steps)} {torch.__version__}"
    folder = RUNS / f"alignment-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").exists():
        trained(Denoising(), steps).save(folder)
    return DiT.load(folder)


@torch.no_grad()
def features(model: DiT, pictures: Pictures, block: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean tokens of a block, counted from 1, of noisy pictures without a class, [count, D]; and their classes."""
    site, parts, labels = f"blocks.{block - 1}", [], []
    generator = torch.Generator().manual_seed(7)
    for index in torch.arange(count).split(250):
        data, cond = pictures.batch(index)
        noise = torch.randn(data.shape, generator=generator)
        t = torch.full((len(index),), PROBED_AT)
        x = FLOW.make_path().mix(data, noise, t)
        unlabelled = model.unconditional(cond)
        out = run_with_taps(model, model, [site], tuple(data.shape[1:]), x, t, unlabelled, times=t, stop=site)
        parts.append(out.taps[site].mean(1))
        labels.append(cond.label)
    return torch.cat(parts).double(), torch.cat(cast(list[Tensor], labels))


def probe(models: Mapping[str, DiT], block: int, count: int = 4000) -> dict[str, Tensor]:
    """Return, for each model, 1 where a linear classifier of a block's features is right on a test picture, else 0.

    The classifier is ridge regression to the classes on as many training pictures, in closed form.
    """
    train, test = Pictures("train"), Pictures("test")
    found = {}
    for name, model in models.items():
        x, label = features(model.eval(), train, block, count)
        y, truth = features(model.eval(), test, block, count)
        mean, std = x.mean(0), x.std(0)
        x, y = (torch.cat([(v - mean) / std, torch.ones(len(v), 1)], 1) for v in (x, y))
        target = F.one_hot(label, CLASSES).double()
        ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(x.mT @ x + ridge, x.mT @ target)
        found[name] = ((y @ weight).argmax(1) == truth).double()
    return found


def gain(hits: Mapping[str, Tensor], arm: str, rival: str) -> tuple[float, tuple[float, float]]:
    """Mean difference of the hits of two models, with its interval over the test pictures."""
    difference = hits[arm] - hits[rival]
    return difference.mean().item(), bootstrap(difference)


def step_seconds(objectives: Mapping[str, Objective], rounds: int) -> dict[str, Tensor]:
    """Seconds of a training step under each objective, taken in turns, after two that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, objective in objectives.items():
            place = Path(folder) / hashlib.sha256(name.encode()).hexdigest()[:8]
            runs[name] = Training(network(), Pictures("train"), objective, settings(1000), place)
            runs[name].open({}, False)
        seconds = alternated({name: run.step for name, run in runs.items()}, rounds, warmup=2)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, Tensor], arm: str, rival: str) -> tuple[float, tuple[float, float]]:
    """Geometric mean of the ratios of two arms' seconds, round by round, with its interval."""
    logs = (seconds[arm] / seconds[rival]).log()
    low, high = bootstrap(logs)
    return logs.mean().exp().item(), (torch.tensor(low).exp().item(), torch.tensor(high).exp().item())


def agreement(losses: Sequence[Any], weights: Sequence[Tensor]) -> float:
    """Cosine between the gradients of two losses on weights that both reach."""
    pairs = [torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for loss in losses]
    both = [
        (a.flatten(), b.flatten()) for a, b in zip(*pairs, strict=True) if a is not None and b is not None
    ]
    one, two = (torch.cat(parts) for parts in zip(*both, strict=True))
    return F.cosine_similarity(one, two, dim=0).item()
