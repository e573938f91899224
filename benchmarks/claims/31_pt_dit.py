"""Claims of PT-DiT that minutes of a core can try: what each part is for, what a proxy should be, and what it costs.

python benchmarks/claims/31_pt_dit.py      writes benchmarks/results/claims/31-pt-dit.json and fills the page

Arms learn the same garments of 16 x 16 pixels, told their class, from the same initial weights, in the same steps, of
the same batches, noise and times, as in the paper's ablations; an arm without a part has what is left of the weights.
They are judged on 2,048 held-out draws by the error of the noise. Three seeds each; intervals resample seeds and draws.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
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
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.pt_dit import PTDiT, PTDiTConfig
from ditkit.systems.claims import Claim
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the pictures are shared
from garments import CLASSES, SIZE, Garments

FULL = PTDiTConfig(size=SIZE, patch=2, channels=1, width=48, depth=2, heads=3, window=2, classes=CLASSES)
ARMS = {
    "full": FULL,
    "no shifted windows": replace(FULL, shift=False),
    "no GIIM": replace(FULL, mixer="windows"),
    "no TCM": replace(FULL, mixer="proxies"),
    "first": replace(FULL, pooling="first"),
    "random": replace(FULL, pooling="random"),
}
PAPER = "FID-50K of S-Class on ImageNet at 256 pixels, 400K steps: "
LOSSES = (
    ("Shifted windows lower the loss", "full", "no shifted windows", "19.30 against 23.59"),
    ("Proxies and what is read from them (GIIM) lower the loss", "full", "no GIIM", "19.30 against 23.71"),
    ("Windows, shifted and not (TCM), lower the loss", "full", "no TCM", "19.30 against 69.07"),
    ("Windows (TCM) matter more than proxies (GIIM)", "no GIIM", "no TCM", "23.71 against 69.07"),
    ("A window's mean is a better proxy than its first token", "full", "first", "19.30 against 20.84"),
    ("A window's mean is a better proxy than a token at random", "full", "random", "19.30 against 21.00"),
)
SHARES = {32: (0.343, 0.001), 64: (0.097, 0.001), 128: (0.047, 0.001), 256: (0.023, 0.001)}
"""Latents a side, the share of full attention's multiplications that the paper prints, and half of its last digit."""
WIDE, ROUNDS = {"width": 96, "depth": 2, "heads": 3, "channels": 1, "classes": CLASSES, "patch": 2}, 9
SIDES = (32, 64, 128)


def built(config: PTDiTConfig, seed: int) -> PTDiT:
    """Return an arm before training: it has the weights that the full network of the seed has in these places."""
    torch.manual_seed(seed)
    full = PTDiT(FULL).state_dict()
    arm = PTDiT(config)
    own = arm.state_dict()
    arm.load_state_dict({name: full[name] if full[name].shape == v.shape else v for name, v in own.items()})
    return arm


def trained(config: PTDiTConfig, steps: int, seed: int) -> PTDiT:
    """Return a network after training, its weights averaged."""
    settings = Settings(
        steps=steps,
        batch=32,
        learning_rate=2e-3,
        warmup=max(1, steps // 10),
        averages=(Power(0.1),),
        save_every=0,
        sheet_every=0,
        seed=seed,
    )
    objective = Denoising((Regression(), VariationalBound()))
    with tempfile.TemporaryDirectory() as folder:
        return train(built(config, seed), Garments("train"), objective, settings, Path(folder))


def resampled(differences_SN: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of a mean over seeds and draws, both drawn anew; a draw is the same in all seeds."""
    g = torch.Generator().manual_seed(0)
    seeds, draws = differences_SN.shape
    means = []
    for _ in range(resamples):
        rows = differences_SN[torch.randint(seeds, (seeds,), generator=g)].mean(0)
        means.append(rows[torch.randint(draws, (draws,), generator=g)].mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def of_losses(steps: int, seeds: int) -> Iterator[Claim]:
    """Yield the claims on trained networks."""
    losses: dict[str, list[Tensor]] = {name: [] for name in ARMS}
    sizes: Mapping[str, int] = {}
    for seed in range(seeds):
        arms = {name: trained(config, steps, seed) for name, config in ARMS.items()}
        sizes = {name: parameter_count(arm) for name, arm in arms.items()}
        for name, loss in paired_loss(arms, Garments("test")).losses.items():
            losses[name].append(loss)
    of_arm = {name: torch.stack(rows) for name, rows in losses.items()}
    means = ", ".join(f"{name} {rows.mean():.4g} ({sizes[name]:,})" for name, rows in of_arm.items())
    setting = f"{seeds} seeds, {steps} steps of 32 at {SIZE} pixels a side; losses (and parameters): {means}"
    for claim, arm, rival, paper in LOSSES:
        difference = of_arm[arm] - of_arm[rival]
        mean = difference.mean().item()
        of_seeds = ", ".join(f"{value:+.4g}" for value in difference.mean(1))
        yield Claim.tried(
            f"{claim}: {arm} less {rival}",
            paper=PAPER + paper,
            ours=mean,
            interval=resampled(difference),
            claimed=(None, 0.0),
            unit="loss",
            against=f"{setting}; {mean / of_arm[rival].mean().item():+.2%}; by seed {of_seeds}",
        )


def counted(model: Denoiser, side: int, text: int = 0) -> Mapping[str, int]:
    """Return MAC of a forward pass of one sample by kind, on the meta device."""
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, model.config.channels, side, side)
        prompt = torch.empty(1, text, model.config.text_width) if text else None
        cond = Cond(label=torch.zeros(1, dtype=torch.long), text=prompt)
        return count_macs(model, x, torch.empty(1), cond).by_kind


def of_multiplications() -> Iterator[Claim]:
    """Yield the claims on multiplications, counted on the meta device."""
    for side, (printed, half) in SHARES.items():
        tokens = (side // 2) ** 2
        with torch.device("meta"):
            model = PTDiT(PTDiTConfig(size=side, width=32, depth=1, heads=2, classes=1)).eval()
        share = counted(model, side)["matmul"] / (2 * tokens**2 * 32)
        yield Claim.tried(
            f"At {8 * side} pixels attention takes {100 * printed:.1f} % of full attention's multiplications",
            paper=f"{100 * printed:.1f} %, printed beside the formula 1 / P^2 + 1 / P + 2 P / N",
            ours=share,
            interval=(share, share),
            claimed=(printed - half, printed + half),
            against=f"counted: {tokens:,} tokens in 64 windows",
        )
    with torch.device("meta"):
        whole = PTDiT.preset("B", size=128).eval()
        unshifted = PTDiT.preset("B", size=128, shift=False).eval()
        dit = DiT(replace(DiT.preset("B/2").config, size=128)).eval()
    own, plain, rival = (
        sum(counted(model, 128, text).values()) for model, text in ((whole, 120), (unshifted, 120), (dit, 0))
    )
    yield Claim.tried(
        "PT-DiT-B takes 48.6 % fewer multiplications than DiT-B at 1024 pixels",
        paper="334.2 against 650.5 GFLOPs",
        ours=1 - own / rival,
        interval=(1 - own / rival, 1 - own / rival),
        claimed=(0.481, 0.491),
        against=f"counted with 120 text tokens: {own / 1e9:.1f} against {rival / 1e9:.1f} GMAC of DiT-B/2; without "
        f"shifted windows {plain / 1e9:.1f}",
    )


def of_seconds() -> Iterator[Claim]:
    """Yield what a forward pass takes beside a DiT of the same width and depth."""
    for side in SIDES:
        torch.manual_seed(0)
        models = {
            "own": PTDiT(PTDiTConfig(size=side, **WIDE)).eval(),  # type: ignore[arg-type]
            "dit": DiT(DiTConfig(size=side, **WIDE)).eval(),  # type: ignore[arg-type]
        }
        x, t, cond = torch.randn(1, 1, side, side), torch.full((1,), 500.0), Cond(label=torch.tensor([3]))

        @torch.inference_mode()
        def forward(model: Denoiser, given: tuple[Any, ...] = (x, t, cond)) -> None:
            model(*given)

        calls = {name: (lambda model=model: forward(model)) for name, model in models.items()}
        seconds = {name: torch.tensor(s).double() for name, s in alternated(calls, ROUNDS).items()}
        gain = (seconds["dit"] / seconds["own"]).log2()
        macs = {name: sum(counted(model.to("meta"), side).values()) / 1e6 for name, model in models.items()}
        yield Claim.tried(
            f"A PT-DiT is faster than a DiT as wide and deep at {(side // 2) ** 2:,} tokens: log2 of the gain",
            paper="less memory and fewer GFLOPs from 256 pixels on; no seconds are given",
            ours=gain.mean().item(),
            interval=bootstrap(gain),
            claimed=(0.0, None),
            against=f"{2 ** gain.mean():.2f} times; one sample in float32 on one thread, {ROUNDS} rounds in turns; "
            f"MMAC: {macs['own']:.0f} and {macs['dit']:.0f} of DiT",
        )


def untried() -> Iterator[Claim]:
    """Yield the claims that this machine cannot try."""
    for claim, paper, reason in (
        (
            "Qihoo-T2I has a lower FID than PixArt-alpha's rivals on MS-COCO",
            "FID-30K 15.70; PixArt-alpha 10.65, FLUX 22.76",
            "takes the published weights, T5 and a GPU; the paper's own table has PixArt-alpha below it",
        ),
        (
            "Qihoo-T2V is better than CogVideoX-2B on UCF-101 and MSR-VTT",
            "FVD 384.03 against 680.11; 375.23 against 418.14",
            "takes the published weights, T5 and a GPU",
        ),
        (
            "Cross-attention brings proxies in better than interpolation does, bilinear or linear",
            "FID 19.30 against 21.82 and 20.24",
            "the two others are not built: the paper does not say where they stand in a block",
        ),
        (
            "The memory of training grows slightly with frames, 48 to 240 at 512 pixels",
            "42 to 53 GB, read off a figure",
            "takes a GPU",
        ),
    ):
        yield Claim.untried(claim, paper=paper, reason=reason)


def main(steps: int = 70, seeds: int = 3) -> None:
    """Try the claims.

    Args:
        steps: of each training. seeds: of each arm.
    """
    torch.set_num_threads(1)
    write("31-pt-dit", [*of_multiplications(), *of_seconds(), *of_losses(steps, seeds), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
