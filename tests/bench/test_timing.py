import time

import pytest

from ditkit.bench.timing import alternated, medians, seconds_of
from ditkit.core.errors import ConfigError


def test_functions_take_turns_and_the_order_is_reversed_every_other_round():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ABC"}
    seconds = alternated(functions, rounds=3, warmup=2)
    assert "".join(calls) == "ABC" + "CBA" + "ABC" + "CBA" + "ABC"
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_a_steady_drift_cancels_over_two_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ditkit.bench.timing.time.perf_counter", lambda: now[0])
    speed = [1.0]

    def work() -> None:
        now[0] += speed[0]
        speed[0] += 0.1

    seconds = alternated({"A": work, "B": work, "C": work}, rounds=2, warmup=0)
    assert {name: sum(values) for name, values in seconds.items()} == pytest.approx(
        {"A": 2.5, "B": 2.5, "C": 2.5}
    )


def test_seconds_cover_the_call():
    assert seconds_of(lambda: time.sleep(0.02)) >= 0.02


def test_progress_counts_warm_up_and_ends_at_the_total():
    seen: list[tuple[int, int]] = []
    alternated(
        {"A": int, "B": int}, rounds=2, warmup=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 6) for i in range(1, 7)]


def test_medians_ignore_one_slow_run():
    assert medians({"A": [1.0, 100.0, 1.2], "B": [2.0, 4.0]}) == {"A": 1.2, "B": 3.0}


@pytest.mark.parametrize(
    ("functions", "rounds", "warmup"), [({}, 1, 0), ({"A": int}, 0, 0), ({"A": int}, 1, -1)]
)
def test_nothing_to_time_is_refused(functions, rounds, warmup):
    with pytest.raises(ConfigError, match=f"{len(functions)} functions, rounds={rounds}, warmup={warmup}"):
        alternated(functions, rounds, warmup=warmup)
