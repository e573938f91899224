"""Claims of CLEAR on a trained clip model: windows at equal density before training, and students of its distillation.

python benchmarks/claims/21_clear.py      writes benchmarks/results/claims/21-clear.json and fills the page

Before training, the error of attention's output is that of benchmarks/claims/18_grat.py. Students are digits-video-dit
on clips of 4 frames, 256 tokens, its attention alone trained under a window over all frames; arms share batches, noise
and times. A student's error is the squared distance of its prediction to the model's with all pairs, on the same
held-out draws, over the square of the latter's distance to the data. Intervals are over clips.
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

import ditkit
from ditkit.attention.grouped import Grouped
from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.attention.pattern import Pattern
from ditkit.bench.claims import write
from ditkit.bench.paired import Draws, bootstrap
from ditkit.core.grid import Grid
from ditkit.data.loading import load_clips
from ditkit.models.video_dit import VideoDiT
from ditkit.systems.claims import Claim
from ditkit.tasks.video.masks import MaskMixture
from ditkit.tasks.video.recipe import MaskedClipDataset
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.loop import train
from ditkit.train.settings import Settings
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.distillation import AttentionDistillation, PredictionDistillation
from ditkit.train.terms.regression import Regression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # states and controls are shared
from attention_controls import Diagonal, RandomBlocks
from attention_states import interpolated, masked, of_tokens, relative_error, states_along, trained_for

MODEL, STEPS, LEVELS = "digits-video-dit", 25, (5, 12, 20)
GRID = Grid(16, 8, 8)
FRAMES, RADIUS, WIDER = 4, 4, 8
CIRCLE = Neighbourhood(radius=RADIUS, span=FRAMES, block=16, kernel="cpu")
SQUARE = Grouped(group=(FRAMES, 4, 8), reach=0, block=16, kernel="cpu")
"""Windows that do not overlap and are not shifted, of a few more keys than the circle has in the mean."""
WIDE = replace(CIRCLE, radius=WIDER)
FIRST = Denoising((Regression(),))
THREE = Denoising((Regression(), PredictionDistillation(), AttentionDistillation()))
SQUARES = ((16, 4, 4), (16, 4, 8))
BLOCKS = (16, 24)


def before_training(count: int) -> Iterator[Claim]:
    """Yield the error of a circle's attention beside square windows and two controls at its density."""
    model = ditkit.load(MODEL)
    states = [state for level in states_along(model, count, STEPS, LEVELS).values() for state in level]
    circle = of_tokens(Neighbourhood(radius=3, span=16, block=16), GRID)
    families = {
        "square windows without shift": [
            of_tokens(Grouped(group=g, reach=0, block=16), GRID) for g in SQUARES
        ],
        "random blocks": [of_tokens(RandomBlocks(each=n, block=16), GRID) for n in BLOCKS],
        "nearest blocks in the order of the sequence": [
            of_tokens(Diagonal(each=n, block=16), GRID) for n in BLOCKS
        ],
    }
    masks = [circle, *(mask for family in families.values() for mask in family)]
    errors = torch.zeros(len(masks), count, dtype=torch.float64)
    for state in states:
        weights = state.weights
        exact = weights @ state.v
        for place, mask in enumerate(masks):
            errors[place] += relative_error(masked(weights, state.v, mask)[0], exact).double() / len(states)
    densities = [mask.double().mean().item() for mask in masks]
    first = 1
    for name, family in families.items():
        part = slice(first, first := first + len(family))
        rival = interpolated(densities[0], densities[part], list(errors[part]))
        off = errors[0] - rival
        yield Claim.tried(
            f"Before training a circle loses less of attention than {name}",
            paper="figure of windows: locality is what counts; no figure without training",
            ours=off.mean().item(),
            interval=bootstrap(off),
            claimed=(None, 0.0),
            unit="relative squared error",
            against=f"{densities[0]:.1%} of pairs; means {errors[0].mean():.3g}, {rival.mean():.3g}; {MODEL} "
            f"{trained_for(model)}, {count} clips",
        )


def clip_model() -> VideoDiT:
    """The trained model on clips of 4 frames: its weights know no number of frames."""
    donor: Any = ditkit.load(MODEL)
    model = VideoDiT(replace(donor.config, frames=FRAMES))
    model.load_state_dict(donor.state_dict())
    return model.eval()


def samples(split: str, length: int) -> MaskedClipDataset:
    """Clips of one digit with their classes, all of which are to be made."""
    config = clip_model().config
    clips = load_clips(
        "moving-digits",
        config.size,
        frames=FRAMES,
        split=split,
        length=length,
        digits=1,
        speed=(1.0, 2.0),
        labels=True,
    )
    return MaskedClipDataset(clips, MaskMixture(region=0, frames=("unconditional",)))


def student(pattern: Pattern, objective: Denoising, steps: int, batch: int) -> VideoDiT:
    """Return the model after distillation under a pattern."""
    torch.manual_seed(0)
    settings = Settings(
        steps=steps,
        batch=batch,
        learning_rate=1e-3,
        warmup=3,
        cosine=True,
        clip=1.0,
        trained="attention",
        averages=(Constant(0.8),),
        save_every=0,
        sheet_every=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        averaged = train(
            clip_model().adopt((pattern,)), samples("train", 4096), objective, settings, Path(folder)
        )
    assert isinstance(averaged, VideoDiT) and averaged.policies == (pattern,)
    return averaged


@torch.no_grad()
def distances(arms: Mapping[str, VideoDiT], draws: int) -> dict[str, Tensor]:
    """Return each arm's error to the model with all pairs, for each held-out draw."""
    held_out, dense = samples("test", draws), clip_model()
    path = dense.config.convention.make_path()
    found: dict[str, list[Tensor]] = {name: [] for name in arms}
    off_data = []
    for batch in Draws(draws).batches(held_out, 32):
        x = path.mix(batch.data, batch.noise, batch.t.float())
        inputs = x, batch.t.float(), batch.cond
        exact, _ = run_with_taps(dense, dense, (), tuple(x.shape[1:]), *inputs)
        off_data.append((exact - batch.data).square().flatten(1).mean(1).double())
        for name, model in arms.items():
            out, _ = run_with_taps(model, model, (), tuple(x.shape[1:]), *inputs)
            found[name].append((out - exact).square().flatten(1).mean(1).double())
    scale = torch.cat(off_data).mean()
    return {name: torch.cat(parts) / scale for name, parts in found.items()}


def of_students(steps: int, batch: int, draws: int) -> Iterator[Claim]:
    """Yield the claims on distillation."""
    three, square = student(CIRCLE, THREE, steps, batch), student(SQUARE, THREE, steps, batch)
    arms = {
        "untrained": clip_model().adopt((CIRCLE,)).eval(),
        "three losses": three,
        "first loss": student(CIRCLE, FIRST, steps, batch),
        "square windows": square,
    }
    error = distances(arms, draws)
    error |= distances({"wider": three.adopt((WIDE,)).eval()}, draws)
    setting = f"{steps} steps of {batch}, {draws} draws"
    keys = ", ".join(
        f"{name} {of_tokens(pattern, Grid(FRAMES, 8, 8)).double().mean():.1%}"
        for name, pattern in (("circle", CIRCLE), ("square", SQUARE))
    )
    for claim, paper, one, other, share, more in (
        ("Distillation takes away half of the error, or more", "COCO FID 47.5 untrained, 33.9 full",
            "three losses", "untrained", 0.5, ""),
        ("All three losses come nearer than the first alone", "no figure that could be read",
            "three losses", "first loss", 1.0, ""),
        ("A circle comes nearer than square windows without shift", "no figure that could be read",
            "three losses", "square windows", 1.0, f"; pairs: {keys}"),
        (
            f"A student of radius {RADIUS} does not collapse at {WIDER}: it is nearer than untrained at {RADIUS}",
            "one model runs at several sizes; no figure",
            "wider",
            "untrained",
            1.0,
            "",
        ),
    ):  # fmt: skip
        off = error[one] - share * error[other]
        yield Claim.tried(
            claim,
            paper=paper,
            ours=off.mean().item(),
            interval=bootstrap(off),
            claimed=(None, 0.0),
            unit="of the dense model's squared error",
            against=f"means {error[one].mean():.3g}, {other} {error[other].mean():.3g}; {setting}{more}",
        )


def of_flux() -> Iterator[Claim]:
    """Yield the number of parameters that are trained in FLUX.1, counted on the meta device."""
    from diffusers import FluxTransformer2DModel

    from ditkit.hosts import flux
    from ditkit.hosts.view import view

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    learned = ("to_q", "to_k", "to_v", "to_out")
    count = sum(
        p.numel() for name, p in model.named_parameters() if any(f".attn.{part}." in name for part in learned)
    )
    pooling = Neighbourhood(pooled=4).modules(flux.sites(view(model)))
    assert pooling is not None
    extra = sum(p.numel() for p in pooling.parameters())
    yield Claim.tried(
        "Attention of FLUX.1 that is trained has 1.794 B parameters",
        paper="1.794 B from its code: projections of the image in 19 blocks, of both in 38",
        ours=count / 1e9,
        interval=(count / 1e9, count / 1e9),
        claimed=(1.7935, 1.7945),
        unit="B",
        against=f"{extra} more where it pools, 16 an attention",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that take FLUX and a GPU."""
    reason = "takes the published weights and a GPU"
    yield Claim.untried("A picture of 8192 x 8192 is 6.3 times as fast", paper="abstract", reason=reason)
    yield Claim.untried(
        "10,000 iterations on 10,000 pictures suffice for FLUX.1",
        paper="abstract",
        reason="takes the published weights, and GPUs for days",
    )
    yield Claim.untried(
        "Ten times the rotary base and the proportional scale serve large pictures",
        paper="its high-resolution notebooks; no figure",
        reason="no model here makes pictures larger than those it was trained on; the base is a test",
    )


def main(count: int = 4, steps: int = 12, batch: int = 8, draws: int = 96) -> None:
    """Try the claims.

    Args:
        count: of clips whose attentions are looked at. steps, batch: of each distillation. draws: held out.
    """
    torch.set_num_threads(1)
    write("21-clear", [*before_training(count), *of_students(steps, batch, draws), *of_flux(), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
