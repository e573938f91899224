"""TaylorSeer's small experiment: error to the exact run of the same seeds, by interval and order (its check 2).

    python benchmarks/taylorseer_orders.py

On the shipped model, for two solvers. Beside each: the exact sampler in as many steps as were full. Checks, printed and
recorded: O=2 <= about O=1 < O=0; O=1 at least 2x better than O=0; error grows with N; and for N <= 4 the forecast
beats fewer exact steps. The squared error is a mean over all samples and pixels, in units of the data range [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import tyro
from rich.progress import track
from torch import Tensor

import ditkit
from common import record, show
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.sample import sample
from ditkit.sample.guidance import ClassifierFree
from ditkit.sample.solvers import Ddim, Euler, Solver

ALMOST = 1.1  # how much worse O=2 may be than O=1 to count as "about as good"


@dataclass(frozen=True)
class Arguments:
    """Sizes of the experiment.

    Args:
        model: a shipped model's name or a folder. count: pictures, with labels spread over the classes.
        steps, guidance: of the sampler. intervals, orders: of TaylorSeer.
    """

    model: str = "emoji"
    count: int = 24
    steps: int = 50
    guidance: float = 2.0
    intervals: tuple[int, ...] = (3, 4, 5, 6)
    orders: tuple[int, ...] = (0, 1, 2, 3)


def main(arguments: Arguments) -> None:
    model = ditkit.load(arguments.model)
    rows, verdicts = [], []
    for solver in (Ddim(), Euler()):
        errors = measure(model, solver, arguments)
        rows += [
            {"solver": type(solver).__name__, "interval": n, "full": errors[n]["full"]}
            | {
                f"mse_{name}": errors[n][name]
                for name in (*(f"O{o}" for o in arguments.orders), "fewer_steps")
            }
            for n in arguments.intervals
        ]
        verdicts += [{"solver": type(solver).__name__, **verdict} for verdict in judge(errors, arguments)]
    show(f"squared error to the exact {arguments.steps} steps, {arguments.count} pictures", rows)
    show("checks", verdicts)
    record("taylorseer_orders", [*rows, *verdicts])


def measure(model: Model, solver: Solver, arguments: Arguments) -> dict[int, dict[str, float]]:
    """For each interval: the error of each order, and of as many exact steps as were full."""
    exact = draw(model, solver, [], arguments.steps, arguments)
    errors: dict[int, dict[str, float]] = {}
    for n in track(arguments.intervals, description=type(solver).__name__):
        full = len(TaylorSeer(interval=n).full_steps(arguments.steps))
        fewer = draw(model, solver, [], full, arguments)
        errors[n] = {"full": full, "fewer_steps": mse(fewer, exact)}
        for order in arguments.orders:
            drawn = draw(model, solver, [TaylorSeer(interval=n, order=order)], arguments.steps, arguments)
            errors[n][f"O{order}"] = mse(drawn, exact)
    return errors


def draw(model: Model, solver: Solver, policies: list[Policy], steps: int, arguments: Arguments) -> Tensor:
    labels = torch.arange(arguments.count) * model.config.classes // arguments.count
    told = Cond(label=labels)
    guidance = ClassifierFree(arguments.guidance)
    seeds = range(arguments.count)
    return sample(
        model, told, seeds, steps=steps, solver=solver, guidance=guidance, policies=policies
    ).samples


def mse(x: Tensor, reference: Tensor) -> float:
    return (x - reference).square().mean().item()


def judge(errors: dict[int, dict[str, float]], arguments: Arguments) -> list[dict[str, object]]:
    """Each claim of the specification, with the figures it rests on."""
    table = list(errors.items())
    claims = {
        "O2 <= about O1 at N 4-6": all(e["O2"] <= ALMOST * e["O1"] for n, e in table if n >= 4),
        "O1 < O0 at N 4-6": all(e["O1"] < e["O0"] for n, e in table if n >= 4),
        "O1 at least 2x below O0 at N=4": 2 * errors[4]["O1"] <= errors[4]["O0"],
        "O1 at least 2x below O0 at N 4-6": all(2 * e["O1"] <= e["O0"] for n, e in table if n >= 4),
        "error grows with N at O=1": all(a["O1"] < b["O1"] for (_, a), (_, b) in pairwise(table)),
        "O2 beats fewer exact steps at N <= 4": all(e["O2"] < e["fewer_steps"] for n, e in table if n <= 4),
        "O1 beats fewer exact steps at N <= 4": all(e["O1"] < e["fewer_steps"] for n, e in table if n <= 4),
    }
    return [{"claim": claim, "holds": holds} for claim, holds in claims.items()]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
