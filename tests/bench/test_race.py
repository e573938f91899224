"""The harness of `benchmarks/race_caching.py` on a tiny FLUX: what it measures, and that it sees a bad contestant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ditkit
from ditkit.bench.macs import count_macs
from ditkit.models.small_flux import SmallFluxConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from race.contestants import EXACT, OURS, Contestant, accelerated, contestants, fewer_steps
from race.course import Course, random_flux
from race.heat import Heat
from race.measure import count, overhead_share, spared
from race.robust import Trials
from race_caching import chosen, raced, survived

STEPS = 6
TAYLOR = "taylorseer:interval=3,order=1"
TINY = SmallFluxConfig(size=8, width=32, heads=1, depth=1, single_depth=2)


@pytest.fixture(scope="module")
def course() -> Course:
    return Course(random_flux(TINY).pipeline(), ("coat", "bag"), (0,))


def taylor(pipe: Any, told: Any) -> Any:
    return ditkit.accelerate(pipe, TAYLOR)


def broken(pipe: Any, told: Any) -> Any:
    raise RuntimeError("first line\nsecond line")


def once(pipe: Any, told: Any) -> Any:
    calls = iter([pipe])

    def call(**asked: Any) -> Any:
        return next(calls)(**asked)

    return call


class Leaking:
    """Gives the second half of its steps, ever after, what the first call's last one gave."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.kept, self.inner = pipe, [], pipe.transformer.forward
        pipe.transformer.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.kept) < STEPS // 2:
            self.kept.append(self.inner(*args, **kwargs))
        return self.kept[-1]


def leaking(pipe: Any, told: Any) -> Any:
    return Leaking(pipe).pipe


OF_OURS = Contestant(OURS, "TaylorSeer", "N=3", taylor)


def test_a_count_is_of_the_whole_call(course: Course) -> None:
    told = course.told(STEPS)
    exact, pipe = course.pipeline(), course.pipeline()
    whole = count(exact, exact.transformer, told)
    transformer, fast = pipe.transformer, ditkit.accelerate(pipe, TAYLOR)
    counted = count(fast, transformer, told)
    assert len(whole.macs) == STEPS and len(set(whole.macs)) == 1
    assert sum(counted.macs) == count_macs(fast, **told).total
    assert [macs == whole.macs[0] for macs in counted.macs] == [True, True, False, False, True, False]
    assert 0 < spared(counted.rows, whole.rows) < len(whole.rows)
    assert torch.equal(counted.samples, fast(**told)[0])


def test_one_more_order_holds_what_the_receipts_say(course: Course) -> None:
    alive, receipts = [], []
    for order in (1, 2):
        pipe, told = course.pipeline(), course.told(STEPS)
        fast = ditkit.accelerate(pipe, f"taylorseer:interval=3,order={order}")
        alive.append(count(fast, pipe.transformer, told).alive_bytes)
        receipts.append(fast.report().cost.policy_bytes)
    assert alive[1] - alive[0] == receipts[1] - receipts[0] > 0


def test_overhead_is_time_beyond_the_macs_share() -> None:
    exact_s, exact_macs = [9.0, 2.0, 2.0, 2.0, 5.0], [10, 10, 10, 10]
    assert overhead_share([9, 2, 1, 0.7, 5], [10, 10, 2, 2], exact_s, exact_macs) == pytest.approx(0.225)
    assert overhead_share([9, 3, 3, 3, 5], exact_macs, exact_s, exact_macs) is None


def test_lines_are_those_of_the_set_up() -> None:
    lines = {one.name: one.lines for one in (EXACT, OF_OURS, Contestant(OURS, "", "", accelerated))}
    assert lines == {"exact": 0, "TaylorSeer N=3": 1, "": 2}
    assert all(one.lines > 1 for one in contestants())


def test_a_race_lists_who_is_absent_and_who_fails(course: Course) -> None:
    field = [
        fewer_steps(3),
        OF_OURS,
        Contestant("absent_library", "X", "", taylor),
        Contestant(OURS, "Y", "", broken),
        Contestant(OURS, "Z", "", once),
    ]
    heat = Heat(course, field, STEPS, course.pipeline()(**course.told(20))[0])
    heat.time(2)
    exact, fewer, ours = heat.rows()
    assert (
        exact["exact_db"] is None
        and exact["fewer_macs"] == exact["speedup"] == 1
        and exact["held_bytes"] == 0
    )
    assert fewer["fewer_macs"] == 2 and fewer["exact_db"] == fewer["control_exact_db"]
    assert ours["fewer_macs"] > 1.5 and ours["skip_overhead"] is not None
    assert ours["converged_db"] != ours["control_converged_db"]
    assert [row["reason"] for row in heat.failed()] == [
        "absent: absent_library is not installed",
        "RuntimeError: first line",
        "when called again: StopIteration",
    ]
    assert chosen(field, [exact, fewer, ours]) == [fewer_steps(3), OF_OURS]
    assert raced(ours)["layers"] == f"{ours['layers_spared']}/{ours['layers']}"


def test_contestants_share_weights_and_nothing_else(course: Course) -> None:
    one, other = course.pipeline(), course.pipeline()
    assert type(one) is not type(other) and type(one).__name__ == "FluxPipeline"
    assert one.transformer is not other.transformer
    pairs = zip(one.transformer.parameters(), other.transformer.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    exact = other(**course.told(STEPS))[0]
    leaking(one, {})
    assert not torch.equal(one(**course.told(STEPS))[0], exact)
    assert torch.equal(other(**course.told(STEPS))[0], exact)


def test_trials_pass_a_good_contestant_and_see_a_leak(course: Course) -> None:
    good = Trials(course, OF_OURS, STEPS)
    assert good.after_interrupt() == good.after_other_call(3) == "same"
    assert good.image_to_image().endswith(" dB")
    bad = Trials(course, Contestant(OURS, "leaking", "", leaking), STEPS)
    assert bad.after_interrupt().startswith("differs, ")


def test_one_setting_of_ours_saves_on_every_family(course: Course) -> None:
    row = Trials(course, Contestant(OURS, "ditkit", "", accelerated), STEPS).row()
    assert row["saves_on"] == ["FLUX", "SD3", "DiT", "Wan", "Lumina2"]
    shown = survived({**row, "set_up_lines": 2, "idle_overhead": None})
    assert shown["saves_on"] == "all" and shown["after_interrupt"] == "same"
