"""Attention patterns on a trained model: error against what is left of attention, beside controls that cost as much.

    python benchmarks/attention_error.py
    python benchmarks/attention_error.py --model FOLDER --patterns grouped:group=2+4+4,block=32,kernel=cpu
    ditkit train clear-video-dit --init runs/video_dit/model --out runs/clear
    python benchmarks/attention_error.py --students runs/clear/model

Each pattern draws the same seeds as dense attention does, with the weights of the dense model.

- `visited`, `pairs`: share of blocks and of pairs that the pattern's plan lets see each other.
- `attention`, `MACs`: what was really multiplied, over that of the dense run: by attention, and in all.
- `dB`: PSNR of all samples to the dense run's. `limit`: to a dense run of many more steps.
- `random`, `diagonal`: dB of blocks drawn at random, and of those nearest in raster order, of the pattern's size, as
  many as give the same `attention`.
- `best`: dB of as many blocks, for each block of queries those that have most of the softmax, chosen from q and k in
  every evaluation for every head: no method, as it makes all scores, and most of the softmax is not least in dB.
- `reuse`: dB where attention is dense in that share of the evaluations and its last output is taken over in the others.
- `fewer`: dB of dense attention in as many steps as cost the same MACs.
- `tuned`: dB of a student, fine-tuned under the pattern, to the dense run of the model that it was taught by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import tyro
from rich.progress import track

import ditkit
from attention_controls import BestBlocks, Diagonal, RandomBlocks, Reuse
from common import record, show
from ditkit.api.compare import compare
from ditkit.attention.pattern import Pattern
from ditkit.bench.macs import count_macs
from ditkit.bench.plans import Planned, rows_of
from ditkit.bench.rows import Row, titles
from ditkit.core.codec import fingerprint
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.core.spec import component, spec
from ditkit.metrics.error import pooled_psnr_db
from ditkit.sample import Sampler

UNGUIDED = 1.0
PATTERNS = (
    "grouped:group=2+4+4,block=32,reach=0",
    "grouped:group=2+2+2,block=8,reach=1",
    "grouped:group=1+4+4,block=16,reach=1",
    "grouped:group=2+4+4,block=32,reach=1",
    "grouped:group=2+2+2,block=8,reach=2",
    "grouped:group=2+2+2,block=8,meeting=crisscross",
    "band:block=16,keep=0.0625",
    "band:block=16,keep=0.125",
    "band:block=16,keep=0.25",
    "reshaped:block=16,keep=0.0625",
    "reshaped:block=16,keep=0.125",
    "reshaped:block=16,keep=0.25",
    "reshapedgrouped:group=2+2+2,block=8,reach=1",
    "neighbourhood:block=16,radius=2,span=3",
    "neighbourhood:block=16,radius=3,span=5",
)
"""For 16 x 8 x 8 tokens."""


@dataclass(frozen=True)
class Arguments:
    """Sizes of the experiment.

    Args:
        model: a folder, or a shipped model's name. students: folders of models fine-tuned from it under a pattern.
        patterns: as `--policy` takes them. Unless they name a kernel they skip on the processor also where that does
            not pay.
        count: samples. steps: of Euler. converged_steps: of the run that stands for the limit.
        rounds: timed passes. threads: of torch.
    """

    model: str = "runs/video_dit/model"
    students: tuple[str, ...] = ()
    patterns: tuple[str, ...] = PATTERNS
    count: int = 4
    steps: int = 25
    converged_steps: int = 250
    rounds: int = 3
    threads: int = 2


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    rows = experiment(ditkit.load(arguments.model), arguments)
    show(f"{arguments.count} samples in {arguments.steps} steps", [shown(row) for row in rows])
    record("attention_error", rows)


def experiment(model: Denoiser, arguments: Arguments) -> list[dict[str, Any]]:
    students = {forced(spec(one.policies[0])): one for one in map(ditkit.load, arguments.students)}
    patterns = [*(forced(text) for text in arguments.patterns), *students]
    seeds = range(arguments.count)
    report = compare(
        model,
        policies=patterns,
        seeds=seeds,
        steps=arguments.steps,
        guidance=UNGUIDED,
        converged_steps=arguments.converged_steps,
        rounds=arguments.rounds,
        memory=False,
    )
    controls = Controls(model, seeds, arguments.steps)
    measured = {row.name: row for row in report.rows}
    found = [
        (pattern, measured[title.name])
        for pattern, title in zip(patterns, titles(patterns), strict=True)
        if title.name in measured
    ]
    return [
        controls.row(pattern, report.rows[0], row)
        | {
            "tuned_psnr_db": controls.tuned(pattern, students),
            "weights_sha256": fingerprint(model.state_dict()),
        }
        for pattern, row in track(found, description="controls")
    ]


def forced(text: str) -> Pattern:
    """The pattern, which skips on the processor unless its text names another kernel."""
    named = text if "kernel=" in text else f"{text}{',' if ':' in text else ':'}kernel=cpu"
    return component(Pattern, named)  # type: ignore[type-abstract]


class Controls:
    """What costs as much as a pattern, drawn once for each setting."""

    def __init__(self, model: Denoiser, seeds: Sequence[int], steps: int) -> None:
        self.work = Sampler.of(model, seeds=seeds, steps=steps, guidance=UNGUIDED, batch_size=len(seeds))
        self.grid, self.others = rows_of(model, model.sample_shape)
        self.attention = count_macs(self.work.draw).by_kind["attention"]
        self.dense = self.work.draw()
        self.psnr_db = cache(self._psnr_db)

    def row(self, pattern: Pattern, dense: Row, row: Row) -> dict[str, Any]:
        plan = Planned.of(pattern, self.grid, self.others)
        share = 1 - (dense.macs - row.macs) / self.attention
        blocks = -(-self.grid.length // pattern.block)
        each = max(1, min(blocks, round(share * blocks)))
        calls = max(1, round(share * self.dense.evaluations))
        of_blocks = {"block": pattern.block, "kernel": pattern.kernel, "each": each}
        return {
            "pattern": spec(pattern),
            "visited_share": plan.plan.density,
            "pairs_share": plan.pairs_share,
            "attention_share": share,
            "macs_share": row.macs_ratio,
            "seconds": row.seconds,
            "times_as_fast": row.speedup,
            "psnr_db": row.psnr_db,
            "psnr_limit_db": row.psnr_converged_db,
            "dense_psnr_limit_db": dense.psnr_converged_db,
            "control_blocks_share": each / blocks,
            "random_psnr_db": self.psnr_db(RandomBlocks(**of_blocks)),
            "diagonal_psnr_db": self.psnr_db(Diagonal(**of_blocks)),
            "best_psnr_db": self.psnr_db(BestBlocks(**of_blocks)),
            "reuse_dense_evaluations": calls,
            "reuse_psnr_db": self.psnr_db(Reuse(calls)),
            "fewer_steps": row.control_steps,
            "fewer_steps_psnr_db": row.control_psnr_db,
        }

    def tuned(self, pattern: Pattern, students: Mapping[Pattern, Denoiser]) -> float | None:
        """To the dense run of the teacher; None where no student was taught under the pattern."""
        if pattern not in students:
            return None
        work = Sampler.of(students[pattern], sampling=self.work.sampling)
        return pooled_psnr_db(work.draw(policies=[pattern]).samples, self.dense.samples)

    def _psnr_db(self, policy: Policy) -> float | None:
        """To the dense run; None where nothing is off."""
        return pooled_psnr_db(self.work.draw(policies=[policy]).samples, self.dense.samples)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the terminal."""
    keys = {
        "pattern": "pattern",
        "visited": "visited_share",
        "pairs": "pairs_share",
        "attention": "attention_share",
        "MACs": "macs_share",
        "faster": "times_as_fast",
        "dB": "psnr_db",
        "tuned": "tuned_psnr_db",
        "limit": "psnr_limit_db",
        "random": "random_psnr_db",
        "diagonal": "diagonal_psnr_db",
        "best": "best_psnr_db",
        "reuse": "reuse_psnr_db",
        "fewer": "fewer_steps_psnr_db",
    }
    return {name: row[key] for name, key in keys.items()} | {
        "pattern": row["pattern"].replace(",kernel=cpu", "").replace("kernel=cpu", "")
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
