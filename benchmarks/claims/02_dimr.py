"""Claims of DiMR that ten minutes of one core can try: losses of small networks at 16 pixels a side.

python benchmarks/claims/02_dimr.py      writes benchmarks/results/claims/02-dimr.json and fills the page

The arms are a DiMR of two resolutions, one resolution of at least as many MACs, two with adaptive norms in place of the
time-dependent ones, and two trained without the loss of the lower resolution. They see the same garments, batches,
noise and times, and are judged on 2,048 held-out draws by the error of the noise that they predict at full resolution.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from ditkit.bench.claims import write
from ditkit.bench.macs import count_macs
from ditkit.bench.paired import bootstrap, paired_loss
from ditkit.core.cond import Cond
from ditkit.core.model import parameter_count
from ditkit.models.dimr import DiMR, DiMRConfig
from ditkit.nn.embeddings import TimeEmbedding
from ditkit.nn.time_norms import TimeDependentLayerNorm, TimeDependentRMSNorm
from ditkit.systems.claims import Claim
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.settings import Settings
from ditkit.train.terms.multi_scale import MultiScale

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the pictures are shared
from garments import CLASSES, SIZE, Garments

TWO = DiMRConfig(size=SIZE, channels=1, width=(64, 32), depth=(5, 3), patch=(2, 1), heads=4, classes=CLASSES)
ONE = replace(TWO, width=(64,), depth=(9,), patch=(2,))
TIMES = range(100, 700, 100)
"""Steps of 1000 at which estimates of the data are compared."""


class AdaptiveNorm(nn.Module):
    """RMS or layer norm, scaled and shifted by a layer of the embedded time, zero at the start (adaLN)."""

    def __init__(self, width: int, told: int, centred: bool) -> None:
        super().__init__()
        self.modulation, self.centred = nn.Linear(told, 2 * width), centred

    def forward(self, x_BLD: Tensor, c_B1D: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(c_B1D)).chunk(2, -1)
        exact = x_BLD.float()
        shape = exact.shape[-1:]
        normal = F.layer_norm(exact, shape) if self.centred else F.rms_norm(exact, shape)
        return (normal * (1 + scale) + shift).to(x_BLD.dtype)


class AdaptiveDiMR(DiMR):
    """A DiMR whose norms are adaptive: time goes through an embedding, and through a layer for each norm."""

    def __init__(self, config: DiMRConfig) -> None:
        super().__init__(config)
        told = config.width[0]
        self.time = TimeEmbedding(told)
        for parent in list(self.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, TimeDependentRMSNorm | TimeDependentLayerNorm):
                    first = norm.scale if isinstance(norm, TimeDependentRMSNorm) else norm.shift
                    centred = isinstance(norm, TimeDependentLayerNorm)
                    setattr(parent, name, adaptive := AdaptiveNorm(len(first.high), told, centred))
                    nn.init.zeros_(adaptive.modulation.weight)
                    nn.init.zeros_(adaptive.modulation.bias)

    def place(self, t: Tensor) -> Tensor:
        return self.time(t)[:, None]


def trained(kind: type[DiMR], config: DiMRConfig, scales: tuple[float, ...], steps: int) -> DiMR:
    """Return a network after training, its weights averaged."""
    settings = Settings(
        steps=steps,
        batch=64,
        learning_rate=1e-3,
        betas=(0.9, 0.99),
        weight_decay=0.03,
        clip=1.0,
        warmup=max(1, steps // 10),
        precision="bf16",
        averages=(Power(0.1),),
        save_every=0,
        sheet_every=0,
    )
    torch.manual_seed(0)
    objective = Denoising((MultiScale(scales=scales),))
    with tempfile.TemporaryDirectory() as folder:
        return train(kind(config), Garments("train"), objective, settings, Path(folder))  # type: ignore[return-value]


def fine_error(model: DiMR, count: int = 512) -> Tensor:
    """Return the squared error of the estimated data above half the Nyquist frequency, of each held-out picture."""
    data, cond = Garments("test").batch(torch.arange(count))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    path, f = model.config.convention.make_path(), torch.fft.fftfreq(SIZE)
    fine = (f[:, None] ** 2 + f**2).sqrt() > 0.25
    total = torch.zeros(count, dtype=torch.float64)
    for step in TIMES:
        t = torch.full((count,), float(step))
        x = path.mix(data, noise, t)
        with torch.no_grad():
            value = model(x, t, cond)
        error = torch.fft.fft2(path.convert(value, x, t, "noise", "data") - data, norm="ortho").abs() ** 2
        total += error[..., fine].double().flatten(1).sum(1) / len(TIMES)
    return total


def macs(model: DiMR) -> float:
    """Return MMAC of a forward pass of one sample."""
    with torch.no_grad():
        x, cond = torch.zeros(1, *model.sample_shape), Cond(label=torch.zeros(1, dtype=torch.long))
        return count_macs(model, x, torch.zeros(1), cond).total / 1e6


def of_losses(steps: int) -> Iterator[Claim]:
    """Yield the claims on trained networks."""
    both = (0.25, 1.0)
    arms = {
        "2R": trained(DiMR, TWO, both, steps),
        "1R": trained(DiMR, ONE, (1.0,), steps),
        "adaLN": trained(AdaptiveDiMR, TWO, both, steps),
        "last loss alone": trained(DiMR, TWO, (0.0, 1.0), steps),
    }
    judged = paired_loss(arms, Garments("test"))
    facts = ", ".join(
        f"{name} {judged.mean(name):.4g} ({parameter_count(arm):,} parameters, {macs(arm):.1f} MMAC)"
        for name, arm in arms.items()
    )
    setting = f"{steps} steps of 64 at {SIZE} pixels a side; losses: {facts}"
    for claim, rival, paper in (
        (
            "Two resolutions have less loss than one of no fewer MACs",
            "1R",
            "FID without guidance on ImageNet 256 falls with the second resolution; no figure at this size",
        ),
        (
            "Norms that depend on time have less loss than adaptive ones that take more parameters",
            "adaLN",
            "better FID than adaLN-Zero at fewer parameters; no figure at this size",
        ),
        (
            "The loss of the lower resolution lowers that of the higher one",
            "last loss alone",
            "none is given",
        ),
    ):
        found = judged.difference("2R", rival)
        yield Claim.tried(
            f"{claim}: 2R less {rival}",
            paper=paper,
            ours=found.mean,
            interval=found.interval,
            claimed=(None, 0.0),
            unit="loss",
            against=f"{setting}; {found.relative[0]:+.2%}",
        )
    fine = {name: fine_error(arms[name]) for name in ("2R", "1R")}
    found = fine["2R"] - fine["1R"]
    yield Claim.tried(
        "Two resolutions err less above half the Nyquist frequency than one: squared error of the data, 2R less 1R",
        paper="less distortion, shown as pictures",
        ours=found.mean().item(),
        interval=bootstrap(found),
        claimed=(None, 0.0),
        unit="a picture",
        against=f"means {fine['2R'].mean():.4g} and {fine['1R'].mean():.4g}; 512 held-out pictures, steps "
        f"{TIMES.start} to {TIMES[-1]} of 1000",
    )


def of_counts() -> Iterator[Claim]:
    """Yield what is counted on the published sizes."""
    width = 960
    with torch.device("meta"):
        block = DiMR.preset("XL/2R").stages[0].blocks[0]
        norms = parameter_count(block.norm_attn) + parameter_count(block.norm_mlp)
    share = norms / (6 * width**2 + 6 * width)
    yield Claim.tried(
        "The norms of an XL block take less than a hundredth of the parameters of adaLN-Zero",
        paper="7.7 thousand against 5.5 million a block of width 960",
        ours=share,
        interval=(share, share),
        claimed=(0.0, 0.01),
        against=f"{norms:,} numbers, counted on the meta device",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that this machine cannot try."""
    yield Claim.untried(
        "DiMR-XL/2R with guidance has FID 1.70 on ImageNet at 256 pixels",
        paper="1.70, IS 289.0; DiT-XL/2 2.27, 278.2",
        reason="takes ImageNet, the published weights and a GPU",
    )


def main(steps: int = 100) -> None:
    """Try the claims.

    Args:
        steps: of each training.
    """
    torch.set_num_threads(1)
    write("02-dimr", [*of_counts(), *of_losses(steps), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
