"""Claims of DyDiT++, tried on the donor `fashion-dit`: a budget of half its blocks' work.

python benchmarks/claims/08_dydit_plus_plus.py      writes benchmarks/results/claims/08-dydit-plus-plus.json

All arms start from the donor, see the same batches, noise and times, and take the same steps: routers that learn, half
of the heads and channels at all times (those with the largest weights), and the MLP of random tokens at equal MACs. The
fourth learns routers without the complete model and without the fall of the budget.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.bench.claims import write
from ditkit.bench.macs import MacCounter
from ditkit.bench.paired import Draws, PairedLosses, bootstrap, paired_loss
from ditkit.compress import DyDiT
from ditkit.core.cond import Cond
from ditkit.core.run import Call, named
from ditkit.core.trajectory import Trajectory
from ditkit.data.sets.fashion import load as load_fashion
from ditkit.models.dit import DiT
from ditkit.nn.routes import routed_blocks
from ditkit.systems.claims import Claim
from ditkit.tasks.image.recipe import ClassDataset
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.loop import train
from ditkit.train.schedules import Between
from ditkit.train.settings import Group, Settings
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.budget import Budget, kept
from ditkit.train.terms.complete_model import CompleteModel
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from ditkit.train.timesteps import Stratified

BUDGET = 0.5
SETTING = "fashion-dit"
BATCH = 16


def donor() -> DiT:
    model = ditkit.load("fashion-dit")
    assert isinstance(model, DiT)
    return model


def sorted_donor() -> DiT:
    """The donor with each block's heads and groups in falling order of their weights, which changes no output."""
    model = donor()
    N = model.config.heads
    with torch.no_grad():
        for block in model.blocks:
            qkv, out, inner, outer = block.attn.qkv, block.attn.out, block.mlp.inner, block.mlp.outer
            order = out.weight.unflatten(1, (N, -1)).square().sum((0, 2)).argsort(descending=True)
            for layer in (qkv.weight, qkv.bias):
                layer.copy_(layer.unflatten(0, (3, N, -1))[:, order].flatten(0, 2))
            out.weight.copy_(out.weight.unflatten(1, (N, -1))[:, order].flatten(1))
            order = outer.weight.unflatten(1, (N, -1)).square().sum((0, 2)).argsort(descending=True)
            for layer in (inner.weight, inner.bias):
                layer.copy_(layer.unflatten(0, (N, -1))[order].flatten(0, 1))
            outer.weight.copy_(outer.weight.unflatten(1, (N, -1))[:, order].flatten(1))
    return model


def tokens_for(share: float, model: DiT) -> float:
    """The share of tokens whose MLP makes this share of the blocks' work."""
    block = routed_blocks(model.sites())[0]
    attn, mlp = block.work(model.layout(model.sample_shape)[0].length)
    return 1 - (1 - share) * (attn + mlp) / mlp


def fine_tuned(model: DiT, policy: DyDiT, steps: int, plain: bool = False) -> DiT:
    """The model after the steps under the policy.

    Args:
        plain: without the complete model and without the fall of the budget.
    """
    terms: list[Any] = [Regression(), VariationalBound()]
    if policy.routes == "learned":
        falls = {"warmup": 1, "hold": 0} if plain else {"warmup": steps // 3, "hold": steps // 30}
        terms += [Budget(target=BUDGET, **falls)]
        terms += [] if plain else [CompleteModel(Between(1.0, 0, steps // 2))]
    settings = Settings(
        steps=steps,
        batch=BATCH,
        learning_rate=2e-4,
        clip=200.0,
        skip_above=200.0,
        groups=(Group("dydit", 40.0),) if policy.routes == "learned" else (),
        averages=(Constant(0.95),),
        save_every=0,
        sheet_every=0,
    )
    model.adopt([policy])
    objective = Denoising(tuple(terms), clock=Stratified(4))
    with tempfile.TemporaryDirectory() as folder:
        return train(model, ClassDataset(load_fashion(32, "train")), objective, settings, Path(folder))  # type: ignore[return-value]


def held_out() -> ClassDataset:
    return ClassDataset(load_fashion(32, "test"))


@torch.no_grad()
def masks(model: DiT, count: int) -> tuple[Tensor, Tensor]:
    """The share of work of held-out draws over all times [count]; and the width masks of 20 even times [20, groups]."""
    blocks, routes = routed_blocks(model.sites()), named(model.sites(), "choice")
    data, path = held_out(), model.config.convention.make_path()
    shares = []
    for batch in Draws(count=count).batches(data, 256):
        u = (torch.arange(len(batch.t)) + batch.t) / len(batch.t)  # as even as the times of a sampler
        t = path.place(u)
        x = path.mix(batch.data, batch.noise, t.float())
        taps = run_with_taps(
            model, model, routes, (1, 32, 32), x, model.config.convention.model_time(t).float(), batch.cond
        ).taps
        done, whole = torch.zeros(len(x)), 0.0
        for block in blocks:
            work = block.work(64)
            for site, macs in zip(block[:2], work, strict=True):
                done, whole = done + macs * kept(_Sized(x), taps[site.name]), whole + macs  # type: ignore[arg-type]
        shares.append(done / whole)
    e = model.time(torch.linspace(0, 999, 20).round())
    learned: Any = model.learned["DyDiT"]
    widths = [learned[site.name.replace(".", "/")].groups(e) for block in blocks for site in block[:2]]
    return torch.cat(shares), torch.cat(widths, 1)


class _Sized:
    """The part of a batch that `kept` reads."""

    def __init__(self, data: Tensor) -> None:
        self.data = data


def of_the_budget(model: DiT) -> Iterator[Claim]:
    """Yield whether the budget is kept, how it is spread, and whether widths follow the time."""
    share, widths = masks(model, 512)
    low, high = bootstrap(share)
    by_time = share.view(-1, 256).mean(0).chunk(4)
    quarters = ", ".join(f"{part.mean():.2f}" for part in by_time)
    yield Claim.tried(
        "The share of the blocks' work stays within 0.02 of the budget of 0.5, over all times",
        paper="57.88 of 118.69 GFLOPs, 0.488, at a budget of 0.5",
        ours=share.mean().item(),
        interval=(low, high),
        claimed=(BUDGET - 0.02, BUDGET + 0.02),
        against=f"{SETTING}, {len(share)} held-out draws; of a sample {share.min():.2f} to {share.max():.2f}; by "
        f"quarters of time from data to noise {quarters}",
    )
    gap = (widths[:, None] != widths[None]).float().mean(-1)
    place = torch.arange(len(widths))
    apart = (place[:, None] - place).abs()
    near, far = gap[apart == 1], gap[apart >= 10]
    difference = far.mean() - near.mean()
    samples = torch.stack(
        [
            far[torch.randint(len(far), (len(far),), generator=torch.Generator().manual_seed(i))].mean()
            for i in range(500)
        ]
    )
    spread = (samples - near.mean()).sort().values
    yield Claim.tried(
        "Width masks of neighbouring times differ less than those of times far apart",
        paper="shown as pictures",
        ours=difference.item(),
        interval=(min(spread[12].item(), difference.item()), max(spread[487].item(), difference.item())),
        claimed=(0.0, None),
        unit="of heads and groups",
        against=f"{SETTING}, 20 even times; next to each other {near.mean():.3f}, ten or more apart {far.mean():.3f}",
    )


def of_the_rivals(judged: PairedLosses, steps: int) -> Iterator[Claim]:
    """Yield the differences of held-out losses at equal MACs after equal training."""
    means = ", ".join(f"{name} {judged.mean(name):.4f}" for name in judged.losses)
    for rival, paper in (
        ("static width", "FID 2.07 against 3 or more of pruned models of as many FLOPs"),
        ("random tokens", "given in an ablation, not read"),
    ):
        found = judged.difference("dydit", rival)
        yield Claim.tried(
            f"Learned routes have less loss than {rival} at equal MACs after equal training",
            paper=paper,
            ours=found.mean,
            interval=found.interval,
            claimed=(None, 0.0),
            unit="loss",
            against=f"{SETTING}, {steps} steps of {BATCH}, 2,048 held-out draws; means {means}",
        )


def of_collapse(learned: DiT, plain: DiT) -> Claim:
    """Routers that are off for every time and token, without the complete model and the fall, less with them."""

    def dead(model: DiT) -> float:
        e, modules = model.time(torch.linspace(0, 999, 50).round()), model.learned["DyDiT"]
        on = torch.cat([m.groups(e)[:, 1:].mean(1, keepdim=True) for m in modules.values()], 1)  # type: ignore[operator]
        return (on.mean(0) == 0).float().mean().item()

    with torch.no_grad():
        with_both, without = dead(learned), dead(plain)
    return Claim.tried(
        "Without the complete model and the fall of the budget more width routers are off at all times",
        paper="said of training without warm-up and complete model, without a figure",
        ours=without - with_both,
        interval=(without - with_both,) * 2,
        claimed=(0.0, None),
        unit="of the width routers",
        against=f"{SETTING}; with both {with_both:.2f}, without {without:.2f}; one seed",
    )


@torch.no_grad()
def of_the_clock(model: DiT, rounds: int) -> Iterator[Claim]:
    """Yield how many times faster evaluations are than the complete model's, at the same times, on two threads."""
    torch.set_num_threads(2)
    data, cond = torch.randn(16, 1, 32, 32), Cond(label=torch.arange(16) % 10)
    times = torch.linspace(999, 0, 10).round()

    def drawn(policy: DyDiT) -> Callable[[], None]:
        def draw() -> None:
            trajectory = Trajectory(model.sites(), [policy], len(times), learned=model.learned)
            for index, t in enumerate(times.tolist()):
                call = Call(index, len(times), (t + 1) / 1000, layout=model.layout((1, 32, 32)))
                trajectory.leave(call, model(data, torch.full((16,), t), cond, trajectory.run(call)))

        return draw

    policy = model.policies[0]
    arms = {"dense": drawn(policy.exact()), "sliced": drawn(policy)}  # type: ignore[arg-type]
    macs = {}
    for name, draw in arms.items():
        with MacCounter() as counter:
            draw()
        macs[name] = counter.total
    wall: dict[str, list[float]] = {name: [] for name in arms}
    core: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in arms if turn % 2 else reversed(arms):
            began, spent = time.perf_counter(), time.process_time()
            arms[name]()
            if turn:
                wall[name].append(time.perf_counter() - began)
                core[name].append(time.process_time() - spent)
    torch.set_num_threads(1)
    ratio = torch.tensor(wall["dense"]) / torch.tensor(wall["sliced"])
    by_core = statistics.median(core["dense"]) / statistics.median(core["sliced"])
    middle = ratio.median().item()
    low, high = bootstrap(ratio)
    saved = macs["dense"] / macs["sliced"]
    yield Claim.tried(
        "Sliced execution at half the budget takes less wall clock than dense execution, at batch 16 on two cores",
        paper="1.73 times on a V100 at a budget of 0.5",
        ours=middle,
        interval=(min(low, middle), max(high, middle)),
        claimed=(1.0, None),
        unit="times",
        against=f"{SETTING}, ten even times, {rounds} rounds in turns on a machine that others used; {saved:.2f} times "
        f"fewer MACs, {by_core:.2f} times less core time",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that take other models than are here."""
    reason = "takes ImageNet or text-to-image data, the published weights and a GPU"
    yield Claim.untried(
        "DiT-XL/2 at a budget of 0.5 has an FID no worse than before", paper="2.27 to 2.07", reason=reason
    )
    yield Claim.untried(
        "FLUX-lite loses no GenEval at 0.71 of its FLOPs", paper="62.06 to 67.51", reason=reason
    )
    yield Claim.untried(
        "The complete model keeps its loss while routers learn",
        paper="none; what its loss in the first stage is for",
        reason="two more arms of 2,048 draws; `CompleteModel` stands in losses.jsonl of every run of the recipe",
    )
    yield Claim.untried(
        "TD-LoRA comes near to training all weights",
        paper="named in the abstract",
        reason="no form of it was published",
    )


def main(steps: int = 48, rounds: int = 6) -> None:
    """Try the claims.

    Args:
        steps: of every arm. rounds: of the clock.
    """
    torch.set_num_threads(1)
    learned = fine_tuned(donor(), DyDiT(), steps)
    print("dydit", flush=True)
    plain = fine_tuned(donor(), DyDiT(), steps, plain=True)
    static = fine_tuned(sorted_donor(), DyDiT(routes="static", share=BUDGET), steps)
    share = tokens_for(BUDGET, learned)
    random = fine_tuned(donor(), DyDiT(routes="random", share=share), steps)
    whole = learned.with_weights(learned.state_dict(), "whole").adopt([DyDiT().exact()])
    arms = {
        "dydit": learned,
        "static width": static,
        "random tokens": random,
        "whole": whole,
        "donor": donor(),
    }
    judged = paired_loss(arms, held_out())
    timed = list(of_the_clock(learned, rounds))
    write(
        "08-dydit-plus-plus",
        [
            *of_the_budget(learned),
            *of_the_rivals(judged, steps),
            *timed,
            of_collapse(learned, plain),
            *untried(),
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
