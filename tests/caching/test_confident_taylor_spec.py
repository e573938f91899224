"""CG-Taylor with a list of full evaluations in place of its gate ("lite Taylor")."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_confident_taylor import Toy, both, square, value

import rig
from ditkit.caching import ConfidentTaylor
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.core.spec import component, spec
from ditkit.core.trajectory import Trajectory
from ditkit.sample import ClassifierFree, sample
from rig import STEPS, call_at, calls, evaluate, noise, tiny_dit


@pytest.mark.parametrize("batched", [False, True], ids=["two calls", "one call"])
def test_the_list_that_a_gate_made_draws_what_the_gate_drew(batched: bool) -> None:
    """The first block's output is only asked, never used."""

    def drawn(policy: Policy) -> Any:
        return sample(
            tiny_dit(),
            Cond(label=torch.arange(2)),
            [0, 1],
            steps=20,
            guidance=ClassifierFree(2.0),
            policies=[policy],
            batched=batched,
        )

    gated = drawn(ConfidentTaylor(0.02))
    (receipt,) = gated.receipts
    full = tuple(receipt.full("cond+uncond" if batched else "cond"))
    assert 4 < len(full) < 15
    listed = drawn(ConfidentTaylor(schedule=full))
    assert torch.equal(listed.samples, gated.samples)
    assert listed.receipts[0].as_dict()["lanes"] == receipt.as_dict()["lanes"]
    assert listed.policy_bytes < gated.policy_bytes


def test_no_block_runs_between_and_the_last_state_goes_on_as_a_line() -> None:
    """With full evaluations at 0, 2, 6, 11 of s^2: 4 + 2k after 2, 36 + 8k after 6, 121 + 17k after 11."""
    toy = Toy(ConfidentTaylor(schedule=(0, 2, 6, 11)), value(square), value(square), 14)
    outs = [float(toy(call)) for call in calls(14)]
    assert outs == [0, 0, 4, 6, 8, 10, 36, 44, 52, 60, 68, 121, 138, 155]
    assert [(index, block) for _, index, block in toy.ran] == [(s, i) for s in (0, 2, 6, 11) for i in (0, 1)]


def test_each_lane_follows_the_list_and_one_that_was_away_is_computed_first() -> None:
    sequence = [c for c in both(14) if c.lane == "cond" or c.index in (3, 4, 5, 12, 13)]
    toy = Toy(ConfidentTaylor(schedule=(0, 2, 6, 11)), value(square), value(square), 14)
    for call in sequence:
        toy(call)
    assert toy.full() == [0, 2, 6, 11]
    assert toy.full("uncond") == [3, 12]


def test_an_evaluation_of_the_list_made_again_is_computed_again() -> None:
    toy = Toy(ConfidentTaylor(schedule=(0, 2, 6)), value(square), value(square), 14)
    assert [float(toy(calls(14)[s])) for s in (0, 1, 2, 2, 3, 6, 6)] == [0, 0, 4, 4, 6, 36, 36]
    assert toy.full() == [0, 2, 2, 6, 6]


@pytest.mark.parametrize("schedule", [(0,), (0, 4), (0, 4, 7)])
def test_bytes_are_told_at_once(schedule: tuple[int, ...]) -> None:
    model, tensors = tiny_dit(), min(2, len(schedule))
    trajectory = Trajectory(model.sites(), [ConfidentTaylor(schedule=schedule)], STEPS)
    (session,) = trajectory.sessions
    with torch.no_grad():
        for index in range(STEPS):
            evaluate(model, trajectory, noise(), call_at(model, index))
            assert session.projected_bytes() == tensors * 2 * 16 * 32 * 4
    assert session.bytes() == session.projected_bytes()


def test_an_interrupted_climb_changes_no_forecast() -> None:
    """Stopped after the stack and before the call was complete; the next one is forecast from what was there."""
    plain, broken = (
        Toy(ConfidentTaylor(0.3, 1, 2), value(square), value(lambda s: s**3), 24) for _ in range(2)
    )
    sequence = calls(24)
    with torch.no_grad():
        for call in sequence[:7]:
            assert torch.equal(plain(call), broken(call))
        broken.trajectory.run(sequence[7]).site("blocks", broken._blocks(sequence[7]), torch.zeros(1))
        assert 7 in broken.full()
        kept = [s.at(9) for s in _series(plain)]
        assert all(torch.equal(a, s.at(9)) for a, s in zip(kept, _series(broken), strict=True))
        assert torch.equal(plain(sequence[8]), broken(sequence[8]))


def _series(toy: Toy) -> list[Any]:
    (lane,) = toy.session.state.values()
    return [*lane.first, *lane.last]


def test_as_text() -> None:
    policy = component(Policy, "confidenttaylor:schedule=0+2+9,last_order=2")  # type: ignore[type-abstract]
    assert policy == ConfidentTaylor(schedule=(0, 2, 9), last_order=2)
    assert component(Policy, spec(policy)) == policy  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": (1, 4)}, r"schedule=\(1, 4\), expected indices from 0 upwards"),
        ({"schedule": (0, 4, 2)}, r"schedule=\(0, 4, 2\), expected indices from 0 upwards"),
        ({"schedule": (0, 2, 2)}, r"schedule=\(0, 2, 2\), expected indices from 0 upwards"),
        ({"schedule": (0, 1.5)}, r"schedule=\(0, 1.5\) should be a tuple of integers of at least 0"),
        ({"schedule": (0, 2), "per_sample_gate": True}, r"schedule=\(0, 2\) asks no gate"),
    ],
)
def test_bad_lists_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConfidentTaylor(**fields)


def test_a_list_longer_than_the_trajectory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule=\(0, 12\), expected indices below total=12"):
        Trajectory(tiny_dit().sites(), [ConfidentTaylor(schedule=(0, 12))], STEPS)


def test_an_interval_is_the_list_of_any_number_of_evaluations():
    assert ConfidentTaylor(interval=3).full_steps(15) == (0, 1, 2, 4, 7, 10, 13)
    assert ConfidentTaylor(interval=1).full_steps(7) == (0, 1, 2, 4, 5, 6)
    assert ConfidentTaylor(interval=5).full_steps(3) == (0, 1, 2)
    assert ConfidentTaylor().full_steps(50) == ()
    model = tiny_dit()
    for interval in (3, 4):
        listed = ConfidentTaylor(interval=interval)
        spelled = ConfidentTaylor(schedule=listed.full_steps(STEPS))
        assert torch.equal(*(rig.sample(model, [policy])["cond"] for policy in (listed, spelled)))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"interval": 3, "schedule": (0, 1)}, r"interval=3 and schedule=\(0, 1\), expected one of the two"),
        ({"interval": 3, "per_sample_gate": True}, "interval=3 asks no gate"),
        ({"interval": -1}, "interval=-1"),
    ],
)
def test_an_interval_that_does_not_fit(given: dict[str, object], line: str):
    with pytest.raises(ConfigError, match=line):
        ConfidentTaylor(**given)


def test_an_interval_with_nothing_to_forecast_is_refused_before_the_first_evaluation():
    with pytest.raises(ConfigError, match="interval=3 forecasts none of total=3 evaluations"):
        Trajectory(tiny_dit().sites(), [ConfidentTaylor(interval=3)], 3)
    neutral = ConfidentTaylor(interval=3).exact()
    assert neutral == neutral.exact() and not neutral.full_steps(50)
