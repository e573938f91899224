"""Every cache for diffusers' pipelines on one small FLUX: what it saves, what that costs, and what it survives.

    python benchmarks/race_caching.py

Ours, diffusers' own and cache-dit's (`pip install --no-deps cache-dit pyyaml`) draw the same samples with the same
weights, in turns, beside the exact sampler in fewer steps. What does not run is listed with its reason.

- `faster`: wall clock, the median of ratios within a round. `MACs`: how many times fewer really ran.
- `exact dB`, `limit dB`: PSNR of the final latents, which are pixels in [-1, 1], to the exact run of as many
  steps, and to one of many more. Behind a stroke: of as many exact steps as cost the same MACs.
- `MB`: tensors alive at the end of a step beyond the exact run's, at most. Not that of the process.
- `layers`: linear layers that were computed on fewer rows than exactly.
- `lines`: statements that switch it on, imports too.
- `skip %`: of a step in which something was skipped, the time beyond its MACs at the exact run's rate, as a share of
  an exact step. Norms and the solver are no MACs, and count for all alike.
- `idle %`: time beyond the exact run's at a setting that should skip nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import tyro
from diffusers.utils import logging
from rich.progress import track

from common import record, show
from race.contestants import Contestant, contestants, fewer_steps
from race.course import Course, course
from race.heat import Heat, Row
from race.robust import Trials
from skipped_step import keep_heap

SHARES = (1.5, 2.0, 3.0, 4.0)
"""How many times fewer steps the exact sampler is raced with."""
TRIALS = ("image_to_image", "after_interrupt", "after_other_call")
HALF = 2.0
"""Robustness is asked of each method at the setting whose MACs are nearest to so many times fewer."""


@dataclass(frozen=True)
class Arguments:
    """Sizes of the race.

    Args:
        model: a shipped model's name, a folder, or "random" weights, which say nothing of errors.
        steps: of the races, one table each; robustness is asked at the first. converged_steps: of the run that
            stands for the limit. rounds: timed calls of each contestant. threads: of torch.
        idle_steps, idle_rounds: of the calls that time settings which should skip nothing.
    """

    model: str = "fashion"
    steps: tuple[int, ...] = (28, 50)
    converged_steps: int = 500
    rounds: int = 3
    idle_steps: int = 10
    idle_rounds: int = 12
    threads: int = 2


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    keep_heap()
    logging.set_verbosity_error()
    record("race_caching", race(course(arguments.model), arguments))


def race(lane: Course, arguments: Arguments) -> list[Row]:
    """All rows: of the races, of the settings that should skip nothing, of what did not run, of robustness."""
    known = contestants()
    active = [one for one in known if not one.neutral]
    converged = lane.pipeline()(**lane.told(arguments.converged_steps))[0]
    raced_rows: list[Row] = []
    failed: list[Row] = []
    for steps in arguments.steps:
        fewer = [fewer_steps(round(steps / share)) for share in SHARES]
        heat = Heat(lane, [*fewer, *active], steps, converged)
        heat.time(arguments.rounds)
        rows = heat.rows()
        show(f"{steps} steps; behind a stroke: as many MACs in exact steps", [raced(row) for row in rows])
        raced_rows += rows
        failed += heat.failed()
    idle = Heat(lane, [one for one in known if one.neutral], arguments.idle_steps, converged)
    idle.time(arguments.idle_rounds)
    tough = robustness(lane, chosen(active, raced_rows), arguments.steps[0], idle.rows())
    show("each method at the setting nearest to half of the MACs", [survived(row) for row in tough])
    if failed:
        show("without a row, and why", failed)
    return [*raced_rows, *idle.rows(), *failed, *tough]


def chosen(active: Sequence[Contestant], rows: Sequence[Row]) -> list[Contestant]:
    """Of each method that ran, the setting whose MACs in the first race are nearest to `HALF`."""
    fewer: dict[str, float] = {row["contestant"]: row["fewer_macs"] for row in reversed(rows)}
    ran = [one for one in active if one.name in fewer]
    methods = dict.fromkeys((one.library, one.method) for one in ran)
    return [
        min(
            (one for one in ran if (one.library, one.method) == method),
            key=lambda one: abs(fewer[one.name] - HALF),
        )
        for method in methods
    ]


def robustness(lane: Course, methods: Sequence[Contestant], steps: int, idle: Sequence[Row]) -> list[Row]:
    """With what `idle` says of the method's neutral setting."""
    slower = {row["method"]: row for row in idle}
    rows = []
    for one in track(methods, description="robustness"):
        neutral = slower.get(one.method, {})
        known = {"idle_overhead": neutral.get("overhead"), "idle_fewer_macs": neutral.get("fewer_macs")}
        rows.append({**Trials(lane, one, steps).row(), "set_up_lines": one.lines, **known})
    return rows


def raced(row: Row) -> Row:
    """A row of a race for the terminal."""
    exact, converged = (
        f"{_text(row[name])}/{_text(row['control_' + name])}" for name in ("exact_db", "converged_db")
    )
    return {
        "contestant": row["contestant"],
        "s": f"{row['seconds']:.2f}",
        "faster": f"{row['speedup']:.2f}",
        "MACs": f"{row['fewer_macs']:.2f}",
        "exact_dB": exact,
        "limit_dB": converged,
        "MB": f"{row['held_bytes'] / 1e6:.1f}",
        "layers": f"{row['layers_spared']}/{row['layers']}",
        "skip_%": _percent(row["skip_overhead"]),
    }


def survived(row: Row) -> Row:
    """A row of robustness for the terminal."""
    saves = row["saves_on"]
    return {
        "contestant": row["contestant"],
        "lines": row["set_up_lines"],
        "idle_%": _percent(row["idle_overhead"]),
        **{name: row[name].partition(":")[0] for name in TRIALS},
        "saves_on": "all" if len(saves) == len(row["families"]) else " ".join(saves) or "none",
    }


def _text(decibels: float | None) -> str:
    return "=" if decibels is None else f"{decibels:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
