"""Claims of HarmoniCa, tried on `fashion-dit` and `emoji`: squared error to the exact run of the same seeds.

python benchmarks/claims/13_harmonica.py      writes benchmarks/results/claims/13-harmonica.json and fills the page

All tables compute half of the (evaluation, branch) pairs of ten steps: the pairs of the highest rates of a training, or
of the rates that it began with, or pairs drawn at random, or every second evaluation. Trainings of one model share the
first rates, labels and noise. The error is a mean over the pixels of a picture, in units of the data range [-1, 1];
intervals are over pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.api.generate import generate
from ditkit.api.harmonise import Harmonising, ModelProcess, Router, Training, frozen
from ditkit.bench.claims import write
from ditkit.bench.macs import MacCounter
from ditkit.bench.paired import bootstrap
from ditkit.caching import ConfidentTaylor, HarmoniCa, TaylorSeer
from ditkit.caching.harmonica import chosen, uniform
from ditkit.core.policy import Policy
from ditkit.sample import ClassifierFree
from ditkit.sample.sampler import Sampling
from ditkit.systems.claims import Bounds, Claim

STEPS, GUIDANCE, SHARE, RANDOM = 10, 1.5, 0.5, 5
QUICK = Harmonising(batch=1, rate=0.3, refresh=12)
"""Few trajectories at a high rate, where the paper has 2,000 at 0.01: a dozen move a logit by 3.6, of first ones that
scatter by 1."""
SHUFFLES = 2000


class Model:
    """A shipped model, its exact pictures, and the errors of others to them."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.model: Any = ditkit.load(name)
        self.branches = sum(site.kind == "branch" for site in self.model.sites())
        self.macs: dict[str, int] = {}
        self.exact = self.drawn("exact")

    def drawn(self, name: str, *policies: Policy) -> Tensor:
        with MacCounter() as counter:
            found = generate(
                self.model,
                seeds=range(self.count),
                steps=STEPS,
                guidance=GUIDANCE,
                policies=policies,
                batch_size=16,
            )
        self.macs[name] = counter.total
        return found.samples

    def error(self, name: str, *policies: Policy) -> Tensor:
        """Squared errors of pictures, [count]."""
        return (self.drawn(name, *policies) - self.exact).double().square().flatten(1).mean(1)

    def trained(self, trajectories: int, **changed: Any) -> Tensor:
        """The rates of a training, [T, M]; a computed branch costs so much that all cost half of the first loss."""
        sampling = Sampling(steps=STEPS, guidance=ClassifierFree(GUIDANCE), batch_size=QUICK.batch)
        settings = replace(QUICK, trajectories=trajectories, **changed)
        process = ModelProcess(self.model, sampling)
        with frozen(self.model):
            first = Training(process, replace(settings, beta=0.0, trajectories=1))
            first.weights = first.proxies(process.start(0)) if settings.proxy != "none" else first.weights
            losses = [lesson.loss for lesson in first.trajectory(process.start(0))]
            beta = 0.5 * sum(losses) / len(losses) / self.branches
            training = Training(process, replace(settings, beta=beta))
            training.run()
        return training.rates()

    def first(self) -> Tensor:
        """The rates that every training begins with, [T, M]."""
        return torch.stack(Router(STEPS, self.branches, QUICK.seed).rates()).detach()

    def rows(self, rates: Tensor) -> tuple[str, ...]:
        return chosen(rates, round(SHARE * rates.numel()))


def versus(
    claim: str,
    paper: str,
    error: Tensor,
    rival: Tensor,
    setting: str,
    claimed: Bounds = (None, 0.0),
    times: float = 1.0,
) -> Claim:
    """The claim that an error is less than so many times a rival's."""
    off = error - times * rival
    return Claim.tried(
        claim,
        paper=paper,
        ours=off.mean().item(),
        interval=bootstrap(off),
        claimed=claimed,
        unit="squared error",
        against=f"{setting}; means {error.mean():.3g}, {rival.mean():.3g}; {len(error)} pictures",
    )


def against_chance(model: Model, learned: Tensor, setting: str) -> Iterator[Claim]:
    """Yield the claims against the table before its training, random tables and every second evaluation."""
    first = model.error("first", HarmoniCa(rows=model.rows(model.first())))
    yield versus(
        f"A learned table has less error than the one that its training began with ({model.name})",
        "none; a control",
        learned,
        first,
        setting,
    )
    shape = (STEPS, model.branches)
    draws = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(RANDOM)]
    random = torch.stack(
        [model.error(f"random {i}", HarmoniCa(rows=model.rows(draw))) for i, draw in enumerate(draws)]
    )
    spread = ", ".join(f"{error.mean():.3g}" for error in random)
    yield versus(
        f"A learned table has at most half the error of random ones that compute as many branches ({model.name})",
        "none; by at least 2 in the specification",
        learned,
        random.mean(0),
        f"{setting}, mean of {RANDOM} random tables: {spread}",
        times=0.5,
    )
    every = model.error("uniform", HarmoniCa(rows=uniform(STEPS)))
    yield versus(
        f"It has less error than computing every second evaluation ({model.name})",
        "none",
        learned,
        every,
        setting,
    )


def of_trainings(model: Model, trajectories: int) -> Iterator[Claim]:
    """Yield the claims on the two parts of the training, and on other caches at equal MACs."""
    setting = (
        f"{model.name}, {STEPS} steps, guidance {GUIDANCE}, half of the branches, {trajectories} trajectories"
    )
    rates = {
        "both": model.trained(trajectories),
        "lambda 1": model.trained(trajectories, proxy="none"),
        "clean": model.trained(trajectories, proxy="none", follow="teacher"),
    }
    errors = {name: model.error(name, HarmoniCa(rows=model.rows(found))) for name, found in rates.items()}
    yield from against_chance(model, errors["both"], setting)
    yield versus(
        "Weights by the image error proxy give a table with less error than equal weights",
        "no figure in our specification",
        errors["both"],
        errors["lambda 1"],
        setting,
    )
    yield versus(
        "Training on the student's own trajectory gives a table with less error than on clean inputs",
        "no figure in our specification",
        errors["lambda 1"],
        errors["clean"],
        f"{setting}, both with equal weights",
    )
    rivals: Sequence[tuple[str, Policy]] = (
        ("TaylorSeer", TaylorSeer(interval=2, order=1, warmup=1)),
        ("the default cache", ConfidentTaylor(interval=2)),
    )
    for name, policy in rivals:
        error = model.error(name, policy)
        shares = ", ".join(f"{model.macs[n] / model.macs['exact']:.3f}" for n in ("both", name))
        yield versus(
            f"Reuse by the table has less error than {name} at about equal MACs",
            "not compared",
            errors["both"],
            error,
            f"{setting}, against {policy}; MACs {shares} of exact",
        )
    yield of_evenness(model.rows(rates["both"]), model.rows(model.first()), setting)


def of_evenness(rows: Sequence[str], first: Sequence[str], setting: str) -> Claim:
    """The claim that evaluations differ in how many branches they compute, beyond what chance gives."""

    def uneven(table: Tensor) -> Tensor:
        return table.sum(-1).var(-1)

    def of_chance(table: Tensor) -> tuple[float, float, float]:
        """The variance over evaluations, by that of chance: each branch's letters in any order; 95 % of its range."""
        g = torch.Generator().manual_seed(0)
        orders = torch.rand(SHUFFLES, *table.shape, generator=g).argsort(1)
        chance = uneven(table.expand(SHUFFLES, -1, -1).gather(1, orders))
        low, high = chance.quantile(torch.tensor([0.025, 0.975], dtype=chance.dtype)).clamp_min(1e-9).tolist()
        own = uneven(table).item()
        return own / chance.mean().item(), own / high, own / low

    tables = [torch.tensor([list(map(float, row)) for row in table[1:]]).double() for table in (rows, first)]
    (ratio, low, high), before = of_chance(tables[0]), of_chance(tables[1])
    counts = " ".join(str(row.count("1")) for row in rows)
    kinds = [sum(row[j::2].count("1") for row in rows[1:]) for j in (0, 1)]
    return Claim.tried(
        "The learned table is not uniform: variance over evaluations of how many branches they compute, over chance's",
        paper="shown as pictures",
        ours=ratio,
        interval=(low, high),
        claimed=(1.0, None),
        unit="times",
        against=f"{setting}; chance is each branch's evaluations but the first in any order, its 95 % gives the "
        f"interval; computed {counts}; of attentions {kinds[0]}, of MLPs {kinds[1]}; before the training "
        f"{before[0]:.2f} ({before[1]:.2f} to {before[2]:.2f})",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that take other models than are here."""
    reason = "takes the published weights and a GPU"
    yield Claim.untried(
        "DiT-XL/2 in 20 steps is 1.44 times faster and nearly lossless",
        paper="1.44 times, FID 3.52 to 4.88",
        reason=reason,
    )
    yield Claim.untried("PixArt-Sigma at 2048 pixels is 1.73 times faster", paper="1.73 times", reason=reason)
    yield Claim.untried(
        "The training takes a quarter less time than Learning-to-Cache",
        paper="25 % less",
        reason="its code reads images; no clock of both on one machine",
    )


def main(trajectories: int = 12, emoji: int = 12, count: int = 6) -> None:
    """Try the claims.

    Args:
        trajectories: of each training on fashion-dit. emoji: of the one on emoji. count: of pictures.
    """
    torch.set_num_threads(1)
    claims = list(of_trainings(Model("fashion-dit", count), trajectories))
    second = Model("emoji", max(4, count // 2))
    error = second.error("both", HarmoniCa(rows=second.rows(second.trained(emoji))))
    setting = f"emoji, {STEPS} steps, guidance {GUIDANCE}, half of the branches, {emoji} trajectories"
    claims += against_chance(second, error, setting)
    write("13-harmonica", [*claims, *untried()])


if __name__ == "__main__":
    tyro.cli(main)
