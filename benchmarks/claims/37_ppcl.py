"""Claims of PPCL: planted spans, then 4 of the 12 blocks of the shipped fashion-dit taken away by several rules.

python benchmarks/claims/37_ppcl.py      writes benchmarks/results/claims/37-ppcl.json and fills the page

In the first part affine maps are hidden among nonlinear blocks, at places that a seed draws, and the detector is to
find them; the interval of its share is Clopper and Pearson's, of other draws of such networks. In the second, students of the spans of each rule learn for the same steps from the same pictures, noise and
times, and the pruned networks are judged on 2,048 held-out draws. Their intervals are of the draws, not of other runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from scipy.stats import binomtest
from torch import Tensor, nn

import ditkit
from ditkit.api.compress import drawn_for
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap, paired_loss
from ditkit.compress import Calibration, Contiguous, plug, recording
from ditkit.compress.contiguous import written
from ditkit.compress.spans import Probes, Span, find_spans
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.model import Model
from ditkit.data.loading import load_images
from ditkit.models.dit import DiT, DiTConfig
from ditkit.systems.claims import Claim
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.loop import train
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.terms.span_distillation import SpanDistillation

REMOVED = 4
HIDDEN = DiTConfig(
    size=16, patch=4, channels=1, width=32, depth=14, heads=2, classes=4, convention=Convention()
)


class Pictures:
    """Garments in [-1, 1], [1, 32, 32], as the donor has them."""

    def __init__(self, split: str) -> None:
        self.images = load_images("fashion", 32, split=split)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, rng: SampleRNG | None = None) -> tuple[Tensor, Cond]:
        return self.images.images_float(indices), Cond(label=self.images.labels[indices])


class Planted(nn.Module):
    """A block in the place of a network's own: an affine map close to none, or one that no affine map is like."""

    def __init__(self, width: int, affine: bool, draw: torch.Generator) -> None:
        super().__init__()
        self.affine = affine
        self.matrix = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
        self.shift = torch.randn(width, generator=draw)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        if self.affine:
            return x + 0.3 * x @ self.matrix + 0.1 * self.shift
        return 2 * torch.sin(3 * x @ self.matrix)


def planted(spans: Sequence[Span], seed: int) -> DiT:
    """A network whose spans are affine after their first block."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = DiT(HIDDEN).eval()
        nn.init.normal_(model.head.out.weight)
    inside = {n for first, last in spans for n in range(first + 1, last + 1)}
    for i, block in enumerate(model.blocks):
        stand_in = Planted(HIDDEN.width, i in inside, draw)
        block.forward = stand_in.forward  # type: ignore[method-assign]
    return model


def drawn_spans(seed: int) -> tuple[Span, Span]:
    """Two spans of 3 to 5 blocks, with a nonlinear block between them at least."""
    draw = torch.Generator().manual_seed(100 + seed)
    first = int(torch.randint(0, 3, (), generator=draw))
    last = first + int(torch.randint(2, 5, (), generator=draw))
    after = last + 1 + int(torch.randint(0, 2, (), generator=draw))
    return (first, last), (after, min(after + int(torch.randint(2, 5, (), generator=draw)), HIDDEN.depth - 1))


def of_planted(seeds: int) -> Claim:
    """Count in how many networks the detector finds just the hidden spans."""
    exact = []
    for seed in range(seeds):
        spans = drawn_spans(seed)
        model = planted(spans, seed)
        draw = torch.Generator().manual_seed(seed)
        with recording(model) as calls, torch.no_grad():
            for time in (0.2, 0.5, 0.9):
                x = torch.randn(64, 1, 16, 16, generator=draw)
                model(x, torch.full((64,), time), Cond(label=torch.arange(64) % 4))
        probes = Probes.fit(model, Calibration(tuple(calls)), "blocks", HIDDEN.depth)
        found = find_spans(probes.cka, HIDDEN.depth)
        exact.append(float(tuple((one.first, one.last) for one in found) == spans))
        print(f"seed {seed}: hidden {spans}, found {found}", flush=True)
    hits = int(sum(exact))
    interval = binomtest(hits, seeds).proportion_ci(0.95, method="exact")
    return Claim.tried(
        "In most networks the detector finds just the spans that were hidden, affine after their first block among "
        "nonlinear ones",
        paper="none; a test of the method",
        ours=hits / seeds,
        interval=(float(interval.low), float(interval.high)),
        claimed=(0.5, None),
        unit="of networks",
        against=f"{seeds} networks of {HIDDEN.depth} blocks, two spans of 3 to 5 blocks in each, at drawn places",
    )


def merged(removed: Sequence[int]) -> tuple[Span, ...]:
    """Spans of which these blocks go: each with the block that stays before it."""
    spans: list[Span] = []
    for n in sorted(removed):
        if spans and spans[-1][1] == n - 1:
            spans[-1] = (spans[-1][0], n)
        else:
            spans.append((n - 1, n))
    return tuple(spans)


def apart(removed: Sequence[int]) -> bool:
    """Whether no block that stays would belong to two spans."""
    spans = merged(removed)
    return all(after[0] > before[1] for before, after in pairwise(spans))


def random_spans(depth: int, seed: int) -> tuple[Span, ...]:
    """Spans of blocks that are drawn to go."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        removed = (1 + torch.randperm(depth - 1, generator=draw)[:REMOVED]).tolist()
        if apart(removed):
            return merged(removed)


def distilled(donor: Model, spans: Sequence[Span], steps: int, sequential: bool, data: Pictures) -> Model:
    """The donor without the spans' blocks, its students trained from the donor."""
    model = ditkit.compress(donor, Contiguous(spans=tuple(map(written, spans))))
    settings = Settings(
        steps=steps,
        batch=16,
        learning_rate=5e-4,
        warmup=min(16, steps // 4),
        cosine=True,
        betas=(0.9, 0.95),
        precision="float32",
        trained="contiguous",
        averages=(Constant(0.9),),
        save_every=0,
        sheet_every=0,
    )
    objective = Denoising((SpanDistillation(sequential=sequential),))
    with tempfile.TemporaryDirectory() as folder:
        return train(model, data, objective, settings, Path(folder), start=lambda: donor)


def arms_of(
    donor: Model, steps: int, choices: int
) -> tuple[dict[str, Model], Mapping[str, tuple[Span, ...]]]:
    """The pruned networks of all rules, and their spans."""
    open_ = Contiguous(remove=REMOVED)
    found = open_.resolved(donor, drawn_for(donor, open_)).cut
    print("found", found, flush=True)
    data = Pictures("train")
    rules = {"spans": found}
    rules |= {f"random {i}": random_spans(len(donor.blocks), i) for i in range(choices)}  # type: ignore[arg-type]
    arms: dict[str, Model] = {"sequential": distilled(donor, found, steps, True, data)}
    for name, spans in rules.items():
        same = next((other for other in arms if rules.get(other) == spans), None)
        arms[name] = arms[same] if same else distilled(donor, spans, steps, False, data)
        print(name, spans, flush=True)
    return arms, rules


def of_rules(donor: Model, steps: int, choices: int) -> Iterator[Claim]:
    """Yield the differences of held-out losses between rules, and those of plugging spans back one by one."""
    arms, rules = arms_of(donor, steps, choices)
    spans = [written(span) for span in rules["spans"]]
    back = {f"{k} plugged back": plug(donor, arms["spans"], spans=spans[k:]) for k in range(1, len(spans))}
    models = {**arms, **back, "donor": donor}
    judged = paired_loss(models, Pictures("test"))
    print({name: round(judged.mean(name), 5) for name in models}, flush=True)
    setting = f"fashion-dit, 12 blocks to 8, {steps} steps of 16; spans {' '.join(spans)}"
    donor_loss = f"the donor {judged.mean('donor'):.5f}"

    def claim(text: str, paper: str, rivals: Sequence[str]) -> Claim:
        differences = torch.stack([judged.losses["spans"] - judged.losses[rival] for rival in rivals]).mean(0)
        shown = ", ".join(
            f"{rival} {judged.mean(rival):.5f}"
            + (f" ({' '.join(map(written, rules[rival]))})" if rival in rules else "")
            for rival in rivals
        )
        return Claim.tried(
            text,
            paper=paper,
            ours=differences.mean().item(),
            interval=bootstrap(differences),
            claimed=(None, 0.0),
            unit="loss",
            against=f"{setting}; ours {judged.mean('spans'):.5f}, {shown}; {donor_loss}",
        )

    yield claim(
        "Students that are given the teacher's states lose less than students that are given each other's",
        "drop 5.22 % against 14.5 % (Qwen-Image, average of three benchmarks)",
        ["sequential"],
    )
    yield claim(
        "Spans found by probes and CKA lose less than blocks drawn to go",
        "not printed; CKA with a fixed threshold drops 19.7 %",
        [f"random {i}" for i in range(choices)],
    )
    order = ["spans", *back, "donor"]
    steps_back = [judged.losses[after] - judged.losses[now] for now, after in pairwise(order)]
    worst = max(range(len(steps_back)), key=lambda i: steps_back[i].mean().item())
    yield Claim.tried(
        "Plugging the spans back one by one lowers the loss each time, without training: the least of the steps",
        paper="20B, 14B, 12B and 10B from one training: drops 0, 0.42, 3.03 and, fine-tuned, 3.29 %",
        ours=steps_back[worst].mean().item(),
        interval=bootstrap(steps_back[worst]),
        claimed=(None, 0.0),
        unit="loss",
        against=f"{setting}; " + ", ".join(f"{name} {judged.mean(name):.5f}" for name in order),
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that cannot be tried here."""
    yield Claim.untried(
        "Qwen-Image keeps its quality at 14B, 12B and 10B",
        paper="drops of 0.42, 3.03 and 3.29 % over DPG, GenEval and LongText",
        reason="takes the published weights and 8 GPUs",
    )
    yield Claim.untried(
        "FLUX.1-dev keeps more of its quality at 8B than by TinyFusion or HierarchicalPrune",
        paper="drop 4.03 % against 13.80 and 13.38 %, 535 ms against 715 ms of the 12B",
        reason="takes the published weights and GPUs",
    )
    yield Claim.untried(
        "FLUX.1 Lite keeps its quality at 6.5B",
        paper="drop 0.07 % against FLUX.1 Lite, 428 ms",
        reason="takes the published weights and GPUs",
    )
    yield Claim.untried(
        "Weights of four bits after pruning lose much",
        paper="a limitation; no figure is at hand",
        reason="takes the published weights and a GPU's four-bit kernels",
    )
    yield Claim.untried(
        "35 of 60 blocks of Qwen-Image are 1.73 times as fast",
        paper="2625 ms against 1514 ms",
        reason="takes a GPU",
    )
    yield Claim.untried(
        "Spans lose less than the blocks that TinyFusion's search or block influence lets go",
        paper="drop 0.42 % against 8.75 % of TinyFusion (Qwen-Image, 14B)",
        reason="takes another distillation and another 2,048 draws, more than the minutes of a core that this may take",
    )
    yield Claim.untried(
        "Text streams and MLPs are replaced at little loss",
        paper="drop 3.79 % with text, 4.91 % with MLPs, 2.61 % after fine-tuning",
        reason="fashion has two double blocks and 16 letters of text, of which nothing is redundant",
    )


def main(steps: int = 40, choices: int = 2, networks: int = 12) -> None:
    """Try the claims.

    Args:
        steps: of each distillation. choices: that are drawn. networks: with hidden spans.
    """
    torch.set_num_threads(1)
    hidden = of_planted(networks)
    donor: Any = ditkit.load("fashion-dit")
    write("37-ppcl", [hidden, *of_rules(donor, steps, choices), *untried()])


if __name__ == "__main__":
    tyro.cli(main)
