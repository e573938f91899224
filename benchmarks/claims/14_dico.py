"""Claims of DiCo that ten minutes of one core can try: losses at 16 pixels a side, and what a forward pass costs.

python benchmarks/claims/14_dico.py      writes benchmarks/results/claims/14-dico.json and fills the page

The arms are a DiCo, one without the gate of channels, and a DiT of as many parameters. They are trained on the same
garments, batches, noise and times under DDPM with a learned variance, as in the paper, and judged on 2,048 held-out
draws by the error of the noise.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from ditkit.bench.claims import write
from ditkit.bench.macs import count_macs
from ditkit.bench.paired import bootstrap, paired_loss
from ditkit.bench.timing import alternated
from ditkit.core.cond import Cond
from ditkit.core.model import Denoiser, parameter_count
from ditkit.models.dico import DiCo, DiCoConfig
from ditkit.models.dit import DiT, DiTConfig
from ditkit.systems.claims import Claim
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the pictures are shared
from garments import CLASSES, SIZE, Garments

DICO = DiCoConfig(size=SIZE, channels=1, width=24, depth=(2, 2, 2, 2, 2), classes=CLASSES)
PLAIN = replace(DICO, channel_attention=False)
DIT = DiTConfig(size=SIZE, patch=2, channels=1, width=96, depth=4, heads=4, classes=CLASSES)
SIDES = (16, 32, 64)
ROUNDS = 21


def built(config: DiCoConfig | DiTConfig) -> Denoiser:
    torch.manual_seed(0)
    return DiCo(config) if isinstance(config, DiCoConfig) else DiT(config)


def trained(config: DiCoConfig | DiTConfig, steps: int) -> Denoiser:
    """Return a network after training, its weights averaged."""
    settings = Settings(
        steps=steps,
        batch=64,
        learning_rate=1e-3,
        warmup=max(1, steps // 10),
        precision="bf16",
        averages=(Power(0.1),),
        save_every=0,
        sheet_every=0,
    )
    objective = Denoising((Regression(), VariationalBound()))
    with tempfile.TemporaryDirectory() as folder:
        return train(built(config), Garments("train"), objective, settings, Path(folder))


def active(model: Denoiser, count: int = 256) -> Tensor:
    """Return the share of channels that are active in what the convolutions hand on, of each held-out picture.

    A channel is active where its mean positive part is above 5 % of the largest channel's.
    """
    shares: list[Tensor] = []

    def note(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        score = given[0].float().relu().mean(1)
        shares.append((score > 0.05 * score.amax(1, keepdim=True)).float().mean(1))

    hooks = [block.conv.outer.register_forward_hook(note) for level in model.levels for block in level]
    data, cond = Garments("test").batch(torch.arange(count))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    path, t = model.config.convention.make_path(), torch.full((count,), 500)
    with torch.no_grad():
        model(path.mix(data, noise, t.float()), t.float(), cond)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares).mean(0).double()


def of_losses(steps: int) -> Iterator[Claim]:
    """Yield the claims on trained networks."""
    arms = {"DiCo": trained(DICO, steps), "no gate": trained(PLAIN, steps), "DiT/2": trained(DIT, steps)}
    judged = paired_loss(arms, Garments("test"))
    sizes = ", ".join(f"{name} {parameter_count(arm):,}" for name, arm in arms.items())
    means = ", ".join(f"{name} {judged.mean(name):.4g}" for name in arms)
    setting = f"{steps} steps of 64 at {SIZE} pixels a side; parameters: {sizes}; losses: {means}"
    for claim, rival, paper in (
        (
            "A DiCo has less loss than a DiT/2 of as many parameters after as many steps",
            "DiT/2",
            "FID of the S models after 400K steps: 49.97 against 68.40",
        ),
        (
            "The gate of channels lowers the loss",
            "no gate",
            "4.81 FID of the S model after 400K steps",
        ),
    ):
        found = judged.difference("DiCo", rival)
        yield Claim.tried(
            f"{claim}: DiCo less {rival}",
            paper=paper,
            ours=found.mean,
            interval=found.interval,
            claimed=(None, 0.0),
            unit="loss",
            against=f"{setting}; {found.relative[0]:+.2%}",
        )
    with_gate, without = active(arms["DiCo"]), active(arms["no gate"])
    yield Claim.tried(
        "The gate leaves more channels of a convolution active: share with the gate less without",
        paper="shown as a figure: without it many channels are inactive",
        ours=(with_gate - without).mean().item(),
        interval=bootstrap(with_gate - without),
        claimed=(0.0, None),
        unit="of channels",
        against=f"shares {with_gate.mean():.3f} and {without.mean():.3f}, 256 held-out pictures at t = 500 of 1000",
    )


def macs(model: Denoiser, side: int) -> float:
    """Return MAC of a forward pass of one sample."""
    with torch.no_grad():
        x = torch.empty(1, model.config.channels, side, side, device="meta")
        cond = Cond(label=torch.zeros(1, dtype=torch.long, device="meta"))
        return float(count_macs(model, x, torch.empty(1, device="meta"), cond).total)


def of_costs() -> Iterator[Claim]:
    """Yield the claims on what a forward pass costs."""
    with torch.device("meta"):
        ratio = macs(DiCo.preset("XL").eval(), 32) / macs(DiT.preset("XL/2").eval(), 32)
    yield Claim.tried(
        "DiCo-XL takes three quarters of DiT-XL/2's MACs at 256 pixels",
        paper="87.30 against 118.64 GMAC: 0.736",
        ours=ratio,
        interval=(ratio, ratio),
        claimed=(0.72, 0.75),
        against="counted on the meta device",
    )
    dico, dit = built(DICO).eval(), built(DIT).eval()
    with torch.device("meta"):
        shapes = DiCo(DICO).eval(), DiT(DIT).eval()
    for side in SIDES:
        x, t = torch.randn(4, 1, side, side), torch.full((4,), 500.0)
        cond = Cond(label=torch.zeros(4, dtype=torch.long))

        @torch.inference_mode()
        def forward(model: Denoiser, given: tuple[Any, ...] = (x, t, cond)) -> None:
            model(*given)

        calls = {"dico": lambda: forward(dico), "dit": lambda: forward(dit)}
        seconds = {name: torch.tensor(s).double() for name, s in alternated(calls, ROUNDS).items()}
        gain = (seconds["dit"] / seconds["dico"]).log2()
        counted = " and ".join(f"{macs(model, side) / 1e6:.1f}" for model in shapes)
        yield Claim.tried(
            f"A DiCo is faster than a DiT/2 of as many parameters at {side} pixels a side: log2 of the gain",
            paper="images a second of XL on an A100: 2.7 times at 256 pixels (32 latents), 3.1 times at 512 (64)",
            ours=gain.mean().item(),
            interval=bootstrap(gain),
            claimed=(0.0, None),
            against=f"{2 ** gain.mean():.2f} times; 4 samples in float32 on one thread, {ROUNDS} rounds in turns; "
            f"MMAC of DiCo and DiT: {counted}",
        )


def untried() -> Iterator[Claim]:
    """Yield the claims that this machine cannot try."""
    yield Claim.untried(
        "DiCo-XL with guidance has FID 2.05 on ImageNet at 256 pixels",
        paper="2.05, IS 282.17; DiT-XL/2 2.27, 278.24",
        reason="takes ImageNet, the published weights and a GPU",
    )
    yield Claim.untried(
        "The U-shape has less loss than one resolution with skips, and that less than one resolution",
        paper="FID of S: 49.97, 54.10, 58.23",
        reason="there is no DiCo of one resolution here",
    )


def main(steps: int = 150) -> None:
    """Try the claims.

    Args:
        steps: of each training.
    """
    torch.set_num_threads(1)
    write("14-dico", [*of_costs(), *of_losses(steps), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
