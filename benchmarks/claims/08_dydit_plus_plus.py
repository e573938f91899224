"""Claims of DyDiT++, tried on the donor `fashion-dit`: a budget of half its blocks' work.

python benchmarks/claims/08_dydit_plus_plus.py      writes benchmarks/results/claims/08-dydit-plus-plus.json

All arms start from the donor, see the same batches, noise and times, and take the same steps: routers that learn, half
of the heads and channels at all times (those with the largest weights), and the MLP of random tokens at the share of
the work that the routers came to. A rival whose share is another by more than 0.02 is not compared. The fourth learns
routers without the complete model and without the fall of the budget.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.bench.claims import write
from ditkit.bench.macs import MacCounter
from ditkit.bench.paired import Draws, PairedLosses, bootstrap, paired_loss
from ditkit.bench.timing import alternated
from ditkit.compress import DyDiT
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
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import Between
from ditkit.train.settings import Group, Settings
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.budget import Budget, kept
from ditkit.train.terms.complete_model import CompleteModel
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from ditkit.train.timesteps import Stratified

BUDGET, NEAR = 0.5, 0.02
LEAST = 0.4
"""A share of the work that random tokens can have: attention alone is 0.385 of it."""
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
def shares_of(model: DiT, count: int) -> Tensor:
    """The share of the blocks' work of held-out draws at even times, [count], from data to noise in each 256."""
    blocks, routes = routed_blocks(model.sites()), named(model.sites(), "choice")
    path, shares = model.config.convention.make_path(), []
    for batch in Draws(count=count).batches(held_out(), 256):
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
    return torch.cat(shares)


@torch.no_grad()
def widths_of(model: DiT) -> Tensor:
    """The masks of heads and groups, all blocks', at 20 even times, [20, groups]; without those that are always on."""
    e, learned = model.time(torch.linspace(0, 999, 20).round()), model.learned["DyDiT"]
    return torch.cat([routers.groups(e)[:, 1:] for routers in learned.values()], 1)  # type: ignore[operator]


class _Sized:
    """The part of a batch that `kept` reads."""

    def __init__(self, data: Tensor) -> None:
        self.data = data


def of_the_budget(model: DiT, share: Tensor) -> Iterator[Claim]:
    """Yield whether the budget is kept, how it is spread, and whether widths follow the time."""
    low, high = bootstrap(share)
    by_time = share.view(-1, 256).mean(0).chunk(4)
    quarters = ", ".join(f"{part.mean():.2f}" for part in by_time)
    yield Claim.tried(
        "The share of the blocks' work stays within 0.02 of the budget of 0.5, over all times",
        paper="57.88 of 118.69 GFLOPs, 0.488, at a budget of 0.5",
        ours=share.mean().item(),
        interval=(low, high),
        claimed=(BUDGET - NEAR, BUDGET + NEAR),
        against=f"{SETTING}, {len(share)} held-out draws; of a sample {share.min():.2f} to {share.max():.2f}; by "
        f"quarters of time from data to noise {quarters}",
    )
    widths = widths_of(model)
    differs = (widths[:, None] != widths[None]).double()
    place = torch.arange(len(widths))
    apart = (place[:, None] - place).abs()
    near, far = (differs[pairs].mean(0) for pairs in (apart == 1, apart >= 10))  # of each head or group
    gain = far - near
    yield Claim.tried(
        "Width masks of neighbouring times differ less than those of times far apart",
        paper="shown as pictures",
        ours=gain.mean().item(),
        interval=bootstrap(gain),
        claimed=(0.0, None),
        unit="of heads and groups",
        against=f"{SETTING}, 20 even times; next to each other {near.mean():.3f}, ten or more apart {far.mean():.3f}; "
        f"interval over the {len(gain)} heads and groups that are chosen, {int((gain != 0).sum())} of which change",
    )


def of_the_rivals(judged: PairedLosses, shares: Mapping[str, float], steps: int) -> Iterator[Claim]:
    """Yield the differences of held-out losses after equal training, where the shares of the work are equal."""
    means = ", ".join(f"{name} {judged.mean(name):.4f} at {shares[name]:.3f}" for name in judged.losses)
    for rival, paper in (
        (
            "static width",
            "no worse than pruned models of as many FLOPs; no figure of them in our specification",
        ),
        ("random tokens", "no figure in our specification"),
    ):
        claim = f"Learned routes have less loss than {rival} at equal MACs after equal training"
        if abs(off := shares["dydit"] - shares[rival]) > NEAR:
            reason = (
                f"the routers came to {shares['dydit']:.3f} of the work, {off:+.3f} from the rival's share"
            )
            yield Claim.untried(claim, paper=paper, reason=reason)
            continue
        found = judged.difference("dydit", rival)
        yield Claim.tried(
            claim,
            paper=paper,
            ours=found.mean,
            interval=found.interval,
            claimed=(None, 0.0),
            unit="loss",
            against=f"{SETTING}, {steps} steps of {BATCH}, 2,048 held-out draws, one seed; losses at shares of the "
            f"blocks' work: {means}",
        )


@torch.no_grad()
def of_collapse(learned: DiT, plain: DiT) -> Claim:
    """Heads and groups that are off at all times, without the complete model and the fall, less with them."""

    def dead(model: DiT) -> Tensor:
        e, routers = model.time(torch.linspace(0, 999, 50).round()), model.learned["DyDiT"].values()  # type: ignore[operator]
        return (torch.cat([router.groups(e)[:, 1:] for router in routers], 1).sum(0) == 0).double()

    with_both, without = dead(learned), dead(plain)
    gain = without - with_both
    return Claim.tried(
        "Without the complete model and the fall of the budget more heads and groups are off at all times",
        paper="said of training without warm-up and complete model, without a figure",
        ours=gain.mean().item(),
        interval=bootstrap(gain),
        claimed=(0.0, None),
        unit="of heads and groups",
        against=f"{SETTING}; with both {with_both.mean():.2f}, without {without.mean():.2f}; one seed, interval over "
        f"the {len(gain)} heads and groups that are chosen",
    )


@torch.no_grad()
def of_the_clock(model: DiT, rounds: int) -> Iterator[Claim]:
    """Yield how many times faster evaluations are than the complete model's, at the same times, on two threads."""
    torch.set_num_threads(2)
    path, times = model.config.convention.make_path(), torch.linspace(999, 0, 6).round()
    data, cond = held_out().batch(torch.arange(16), SampleRNG(0, 0, range(16)))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    noisy = [path.mix(data, noise, t.long().expand(16)) for t in times]  # what a sampler would show it

    def drawn(policy: DyDiT) -> Callable[[], None]:
        def draw() -> None:
            trajectory = Trajectory(model.sites(), [policy], len(times), learned=model.learned)
            for index, t in enumerate(times.tolist()):
                call = Call(index, len(times), (t + 1) / 1000, layout=model.layout((1, 32, 32)))
                trajectory.leave(call, model(noisy[index], torch.full((16,), t), cond, trajectory.run(call)))

        return draw

    policy = model.policies[0]
    arms = {"dense": drawn(policy.exact()), "sliced": drawn(policy)}  # type: ignore[arg-type]
    macs = {}
    for name, draw in arms.items():
        with MacCounter() as counter:
            draw()
        macs[name] = counter.total
    core: dict[str, float] = dict.fromkeys(arms, 0.0)

    def counted(name: str) -> None:
        spent = time.process_time()
        arms[name]()
        core[name] += time.process_time() - spent

    wall = alternated({name: partial(counted, name) for name in arms}, rounds)
    torch.set_num_threads(1)
    logs = (torch.tensor(wall["dense"]) / torch.tensor(wall["sliced"])).log()
    low, high = (torch.tensor(end).exp().item() for end in bootstrap(logs))
    by_core = core["dense"] / core["sliced"]
    saved = macs["dense"] / macs["sliced"]
    yield Claim.tried(
        "Sliced execution at half the budget takes less wall clock than dense execution, at batch 16 on two cores",
        paper="1.73 times on a V100 at a budget of 0.5",
        ours=logs.mean().exp().item(),
        interval=(low, high),
        claimed=(1.0, None),
        unit="times",
        against=f"{SETTING}, held-out garments at six even times, {rounds} rounds in turns on a machine that others "
        f"used; {saved:.2f} times fewer MACs, {by_core:.2f} times less core time",
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


def main(steps: int = 36, rounds: int = 8) -> None:
    """Try the claims.

    Args:
        steps: of every arm. rounds: of the clock.
    """
    torch.set_num_threads(1)
    learned = fine_tuned(donor(), DyDiT(), steps)
    print("dydit", flush=True)
    plain = fine_tuned(donor(), DyDiT(), steps, plain=True)
    static = fine_tuned(sorted_donor(), DyDiT(routes="static", share=BUDGET), steps)
    print("static", flush=True)
    share = shares_of(learned, 512)
    reached = max(share.mean().item(), LEAST)
    random = fine_tuned(donor(), DyDiT(routes="random", share=tokens_for(reached, learned)), steps)
    print("random", flush=True)
    judged = paired_loss({"dydit": learned, "static width": static, "random tokens": random}, held_out())
    shares = {"dydit": share.mean().item(), "static width": BUDGET, "random tokens": reached}
    timed = list(of_the_clock(learned, rounds))
    write(
        "08-dydit-plus-plus",
        [
            *of_the_budget(learned, share),
            *of_the_rivals(judged, shares, steps),
            *timed,
            of_collapse(learned, plain),
            *untried(),
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
