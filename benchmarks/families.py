"""Every family of diffusers' pipelines that has a view: the price of doing nothing, the default, and the rivals.

    python benchmarks/families.py

A tiny random pipeline each, so speeds are of Python rather than of products, and errors say only that a cache acts.
`neutral` draws under a policy that skips nothing: `same` to the bit, and what a step costs more. The caches of
diffusers and cache-dit (`pip install --no-deps cache-dit pyyaml`) are set up as their documentation says; MACs are
counted over the executed shapes, errors are relative L2 to the same pipeline's exact run, MB are the tensors alive
when a transformer returns beyond those of the exact run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.progress import track
from torch import Tensor

import ditkit
from common import Row, record, show
from ditkit.bench.macs import count_macs
from ditkit.bench.timing import alternated
from ditkit.caching import TaylorSeer
from ditkit.metrics.error import relative_l2
from race.contestants import (
    faster_cache,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    taylorseer_cache,
)
from race.course import alone, reason
from race.measure import alive_bytes, fresh_objects

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from family_pipelines_support import ONE_EACH, ready

Told = dict[str, Any]
SetUp = Callable[[Any, Told], Any]
GUIDED_IN_ONE_CALL = ("dit", "latte", "pixart", "sd3", "cogvideox")


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        steps: of a call. rounds: timed calls of each kind. threads: of torch.
        families: those to measure; all, unless named.
    """

    steps: int = 28
    rounds: int = 5
    threads: int = 1
    families: tuple[str, ...] = tuple(ONE_EACH)


@dataclass(frozen=True)
class Drawn:
    """What one call drew, and what it took: MACs, and bytes of the tensors that it kept."""

    samples: Tensor
    macs: int
    held: int


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    rows = [row for family in track(arguments.families) for row in measure(family, arguments)]
    ours = [row for row in rows if row["library"] == "ditkit"]
    show("ditkit", [without(row, "library", "method", "result") for row in ours])
    show("MACs fewer, error", [table_of_rivals(family, rows) for family in arguments.families])
    record("families", rows)


def without(row: Row, *names: str) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in names}


def table_of_rivals(family: str, rows: Sequence[Row]) -> dict[str, str]:
    """One line of the table: each method's saving and error; `-` saves nothing, `x` raises."""
    cells = {"family": family}
    for row in rows:
        if row["family"] == family:
            saves, error = row["fewer_macs"], row["error"]
            text = "x" if saves is None else "-" if row["result"] != "saves" else f"{saves:.2f} {error:.0e}"
            cells[str(row["method"])] = text
    return cells


def measure(family: str, arguments: Arguments) -> Iterator[dict[str, object]]:
    """Ours first, then one row a rival."""
    pipe, told = make(family, arguments.steps)
    exact = draw(pipe, told)
    fast = ditkit.accelerate(make(family, arguments.steps)[0])
    yield {
        "family": family,
        "library": "ditkit",
        "method": "default",
        **compared(draw(fast, told), exact),
        **speed({"exact": pipe, "fast": fast}, told, arguments.rounds),
        **neutral(family, pipe, told, exact, arguments),
    }
    for library, method, set_up in rivals(family):
        row: dict[str, object] = {"family": family, "library": library, "method": method}
        other, told = make(family, arguments.steps)
        try:
            fast = set_up(other, asked(told))
            row |= compared(draw(fast, told), exact)
            row |= speed({"exact": pipe, "fast": fast}, told, arguments.rounds)
        except Exception as error:  # whatever a rival raises is its result
            row |= {
                "result": reason(error)[:80],
                "fewer_macs": None,
                "error": None,
                "MB": None,
                "faster": None,
            }
        yield row | {"neutral_same": None, "neutral_ms_a_step": None}


def make(family: str, steps: int) -> tuple[Any, Told]:
    """The same weights every time, in a class of its own: cache-dit patches the class."""
    pipe, told = ready(ONE_EACH[family])
    pipe.__class__ = alone(type(pipe))
    return pipe, {**told, "num_inference_steps": steps}


def asked(told: Told) -> Told:
    return {**told, "generator": torch.Generator().manual_seed(0)}


@torch.no_grad()
def draw(pipe: Any, told: Told) -> Drawn:
    """One call from the noise of seed 0; some pipelines ask the global generator too."""
    torch.manual_seed(0)
    drawn: list[Tensor] = []

    def call() -> None:
        drawn.append(torch.as_tensor(pipe(**asked(told))[0]))

    macs = count_macs(call).total
    torch.manual_seed(0)
    with fresh_objects(), most_alive(pipe) as alive:
        call()
    return Drawn(drawn[0], macs, max(alive))


@contextmanager
def most_alive(pipe: Any) -> Iterator[list[int]]:
    """Bytes of the tensors made since, each time that a transformer returns."""
    nets = [net for net in (pipe.transformer, getattr(pipe, "transformer_2", None)) if net is not None]
    alive = [0]
    handles = [net.register_forward_hook(lambda *_: alive.append(alive_bytes())) for net in nets]
    try:
        yield alive
    finally:
        for handle in handles:
            handle.remove()


def compared(fast: Drawn, exact: Drawn) -> dict[str, object]:
    saved = exact.macs / fast.macs
    return {
        "result": "saves" if saved > 1.001 else "nothing saved",
        "fewer_macs": saved,
        "error": relative_l2(fast.samples, exact.samples).mean().item(),
        "MB": max(0, fast.held - exact.held) / 1e6,
    }


def speed(pipes: dict[str, Any], told: Told, rounds: int) -> dict[str, object]:
    """How many times less wall clock, the median of ratios within a round."""
    wall = alternated(
        {name: lambda p=pipe: p(**asked(told)) for name, pipe in pipes.items()}, rounds, warmup=1
    )
    return {"faster": median(a / b for a, b in zip(wall["exact"], wall["fast"], strict=True))}


def neutral(family: str, pipe: Any, told: Told, exact: Drawn, arguments: Arguments) -> dict[str, object]:
    idle = ditkit.accelerate(make(family, arguments.steps)[0], TaylorSeer().exact())
    same = torch.equal(draw(idle, told).samples, exact.samples)
    calls = {name: lambda p=one: p(**asked(told)) for name, one in (("exact", pipe), ("idle", idle))}
    wall = alternated(calls, arguments.rounds, warmup=1)
    more = median(b - a for a, b in zip(wall["exact"], wall["idle"], strict=True))
    return {"neutral_same": same, "neutral_ms_a_step": 1e3 * more / arguments.steps}


def rivals(family: str) -> list[tuple[str, str, SetUp]]:
    """The documented setting of each, or the one that its tests use where the documentation gives none."""
    skip = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 901)}
    branch = {
        "unconditional_batch_skip_range": 2,
        "attention_weight_callback": lambda module: 0.5,
        "is_guidance_distilled": family not in GUIDED_IN_ONE_CALL,
    }
    return [
        ("diffusers", "FirstBlockCache", partial(first_block_cache, threshold=0.1)),
        ("diffusers", "TaylorSeerCache", partial(taylorseer_cache, cache_interval=3)),
        (
            "diffusers",
            "TaylorSeerCache lite",
            partial(taylorseer_cache, cache_interval=3, use_lite_mode=True),
        ),
        ("diffusers", "MagCache", partial(mag_cache, threshold=0.24)),
        ("diffusers", "FasterCache", partial(faster_cache, **skip, **branch)),
        ("diffusers", "PAB", partial(pyramid_attention_broadcast, **skip)),
        ("cache_dit", "DBCache F1", db_cache),
    ]


def db_cache(pipe: Any, told: Told) -> Any:
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.2)
    with redirect_stdout(StringIO()):
        cache_dit.enable_cache(pipe, cache_config=config)
    return pipe


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
