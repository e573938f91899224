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
from ditkit.models.pt_dit import SIZES, PTDiT, PTDiTConfig, VideoPTDiT
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
SHARES = {32: 0.343, 64: 0.097, 128: 0.047, 256: 0.023}
"""Latents a side, and the share of full attention's multiplications that the paper prints, cut after the last digit."""
GFLOPS_H = {32: (302.1, 1513.9), 64: (1089.1, 6061.5), 128: (4236.9, 24027.7), 256: (16828.3, 96069.1)}
"""Latents a side, and the GFLOPs that the paper prints of H and of Lumina-Next 1.7B."""
GFLOPS_XL = {32: (7701.7, 16624.3), 64: (30264.2, 65590.2), 128: (120514.0, 261454.3)}
"""The same of XL and of CogVideoX-2B, 48 latent frames."""
NEAR = 0.01
"""A count agrees within this share: the paper says neither how many tokens of text nor which small layers it counts."""
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


def counted(model: Denoiser, side: int, text: int = 0, frames: int = 0) -> Mapping[str, int]:
    """Return MAC of a forward pass of one sample by kind, on the meta device; frames of a clip."""
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, model.config.channels, *([frames] if frames else []), side, side)
        prompt = torch.empty(1, text, model.config.text_width) if text else None
        cond = Cond(label=torch.zeros(1, dtype=torch.long), text=prompt)
        return count_macs(model, x, torch.empty(1), cond).by_kind


def of_multiplications() -> Iterator[Claim]:
    """Yield the claims on multiplications, counted on the meta device."""
    for side, printed in SHARES.items():
        tokens = (side // 2) ** 2
        with torch.device("meta"):
            model = PTDiT(PTDiTConfig(size=side, width=32, depth=1, heads=2, classes=1)).eval()
        share = counted(model, side)["matmul"] / (2 * tokens**2 * 32)
        yield Claim.tried(
            f"At {8 * side} pixels attention takes {100 * printed:.1f} % of full attention's multiplications",
            paper=f"{100 * printed:.1f} %, printed beside the formula 1 / P^2 + 1 / P + 2 P / N",
            ours=share,
            interval=(share, share),
            claimed=(printed, printed + 0.001),
            against=f"counted: {tokens:,} tokens in 64 windows; the printed figure is cut, not rounded",
        )
    own, plain = (of_depth(PTDiT, "B", 128, 0, shift) for shift in (True, False))
    with torch.device("meta"):
        dit = DiT(replace(DiT.preset("B/2").config, size=128)).eval()
    rival = sum(counted(dit, 128).values()) / 1e9
    yield Claim.tried(
        "PT-DiT-B takes 48.6 % fewer multiplications than DiT-B at 1024 pixels",
        paper="334.2 against 650.5 GFLOPs",
        ours=1 - own / rival,
        interval=(1 - own / rival, 1 - own / rival),
        claimed=(0.481, 0.491),
        against=f"counted with 120 text tokens: {own:.1f} against {rival:.1f} GMAC of DiT-B/2; without "
        f"shifted windows {plain:.1f}",
    )


def of_depth(kind: type[PTDiT], name: str, side: int, frames: int, shift: bool) -> float:
    """Return GMAC of a size told 120 text tokens, from those of one block and of two: all blocks are alike."""
    sums = []
    for depth in (1, 2):
        with torch.device("meta"):
            changes = {"size": side, "shift": shift, "depth": depth, **({"frames": frames} if frames else {})}
            model = kind.preset(name, **changes).eval()
        sums.append(sum(counted(model, side, 120, frames).values()))
    return (sums[0] + (SIZES[name][0] - 1) * (sums[1] - sums[0])) / 1e9


def of_sizes() -> Iterator[Claim]:
    """Yield the claims on the multiplications of H and of XL's clips, counted on the meta device."""
    for name, kind, frames, table, rival in (
        ("H", PTDiT, 0, GFLOPS_H, "Lumina-Next 1.7B"),
        ("XL", VideoPTDiT, 48, GFLOPS_XL, "CogVideoX-2B"),
    ):
        for side, (printed, theirs) in table.items():
            own, plain = (of_depth(kind, name, side, frames, shift) for shift in (True, False))
            of_clip = f", {frames} latent frames" if frames else ""
            yield Claim.tried(
                f"PT-DiT-{name} takes {printed:,} GFLOPs at {8 * side} pixels{of_clip}",
                paper=f"{printed:,}, of {rival} {theirs:,}",
                ours=own,
                interval=(own, own),
                claimed=(printed * (1 - NEAR), printed * (1 + NEAR)),
                unit="GMAC",
                against=f"counted with 120 text tokens, {own / printed - 1:+.1%} of what is printed; without shifted "
                f"windows {plain:,.1f}, {plain / printed - 1:+.1%}; {rival} is not counted",
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
            "Qihoo-T2I has an FID of 15.70 on MS-COCO",
            "FID-30K 15.70; PixArt-alpha 10.65, FLUX 22.76",
            "takes weights, which are not published, T5 and a GPU",
        ),
        (
            "Windows of 2 x 2 are better than of 4 x 4 and of 8 x 8 at 256 pixels",
            "FID-50K of S-Class 19.30, 21.24 and 20.43",
            "the pictures here have 8 x 8 tokens, which are one window of 8 x 8; 16 x 16 take six more trainings",
        ),
        (
            "Qihoo-T2V is better than CogVideoX-2B on UCF-101 and MSR-VTT",
            "FVD 384.03 against 680.11; 375.23 against 418.14",
            "takes weights, which are not published, T5 and a GPU",
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


def main(steps: int = 50, seeds: int = 3) -> None:
    """Try the claims.

    Args:
        steps: of each training. seeds: of each arm.
    """
    torch.set_num_threads(1)
    write(
        "31-pt-dit", [*of_multiplications(), *of_sizes(), *of_seconds(), *of_losses(steps, seeds), *untried()]
    )


if __name__ == "__main__":
    tyro.cli(main)
