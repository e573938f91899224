"""Claims of the baselines (DiT, SiT, EDM) that a minute of one core can try; the pattern for every other claims script.

python benchmarks/claims/00_baselines.py      writes benchmarks/results/claims/00-baselines.json and fills the page

Orders of convergence are measured on a mixture of Gaussians, whose velocity is known in closed form, so that the solver
alone errs. Losses and guidance are those of small networks trained on the toy latents of benchmarks/baselines.py: arms
have the same batches, noise and times, and are judged on 2,048 held-out draws.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor

from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap, paired_loss
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.grid import Segment
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.models.dit import DiT, DiTConfig
from ditkit.sample import ClassifierFree, Euler, Heun, Solver, sample
from ditkit.systems.claims import Claim
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.settings import Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # toy latents and their classes are shared
from baselines import CHANNELS, CLASSES, SIZE, Waves, recognised

CLOUDS, POINTS = 16, 200
STEPS, CONVERGED = 64, 2048
MEANS = torch.tensor([[1.2, -0.6], [-0.8, 0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
VARIANCES = torch.tensor([0.2, 0.35], dtype=torch.float64)


class Mixture(Denoiser):
    """The exact velocity of a mixture of round Gaussians in the plane; a sample is a cloud of points, [2, n]."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(convention=Convention(path))
        self.path = self.config.convention.make_path()
        self.eval()

    def sites(self) -> tuple[Site, ...]:
        return ()

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return ()

    def unconditional(self, cond: Cond) -> Cond:
        return cond

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return 2, POINTS

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """E[alpha' data + sigma' noise | x] for x [B, 2, n] at one time; the K components are the axis before 2."""
        c = self.path.at(t[:1].double())
        variance = (c.alpha**2 * VARIANCES + c.sigma**2)[:, None, None]  # [K, 1, 1]
        off = x.unsqueeze(-3) - c.alpha * MEANS[:, :, None]  # [B, K, 2, n]
        log_joint = WEIGHTS.log()[:, None] - variance[..., 0].log() - 0.5 * (off**2 / variance).sum(-2)
        share = log_joint.softmax(-2).unsqueeze(-2)
        data = MEANS[:, :, None] + c.alpha * VARIANCES[:, None, None] * off / variance
        noise = c.sigma * off / variance
        return (share * (c.alpha_rate * data + c.sigma_rate * noise)).sum(-3)


def orders(path: str, solver: Solver) -> Tensor:
    """Return log2 of the error's fall when steps are doubled, one number a cloud."""
    model = Mixture(path)

    def drawn(steps: int, by: Solver = solver) -> Tensor:
        return sample(model, Cond(), range(CLOUDS), steps=steps, solver=by).samples.double()

    converged = drawn(CONVERGED, Heun())
    coarse, fine = ((drawn(steps) - converged).square().mean((1, 2)).sqrt() for steps in (STEPS, 2 * STEPS))
    return (coarse / fine).log2()


def of_solvers() -> Iterator[Claim]:
    """Yield the orders of the solvers, each over three paths."""
    for solver, order in ((Euler(), 1), (Heun(), 2)):
        found = torch.cat([orders(path, solver) for path in ("linear", "cosine", "vp")])
        yield Claim.tried(
            f"{type(solver).__name__}'s error falls as the step to the power of {order}",
            paper=f"order {order}",
            ours=found.mean().item(),
            interval=bootstrap(found),
            claimed=(order - 0.1, order + 0.1),
            against=f"{STEPS} and {2 * STEPS} steps, distance from Heun in {CONVERGED}, paths linear, cosine and vp",
        )


def trained(patch: int, steps: int) -> tuple[DiT, DiT]:
    """Return a small DiT after training: its last weights, and their average."""
    torch.manual_seed(0)
    config = DiTConfig(
        size=SIZE,
        patch=patch,
        channels=CHANNELS,
        width=64,
        depth=4,
        heads=2,
        classes=CLASSES,
        convention=Convention(),
    )
    settings = Settings(
        steps=steps, batch=32, learning_rate=2e-3, warmup=20, averages=(Power(0.1),), save_every=0
    )
    last = DiT(config)
    with tempfile.TemporaryDirectory() as folder:
        averaged = train(last, Waves(4096, seed=1), Denoising(), settings, Path(folder))
    return last.eval(), averaged


def of_losses(steps: int) -> Iterator[Claim]:
    """Yield the claims on networks that were trained here."""
    (coarse, _), (last, averaged) = trained(8, steps), trained(4, steps)
    judged = paired_loss({"patch 8": coarse, "last": last, "averaged": averaged}, Waves(2048, seed=2))
    by_patch, by_average = judged.difference("last", "patch 8"), judged.difference("averaged", "last")
    setting = f"{steps} steps of 32; means {judged.mean('patch 8'):.4g}, {judged.mean('last'):.4g}"
    yield Claim.tried(
        "More tokens of the same picture give less loss after as many steps: patch 4 less patch 8",
        paper="FID of DiT-B after 400K steps: 68.4 with patch 4, 43.5 with patch 2",
        ours=by_patch.mean,
        interval=by_patch.interval,
        claimed=(None, 0.0),
        unit="loss",
        against=f"{setting}; at equal steps, so at more MACs",
    )
    yield Claim.tried(
        "Averaged weights have less loss than the last ones",
        paper="all published figures are of averages; none of last weights is given",
        ours=by_average.mean,
        interval=by_average.interval,
        claimed=(None, 0.0),
        unit="loss",
        against=f"patch 4; means {judged.mean('averaged'):.4g}, {judged.mean('last'):.4g}",
    )
    plain, guided = (right(averaged, scale) for scale in (1.0, 2.0))
    yield Claim.tried(
        "Guidance makes more samples of the class that was asked for: scale 2 less scale 1",
        paper="FID of SiT-XL/2: 8.3 without, 2.06 with guidance",
        ours=(guided - plain).mean().item(),
        interval=bootstrap(guided - plain),
        claimed=(0.0, None),
        unit="of samples",
        against=f"the same seeds; shares {plain.mean():.3f}, {guided.mean():.3f}; twice the forward passes",
    )


def right(model: DiT, scale: float, count: int = 512) -> Tensor:
    """Return 1 for every sample that is recognised as its class, else 0, [count]."""
    label = torch.arange(count) % CLASSES
    drawn = sample(model, Cond(label=label), range(count), steps=20, guidance=ClassifierFree(scale))
    return (recognised(drawn.samples) == label).double()


def untried() -> Iterator[Claim]:
    """Yield the claims that this machine cannot try, or not in two minutes."""
    yield Claim.untried(
        "DiT-XL/2 with guidance has FID 2.27 on ImageNet at 256 pixels",
        paper="2.27, IS 278.24",
        reason="takes ImageNet, the published weights and a GPU",
    )
    yield Claim.untried(
        "Patch 2 has less loss than patch 4",
        paper="FID of DiT-B after 400K steps: 43.5 against 68.4",
        reason="after 300 steps it has more; 1,500 are for `python benchmarks/baselines.py`, not for two minutes",
    )


def main(steps: int = 300) -> None:
    """Try the claims.

    Args:
        steps: of each training.
    """
    write("00-baselines", [*of_solvers(), *of_losses(steps), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
