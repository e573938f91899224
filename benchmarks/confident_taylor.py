"""CG-Taylor's small experiment: error to the exact run of the same seeds, by threshold (its specification's check 2).

    python benchmarks/confident_taylor.py

On the shipped model, Euler, both branches of guidance in one call as the paper's DiT has them; DDIM draws the same
on this path, so it is not swept. Each batch is gated on its own. Beside it, with as many full evaluations: the same
list with h_L reused (O_L = 0), a list of equal intervals, TaylorSeer, and the exact sampler in fewer steps. The squared
error is a mean over samples and pixels, in units of the data range [-1, 1].

On the states of the exact run, the gate's e is ranked against the true error of the last block's forecast: over
all evaluations, and over those next to a full one, where no growth with distance can make the two agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import tyro
from rich.progress import track
from torch import Tensor

import ditkit
from common import record, show
from ditkit.caching.confident_taylor import ConfidentTaylor, relative_error
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.core.run import Call
from ditkit.core.spec import spec
from ditkit.sample import Samples, sample
from ditkit.sample.guidance import ClassifierFree
from ditkit.sample.solvers import Ddim, Euler, Solver

PUBLISHED = ConfidentTaylor()
RIVALS = ("equal_intervals", "reused", "taylorseer", "fewer_steps")
FIFTHS = 5
EULER = Euler()
CORRELATED = 0.6


@dataclass(frozen=True)
class Arguments:
    """Sizes of the experiment.

    Args:
        model: a shipped model's name or a folder. count: pictures, with labels spread over the classes.
        batch: pictures that share a gate. steps, guidance: of the sampler. thresholds: of CG-Taylor.
    """

    model: str = "emoji"
    count: int = 16
    batch: int = 4
    steps: int = 50
    guidance: float = 2.0
    thresholds: tuple[float, ...] = (0.004, 0.008, 0.016, 0.03, 0.06)


class Gated(NamedTuple):
    """One batch at one threshold: the full evaluations, and the squared error of each picture by method, [B]."""

    full: tuple[int, ...]
    errors: dict[str, Tensor]


class CallSnapshot(NamedTuple):
    """One evaluation whose gate was asked: how far from the latest full one it is, e, and the true error of h_L."""

    place: int
    distance: int
    gate: float
    true: float


class Results(NamedTuple):
    """Tables: one row a threshold, twice; one a policy; one a claim."""

    rows: list[dict[str, float]]
    fifths: list[dict[str, float]]
    memory: list[dict[str, object]]
    verdicts: list[dict[str, object]]


def main(arguments: Arguments) -> None:
    results = experiment(arguments)
    show(f"squared error to the exact {arguments.steps} steps, {arguments.count} pictures", results.rows)
    show("by fifth of the trajectory", results.fifths)
    show("memory", results.memory)
    show("checks", results.verdicts)
    record("confident_taylor", [row for table in results for row in table])


def experiment(arguments: Arguments) -> Results:
    model = ditkit.load(arguments.model)
    batches = list(torch.arange(arguments.count).split(arguments.batch))
    runs: dict[float, list[Gated]] = {threshold: [] for threshold in arguments.thresholds}
    asked: dict[float, list[list[CallSnapshot]]] = {threshold: [] for threshold in arguments.thresholds}
    for seeds in track(batches, description="batches"):
        with outputs(model, 0) as first, outputs(model, model.config.depth - 1) as last:
            exact = draw(model, seeds, arguments).samples
        for threshold in arguments.thresholds:
            runs[threshold].append(gated(model, seeds, exact, threshold, arguments))
            asked[threshold].append(questions(model, threshold, first, last))
    told = [(threshold, runs[threshold], asked[threshold]) for threshold in arguments.thresholds]
    rows = [row(*one) for one in told]
    fifths = [histogram(*one, arguments.steps) for one in told]
    memory = held(model, batches[0], arguments)
    ddim = draw(model, batches[-1], arguments, solver=Ddim()).samples
    verdicts = judge(rows, fifths, memory, mse(ddim, exact))
    return Results(rows, fifths, memory, verdicts)


def mse(x: Tensor, y: Tensor) -> float:
    return (x - y).square().mean().item()


def draw(
    model: Model,
    seeds: Tensor,
    arguments: Arguments,
    *policies: Policy,
    steps: int | None = None,
    solver: Solver = EULER,
) -> Samples:
    labels = seeds * model.config.classes // arguments.count
    return sample(
        model,
        Cond(label=labels),
        seeds.tolist(),
        steps=steps or arguments.steps,
        solver=solver,
        guidance=ClassifierFree(arguments.guidance),
        policies=policies,
        batched=True,
    )


@contextmanager
def outputs(model: Model, block: int) -> Iterator[list[Tensor]]:
    """What each call of one block returned."""
    kept: list[Tensor] = []
    hook = model.get_submodule(f"blocks.{block}").register_forward_hook(
        lambda _module, _given, out: kept.append(out)
    )
    yield kept
    hook.remove()


def gated(model: Model, seeds: Tensor, exact: Tensor, threshold: float, arguments: Arguments) -> Gated:
    """The gate's error, and that of each rival with as many full evaluations."""
    with_gate = draw(model, seeds, arguments, ConfidentTaylor(threshold))
    (receipt,) = with_gate.receipts
    full = tuple(receipt.full("cond+uncond"))
    spread = equal_intervals(len(full), arguments.steps)
    drawn = {
        "gate": with_gate,
        "equal_intervals": draw(model, seeds, arguments, ConfidentTaylor(schedule=spread)),
        "reused": draw(model, seeds, arguments, ConfidentTaylor(schedule=full, last_order=0)),
        "taylorseer": draw(model, seeds, arguments, taylorseer(len(full), arguments.steps)),
        "fewer_steps": draw(model, seeds, arguments, steps=len(full)),
    }
    return Gated(full, {name: (d.samples - exact).square().flatten(1).mean(1) for name, d in drawn.items()})


def equal_intervals(count: int, steps: int) -> tuple[int, ...]:
    """`count` of `steps` evaluations: those that the gate may not skip, and the others evenly between them."""
    start = PUBLISHED.warmup
    places = torch.linspace(start, steps - 1, count - start, dtype=torch.float64).round()
    return (*range(start), *(int(place) for place in places))


def taylorseer(count: int, steps: int) -> TaylorSeer:
    """The same order with `count` full evaluations, its warmup nearest to CG-Taylor's."""
    choices = [
        TaylorSeer(interval, PUBLISHED.last_order, warmup)
        for interval in range(2, steps)
        for warmup in range(1, steps)
    ]
    fitting = [choice for choice in choices if len(choice.full_steps(steps)) == count]
    return min(fitting, key=lambda choice: abs(choice.warmup - PUBLISHED.warmup - 1))


def questions(model: Model, threshold: float, first: list[Tensor], last: list[Tensor]) -> list[CallSnapshot]:
    """The gate's questions over the states of an exact run, where the true h_L is known in each evaluation."""
    session = ConfidentTaylor(threshold).start(model.sites(), len(first))
    asked = []
    for index, (h_1, h_L) in enumerate(zip(first, last, strict=True)):
        lane = session.state.get(("main", "cond"))
        if lane is not None and index > PUBLISHED.warmup:
            (one,), (other,) = lane.first, lane.last
            errors = (relative_error(series.at(index), h).item() for series, h in ((one, h_1), (other, h_L)))
            asked.append(CallSnapshot(index, index - other.anchor, *errors))
        session.through(Call(index, len(first), 1.0), partial(after, (h_1, h_L)), h_1)
        session.commit()
    return asked


def after(states: tuple[Tensor, Tensor], _x: Tensor, start: int, _stop: int | None = None) -> Tensor:
    """A stack of which only h_1 and h_L are known: its first block, then all the others."""
    return states[start]


def rank_correlation(asked: list[CallSnapshot]) -> float:
    """Spearman's, of e and the true error."""
    columns = torch.tensor([(one.gate, one.true) for one in asked]).T
    return torch.corrcoef(columns.argsort(-1).argsort(-1).double())[0, 1].item()


def nearest_only(asked: list[CallSnapshot]) -> list[CallSnapshot]:
    return [one for one in asked if one.distance == 1]


def row(threshold: float, runs: list[Gated], asked: list[list[CallSnapshot]]) -> dict[str, float]:
    errors = {name: torch.cat([run.errors[name] for run in runs]) for name in ("gate", *RIVALS)}
    better = {name: (errors["gate"] <= errors[name]).double().mean().item() for name in RIVALS}
    return {
        "threshold": threshold,
        "full": sum(len(run.full) for run in runs) / len(runs),
        **{f"mse_{name}": error.mean().item() for name, error in errors.items()},
        **{f"better_than_{name}": share for name, share in better.items()},
        "rank_correlation": median(rank_correlation(one) for one in asked),
        "rank_correlation_at_distance_1": median(rank_correlation(nearest_only(one)) for one in asked),
    }


def histogram(
    threshold: float, runs: list[Gated], asked: list[list[CallSnapshot]], steps: int
) -> dict[str, float]:
    """By fifth of the trajectory: full evaluations a batch, those the gate asked for, and how much e understates."""
    forced = {*range(PUBLISHED.warmup + 1), steps - 1}
    table: dict[str, float] = {"threshold": threshold}
    for i in range(FIFTHS):
        span = range(i * steps // FIFTHS, (i + 1) * steps // FIFTHS)
        full = [s for run in runs for s in run.full if s in span]
        ratios = [one.true / one.gate for batch in asked for one in batch if one.place in span]
        table |= {
            f"full_{i + 1}": len(full) / len(runs),
            f"asked_{i + 1}": len([s for s in full if s not in forced]) / len(runs),
            f"true_error_over_e_{i + 1}": median(ratios),
        }
    return table


def held(model: Model, seeds: Tensor, arguments: Arguments) -> list[dict[str, object]]:
    """Bytes that each policy held at most, and tensors as the specifications count them, one of h_l's shape."""
    branches, order = 2 * model.config.depth, PUBLISHED.last_order
    one = 2 * len(seeds) * model.layout(model.sample_shape)[0].length * model.config.width * 4
    table = [
        (TaylorSeer(4, order), branches * (order + 1)),
        (ConfidentTaylor(first_order=order, last_order=order), 2 * (order + 1)),
        (PUBLISHED, PUBLISHED.first_order + 1 + PUBLISHED.last_order + 1),
    ]
    bytes_ = [draw(model, seeds, arguments, policy).policy_bytes for policy, _ in table]
    return [
        {
            "policy": spec(policy),
            "held_bytes": size,
            "derived_bytes": tensors * one,
            "times_less_than_taylorseer": bytes_[0] / size,
            "derived_times": table[0][1] / tensors,
        }
        for (policy, tensors), size in zip(table, bytes_, strict=True)
    ]


def judge(
    rows: list[dict[str, float]],
    fifths: list[dict[str, float]],
    memory: list[dict[str, object]],
    ddim_mse: float,
) -> list[dict[str, object]]:
    """Each claim of the specification, at the published threshold and at all; which way it falls is recorded."""
    at = {"published": [row for row in rows if row["threshold"] == PUBLISHED.threshold], "all": rows}
    claims: dict[str, bool] = {}
    for name, chosen in at.items():
        of = f"at {name} threshold{'s' * (name == 'all')}"
        claims |= {
            f"rank correlation of e and the true error >= {CORRELATED} {of}": all(
                row["rank_correlation"] >= CORRELATED for row in chosen
            ),
            f"gate <= equal intervals for most pictures {of}": all(
                row["better_than_equal_intervals"] > 0.5 for row in chosen
            ),
            f"O_L=1 beats O_L=0 {of}": all(row["mse_gate"] < row["mse_reused"] for row in chosen),
            f"gate beats fewer exact steps {of}": all(
                row["mse_gate"] < row["mse_fewer_steps"] for row in chosen
            ),
            f"gate beats TaylorSeer {of}": all(row["mse_gate"] < row["mse_taylorseer"] for row in chosen),
        }
    inner = {
        kind: [max(row[f"{kind}_{i}"] for i in range(2, FIFTHS)) for row in fifths]
        for kind in ("full", "asked")
    }
    for kind, place in ((kind, place) for kind in inner for place in (1, FIFTHS)):
        ends = [row[f"{kind}_{place}"] > most for row, most in zip(fifths, inner[kind], strict=True)]
        claims[f"more {kind} evaluations in fifth {place} than in any inner one"] = all(ends)
    claims |= {
        "memory is as derived": all(row["held_bytes"] == row["derived_bytes"] for row in memory),
        "DDIM draws as Euler does": ddim_mse < 1e-8,
    }
    return [{"claim": claim, "holds": holds} for claim, holds in claims.items()]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
