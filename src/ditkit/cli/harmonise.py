"""`ditkit harmonise`: which branches a sampler computes at which step, trained without data, as a table in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ditkit.api.harmonise import Follow, Harmonising, Proxy
from ditkit.api.harmonise import harmonise as harmonised
from ditkit.caching.harmonica import CacheTable
from ditkit.cli.options import ModelName, Prompts
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, Guiding, SamplingFlags
from ditkit.core.errors import ConfigError
from ditkit.core.loading import load
from ditkit.core.model import Denoiser

Float = Annotated[float, tyro.conf.arg(metavar="FLOAT")]


@on_device
def harmonise(
    model: ModelName,
    *,
    trajectories: int = 2000,
    samples: int = 8,
    beta: Float = 7e-8,
    threshold: Float = 0.1,
    rate: Float = 0.01,
    refresh: int = 50,
    proxy: Proxy = "incremental",
    follow: Follow = "student",
    seed: int = 0,
    prompt: Prompts = (),
    flags: Flattened = SamplingFlags(steps=10, guiding=Guiding(guidance=1.5)),
    out: Path = Path("outputs/cache.json"),
) -> None:
    """Train the table of a cache: which branches are computed at which step (HarmoniCa).

    Examples:
        ditkit harmonise emoji --steps 10 --trajectories 150 --rate 0.1 --out outputs/cache.json
        ditkit compare emoji --steps 10 --guidance 1.5 --policy harmonica:table=outputs/cache.json

    Args:
        model: A shipped model, a folder, or owner/name on the Hugging Face hub.
        trajectories: Whole runs of the sampler, each a step of the optimiser an evaluation but the first.
        samples: Drawn in each trajectory.
        beta: Weight of a computed branch; the more, the more is reused.
        threshold: Branches whose rate is above it are computed.
        rate: Learning rate of the table.
        refresh: Trajectories from one weighting of the steps to the next.
        proxy: Weights of the steps: what a step's row changes in the sample beside the rows before it (incremental),
            or alone (isolated); or 1 (none).
        follow: Whose steps a trajectory takes; teacher is a control.
        seed: Of the first table, labels and noise.
        prompt: Text, of a model that takes one. Repeat it for several, which are taken in turn.
        out: File to write.
    """
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}, expected a name that ends in .json")
    network = load(model)
    if not isinstance(network, Denoiser):
        raise ConfigError(f"{model} is a {type(network).__name__}, expected a model that is sampled in steps")
    settings = Harmonising(
        trajectories=trajectories,
        batch=samples,
        beta=beta,
        threshold=threshold,
        rate=rate,
        refresh=refresh,
        proxy=proxy,
        follow=follow,
        seed=seed,
    )
    found = harmonised(network, flags.make((0,)), settings, prompts=prompt, progress=_shown)
    found.save(out)
    Console().print(summary(found), highlight=False, markup=False)
    print(f"wrote {out}; use it with --policy harmonica:table={out}")


def summary(table: CacheTable) -> str:
    """Write the rows of a table, an evaluation a line, and the share that is reused."""
    lines = [f"t={t:.3f}  {row}" for t, row in zip(table.times, table.rows, strict=True)]
    near = sum(abs(r - table.threshold) < 0.05 for row in table.rates for r in row)
    warning = f"; {near} rates are near the threshold, where training saw a mixture" if near else ""
    return "\n".join([*lines, f"reused: {table.reused:.1%} of branches{warning}"])


def _shown(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"\rtrajectory {done} of {total}", end="\n" if done == total else "", file=sys.stderr)
