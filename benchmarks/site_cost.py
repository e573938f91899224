"""What a site costs when nothing is attached to it: nanoseconds, and as a share of an exact step.

    python benchmarks/site_cost.py

Gates: site_ns < 1000, share_of_step < 0.01. `named_ns` also has what a block does to call its sites: it makes
their names and binds the attention branch to its run.
"""

from __future__ import annotations

import timeit
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import tyro

from common import record, show
from ditkit.bench.timing import alternated
from ditkit.core.cond import Cond
from ditkit.core.run import DIRECT
from skipped_step import random_model


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        batches: pictures a call. calls: of a site in one run. rounds: alternated runs. threads: of torch.
    """

    batches: tuple[int, ...] = (1, 8)
    calls: int = 100_000
    rounds: int = 9
    threads: int = 2


def branch(x: object, shift: object, scale: object) -> object:
    return x


def named_site(run: object, at: str) -> object:
    return DIRECT.site(at + ".attn", partial(branch, run), 1, 2)


def named_call(run: object, at: str) -> object:
    return branch(run, 1, 2)


@torch.no_grad()
def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    kinds = {
        "plain": lambda: branch(0, 1, 2),
        "site": lambda: DIRECT.site("blocks.0.attn", branch, 0, 1, 2),
        "plain_in_block": lambda: named_call(0, "blocks.0"),
        "site_in_block": lambda: named_site(0, "blocks.0"),
    }
    runs = {name: partial(timeit.timeit, fn, number=arguments.calls) for name, fn in kinds.items()}
    taken = alternated(runs, arguments.rounds)
    ns = {name: 1e9 * median(seconds) / arguments.calls for name, seconds in taken.items()}
    site, named = ns["site"] - ns["plain"], ns["site_in_block"] - ns["plain_in_block"]
    model, rows = random_model(), []
    for batch in arguments.batches:
        x, cond = torch.randn(batch, *model.sample_shape), Cond(label=torch.zeros(batch, dtype=torch.long))
        step = partial(model, x, torch.full((batch,), 0.5), cond)
        step_s = median(alternated({"step": step}, 30, warmup=3)["step"])
        sites = len(model.sites())
        rows.append(
            {
                "batch": batch,
                "sites": sites,
                "site_ns": site,
                "named_ns": named,
                "step_ms": 1e3 * step_s,
                "share_of_step": 1e-9 * sites * named / step_s,
            }
        )
    show("A site without a handler", rows)
    record("site_cost", rows)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
