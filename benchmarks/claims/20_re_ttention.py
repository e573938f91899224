"""Claims of Re-ttention on the attentions of a trained clip model: what rho and R each bring, and what reuse brings.

python benchmarks/claims/20_re_ttention.py      writes benchmarks/results/claims/20-re-ttention.json and fills the page

Queries, keys and values of all layers of digits-video-dit are taken at three evaluations in a row, at three noise
levels of its own trajectories. The first is a cache evaluation; in the two after it attention sees a band, plain, with
rho, and with rho and R. The error is the squared distance of its output to that over all pairs, over the square of the
latter; its mean over layers, levels and both evaluations is that of a clip. Intervals are over clips.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.attention.band import Band
from ditkit.attention.reshaped import Reshaped
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.core.grid import Grid
from ditkit.systems.claims import Claim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # states are shared
from attention_states import State, masked, of_tokens, relative_error, states_along, trained_for

MODEL, STEPS, LEVELS, SPARSE = "digits-video-dit", 25, (5, 12, 19), 2
GRID = Grid(16, 8, 8)
KEEPS = {1 / 16: "1/16", 1 / 32: "1/32"}
RAMP = Reshaped().ramp
STAGES = ("the band alone", "with rho", "with rho and R")
REUSE = "the cached output"


def errors(steps: Mapping[int, list[State]], mask: Tensor) -> dict[str, Tensor]:
    """Return the mean error of each stage, and of the output of the cache evaluation taken over, for each clip [B]."""
    parts: dict[str, list[Tensor]] = {name: [] for name in (*STAGES, REUSE)}
    for level in LEVELS:
        for layer, cached in enumerate(steps[level]):
            weights = cached.weights
            whole = weights @ cached.v
            seen, rho = masked(weights, cached.v, mask)
            lost = whole - rho[..., None] * seen
            for use in range(SPARSE):
                now = steps[level + 1 + use][layer]
                weights = now.weights
                exact = weights @ now.v
                band, _ = masked(weights, now.v, mask)
                scaled = (rho + use * RAMP)[..., None] * band
                for name, out in zip((*STAGES, REUSE), (band, scaled, scaled + lost, whole), strict=True):
                    parts[name].append(relative_error(out, exact).double())
    return {name: torch.stack(found).mean(0) for name, found in parts.items()}


def claims(count: int) -> Iterator[Claim]:
    """Yield the order of the stages at both densities, and the comparison with reuse."""
    model = ditkit.load(MODEL)
    noted = {level + use for level in LEVELS for use in range(SPARSE + 1)}
    steps = states_along(model, count, STEPS, noted)
    for keep, share in KEEPS.items():
        mask = of_tokens(Band(keep=keep, block=16), GRID)
        found = errors(steps, mask)
        means = ", ".join(f"{name} {error.mean():.3g}" for name, error in found.items())
        for (before, after), paper in zip(
            ((STAGES[0], STAGES[1]), (STAGES[1], STAGES[2]), (REUSE, STAGES[2])),
            (
                "the motivation: softmax over fewer keys weighs each of them too much; no figure of its own",
                "LPIPS of CogVideoX-2B at 1/32: 0.059, of DiTFastAttn, which keeps R and no rho, 0.098",
                "not compared",
            ),
            strict=True,
        ):
            off = found[after] - found[before]
            yield Claim.tried(
                f"Keeping {share}: less error {after} than {'of ' if before == REUSE else ''}{before}",
                paper=paper,
                ours=off.mean().item(),
                interval=bootstrap(off),
                claimed=(None, 0.0),
                unit="relative squared error",
                against=f"{mask.double().mean():.1%} of pairs; means: {means}; {MODEL} "
                f"{trained_for(model)}, {count} clips",
            )


def untried() -> Iterator[Claim]:
    """Yield the claims that take large models and a GPU."""
    reason = "takes the published weights and a GPU"
    yield Claim.untried(
        "CogVideoX-2B at 1/32 keeps its clips", paper="PSNR 27.96, SSIM 0.894, LPIPS 0.059", reason=reason
    )
    yield Claim.untried(
        "PixArt-alpha at 1/32 loses little",
        paper="GenEval 0.48 to 0.448, HPSv2 30.79 to 27.57",
        reason=reason,
    )
    yield Claim.untried(
        "CogVideoX takes 45 % less time on an H100, its attention 92 % less",
        paper="abstract; the released code has no sparse kernel",
        reason=reason,
    )
    yield Claim.untried(
        "The order holds in clips that are drawn",
        paper="as above",
        reason="drawn clips with and without the correction are in results/attention_error.json",
    )


def main(count: int = 4) -> None:
    """Try the claims.

    Args:
        count: of clips, their labels spread over the classes.
    """
    torch.set_num_threads(1)
    write("20-re-ttention", [*claims(count), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
