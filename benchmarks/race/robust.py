"""What happens to each method when a pipeline is not called once, from the beginning to the end, as in a race."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from torch import Tensor

from ditkit.metrics.error import pooled_psnr_db
from race.contestants import Contestant, Told
from race.course import Course, reason
from race.families import savings
from race.measure import count, drawn

STRENGTH = 0.5
Row = dict[str, Any]


class Interrupted(Exception):
    """Raised by a callback."""


@dataclass(frozen=True)
class Trials:
    """Calls of `steps` steps by `contestant`, each beside a pipeline that was just set up."""

    course: Course
    contestant: Contestant
    steps: int

    def row(self) -> Row:
        families = savings(self.contestant)
        return {
            "library": self.contestant.library,
            "contestant": self.contestant.name,
            "image_to_image": tried(self.image_to_image),
            "after_interrupt": tried(self.after_interrupt),
            "after_other_call": tried(self.after_other_call),
            "saves_on": [name for name, saving in families.items() if saving.endswith("x")],
            "families": families,
        }

    def image_to_image(self) -> str:
        """Half of the steps, the later ones: MACs saved, and the distance to the exact image-to-image."""
        pipe, plain = (self.course.pipeline(FluxImg2ImgPipeline) for _ in range(2))
        transformer = pipe.transformer
        fast = self.contestant.set_up(pipe, self.course.late(self.steps, STRENGTH))
        taken = count(fast, transformer, self.course.late(self.steps, STRENGTH))
        whole = count(plain, plain.transformer, self.course.late(self.steps, STRENGTH))
        saved = sum(whole.macs) / sum(taken.macs)
        if saved == 1:
            return "saves nothing"
        return f"{saved:.1f}x {decibels(taken.samples, whole.samples)}"

    def after_interrupt(self) -> str:
        """A callback raises in the middle; is the next call as the first call of a fresh pipeline?"""
        told = self.course.told(self.steps)
        fast, fresh = self.fresh(), self.fresh()
        left = iter(range(self.steps // 2))

        def note() -> None:
            if next(left, None) is None:
                raise Interrupted

        with suppress(Interrupted):
            drawn(fast, told, note)
        return same(fast, fresh, told)

    def after_other_call(self, fewer: int = 8) -> str:
        """The one before had another batch, size and number of steps; is this as on a fresh pipeline?"""
        fast, fresh = self.fresh(), self.fresh()
        drawn(fast, self.course.told(self.steps), nothing)
        return same(fast, fresh, self.course.told(self.steps - fewer, first=1, zoom=2))

    def fresh(self) -> Any:
        return self.contestant.set_up(self.course.pipeline(FluxPipeline), self.course.told(self.steps))


@torch.no_grad()
def tried(trial: Callable[[], str]) -> str:
    """What a trial says, or the error that it ended with."""
    try:
        return trial()
    except Exception as error:  # whatever a contestant raises is its result
        return reason(error)


def same(fast: Any, fresh: Any, told: Told) -> str:
    expected = drawn(fresh, told, nothing)
    samples = drawn(fast, told, nothing)
    return "same" if torch.equal(samples, expected) else f"differs, {decibels(samples, expected)}"


def decibels(samples: Tensor, reference: Tensor) -> str:
    if not samples.isfinite().all():
        return "not finite"
    value = pooled_psnr_db(samples, reference)
    return "exact" if value is None else f"{value:.1f} dB"


def nothing() -> None:
    """Nobody looks."""
