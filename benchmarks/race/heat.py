"""One race: every contestant at one number of steps, in turns, on the same weights and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ditkit.metrics.error import pooled_psnr_db
from race.contestants import EXACT, Contestant
from race.course import Course, reason
from race.measure import Counted, clocked, count, overhead_share, spared

Row = dict[str, Any]


class Heat:
    """What the exact sampler and the contestants took for `steps` steps.

    Those that are absent or fail are not in the rows, but in `failures` with a reason.

    Args:
        converged: what the exact sampler draws in many more steps.
    """

    def __init__(
        self, course: Course, contestants: Iterable[Contestant], steps: int, converged: Tensor
    ) -> None:
        self.course, self.steps, self.converged = course, steps, converged
        self.told = course.told(steps)
        self.fast: dict[Contestant, Any] = {}
        self.counted: dict[Contestant, Counted] = {}
        self.rounds: list[dict[Contestant, list[float]]] = []
        self.failures: dict[Contestant, str] = {}
        self.fewer: dict[int, Tensor] = {}
        for contestant in track([EXACT, *contestants], description=f"{steps} steps, counting"):
            self._enter(contestant)

    def time(self, rounds: int) -> None:
        """Each once a round, in an order that is reversed every other round."""
        for turn in track(range(rounds), description=f"{self.steps} steps, timing"):
            order = list(self.fast)
            self.rounds.append({})
            for contestant in order if turn % 2 == 0 else order[::-1]:
                self._clock(contestant)

    def rows(self) -> list[Row]:
        return [self._row(contestant) for contestant in self.fast]

    def failed(self) -> list[Row]:
        return [
            {"library": one.library, "contestant": one.name, "steps": self.steps, "reason": why}
            for one, why in self.failures.items()
        ]

    def _enter(self, contestant: Contestant) -> None:
        if not contestant.is_installed:
            self.failures[contestant] = f"absent: {contestant.library} is not installed"
            return
        pipe, told = self.course.pipeline(), contestant.asked(self.told)
        transformer = pipe.transformer
        try:
            fast = contestant.set_up(pipe, told)
            self.counted[contestant] = count(fast, transformer, told)
        except Exception as error:  # whatever a contestant raises is its result
            self.failures[contestant] = reason(error)
        else:
            self.fast[contestant] = fast

    def _clock(self, contestant: Contestant) -> None:
        try:
            self.rounds[-1][contestant] = clocked(self.fast[contestant], contestant.asked(self.told))
        except Exception as error:  # the first call did not raise: it left something behind
            self.failures[contestant] = f"when called again: {reason(error)}"
            del self.fast[contestant]

    def _row(self, contestant: Contestant) -> Row:
        counted, whole = self.counted[contestant], self.counted[EXACT]
        share = sum(counted.macs) / sum(whole.macs)
        control = self._exactly(round(self.steps * share))
        timed = list(self._timed(contestant))
        overheads = [overhead_share(taken, counted.macs, dense, whole.macs) for taken, dense in timed]
        known = [share for share in overheads if share is not None]
        return {
            "library": contestant.library,
            "method": contestant.method,
            "contestant": contestant.name,
            "neutral": contestant.neutral,
            "steps": self.steps,
            "seconds": median(sum(taken) for taken, _ in timed),
            "overhead": median(sum(taken) / sum(dense) for taken, dense in timed) - 1,
            "speedup": median(sum(dense) / sum(taken) for taken, dense in timed),
            "fewer_macs": 1 / share,
            "exact_db": pooled_psnr_db(counted.samples, whole.samples),
            "control_exact_db": pooled_psnr_db(control, whole.samples),
            "converged_db": pooled_psnr_db(counted.samples, self.converged),
            "control_converged_db": pooled_psnr_db(control, self.converged),
            "held_bytes": max(0, counted.alive_bytes - whole.alive_bytes),
            "layers_spared": spared(counted.rows, whole.rows),
            "layers": len(whole.rows),
            "set_up_lines": contestant.lines,
            "skip_overhead": median(known) if known else None,
        }

    def _timed(self, contestant: Contestant) -> Iterator[tuple[list[float], list[float]]]:
        """Its seconds and the exact sampler's, of each round."""
        return ((taken[contestant], taken[EXACT]) for taken in self.rounds)

    @torch.no_grad()
    def _exactly(self, steps: int) -> Tensor:
        """What the exact sampler draws in so many steps."""
        if steps not in self.fewer:
            told = self.told | {"num_inference_steps": max(1, steps)}
            self.fewer[steps] = self.fast[EXACT](**told)[0]
        return self.fewer[steps]
