"""`ditkit tune`: which settings are on the front, and which one is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

import ditkit
from ditkit.api.tune import Target, Tuned, expanded, front_of, tune
from ditkit.bench.rows import Row
from ditkit.cli.main import main
from ditkit.cli.tune import decibels
from ditkit.core.errors import ConfigError
from models_support import save_tiny, tiny_model

Capture = pytest.CaptureFixture[str]
COLUMNS = 80
QUICK: Mapping[str, Any] = {"steps": 8, "converged_steps": 9, "rounds": 1}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("taylorseer", ["taylorseer"]),
        ("taylorseer:interval=4,order=1", ["taylorseer:interval=4,order=1"]),
        ("taylorseer:interval=3|4", ["taylorseer:interval=3", "taylorseer:interval=4"]),
        ("x:a=1|2,b=u,c=3|4", ["x:a=1,b=u,c=3", "x:a=1,b=u,c=4", "x:a=2,b=u,c=3", "x:a=2,b=u,c=4"]),
    ],
)
def test_bars_stand_for_several_settings(text: str, settings: list[str]) -> None:
    assert expanded(text) == settings


def test_a_bar_has_values_on_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"'taylorseer:interval=3\|': got 'interval=3\|', expected values"):
        expanded("taylorseer:interval=3|")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "got at_least_db=None, at_most=None, expected one of the two"),
        ({"at_least_db": 30.0, "at_most": 0.5}, "expected one of the two"),
        ({"at_least_db": 0.0}, "at_least_db=0, expected decibels above 0"),
        ({"at_least_db": float("nan")}, "at_least_db=nan"),
        ({"at_most": 1.0}, "at_most=1, expected a share of the time"),
        ({"at_most": float("nan")}, "at_most=nan"),
    ],
)
def test_a_target_is_one_number_in_range(given: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Target(**given)


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    """Three settings of a tiny model; what they measured is replaced where a test says so."""
    return tune(
        tiny_model(), ["taylorseer:interval=2|3|4,order=1"], Target(at_least_db=20), seeds=[0, 1], **QUICK
    )


def with_figures(tuned: Tuned, target: Target, *figures: tuple[float, float | None]) -> Tuned:
    """The exact run, and each setting with a speed-up and a PSNR; None for one that is identical."""
    exact, *rows = tuned.report.rows
    measured = [
        replace(row, speedup=speed, seconds=1 / speed, psnr_db=psnr, identical=psnr is None)
        for row, (speed, psnr) in zip(rows, figures, strict=True)
    ]
    report = replace(tuned.report, rows=(replace(exact, seconds=1.0), *measured))
    return replace(tuned, report=report, target=target)


def front(tuned: Tuned) -> list[str]:
    return [row.name for row in front_of(tuned.report.rows)]


FIGURES = ((1.5, 40.0), (2.0, 30.0), (1.9, 25.0))
TWO, THREE, FOUR = (f"taylorseer:interval={n},order=1" for n in (2, 3, 4))


def test_the_front_has_what_no_other_row_beats(tuned: Tuned) -> None:
    names = [row.name for row in tuned.report.rows]
    found = with_figures(tuned, tuned.target, *FIGURES)
    assert front(found) == names[:3]
    assert front(with_figures(tuned, tuned.target, (2.0, 30.0), (2.0, 30.0), (2.0, 29.0))) == names[:3]
    slower_than_exact = with_figures(tuned, tuned.target, (0.9, 50.0), (1.0, None), (2.0, 1.0))
    assert front(slower_than_exact) == [names[0], names[2], names[3]]


@pytest.mark.parametrize(
    ("target", "best"),
    [
        (Target(at_least_db=25), THREE),
        (Target(at_least_db=30), THREE),
        (Target(at_least_db=31), TWO),
        (Target(at_most=0.7), TWO),
        (Target(at_most=0.6), THREE),
        (Target(at_least_db=41), None),
        (Target(at_most=0.4), None),
    ],
    ids=str,
)
def test_the_best_setting(tuned: Tuned, target: Target, best: str | None) -> None:
    assert with_figures(tuned, target, *FIGURES).best == best


def test_the_verdict_says_plainly_that_none_does(tuned: Tuned) -> None:
    far = with_figures(tuned, Target(at_least_db=41), *FIGURES).verdict
    assert far.startswith(
        f"None of 3 settings meets the target, at least 41 dB. The nearest: {TWO}, 1.50 times as fast, 40.0"
    )
    slow = with_figures(tuned, Target(at_most=0.25), *FIGURES).verdict
    assert slow.startswith(
        "None of 3 settings meets the target, at most 0.25 of the exact run's time. The nearest: " + THREE
    )


def test_what_is_slower_than_the_exact_run_is_never_best(tuned: Tuned) -> None:
    slow = with_figures(tuned, Target(at_least_db=20), (0.21, 50.0), (0.9, 40.0), (1.0, None))
    assert slow.best is None
    assert slow.verdict.startswith(
        f"None of 3 settings is faster than the exact run. The nearest: {FOUR}, 1.00"
    )
    some = with_figures(tuned, Target(at_least_db=20), (0.21, 50.0), (1.1, 10.0), (1.2, 5.0))
    assert some.best is None
    assert some.verdict.startswith(
        f"None of 3 settings meets the target, at least 20 dB. The nearest: {THREE}, 1.1"
    )


def test_an_identical_setting_is_near_enough(tuned: Tuned) -> None:
    found = with_figures(tuned, Target(at_least_db=90), (1.5, None), (2.0, 30.0), (3.0, 20.0))
    assert found.best == TWO and "identical to exact" in found.verdict


def test_rows_are_those_of_compare(tuned: Tuned) -> None:
    report = ditkit.compare(tiny_model(), policies=[TWO, THREE, FOUR], seeds=[0, 1], memory=False, **QUICK)
    exact: list[Row] = [*report.rows]
    assert [row.psnr_db for row in tuned.report.rows] == [row.psnr_db for row in exact]
    assert [row.macs for row in tuned.report.rows] == [row.macs for row in exact]
    assert list(tuned.specs.values()) == [TWO, THREE, FOUR]


def test_what_is_saved(tuned: Tuned, tmp_path: Path) -> None:
    found = with_figures(tuned, Target(at_least_db=30), *FIGURES)
    saved = json.loads(found.save(tmp_path).read_text())
    assert (
        saved["target"] == "at least 30 dB" and saved["best"] == THREE and saved["verdict"] == found.verdict
    )
    assert saved["front"] == [TWO, THREE] and len(saved["rows"]) == 4
    assert saved["settings"]["seeds"] == [0, 1] and "psnr_db" in saved["definitions"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_the_command(model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    told = chain([1.0], repeat(0.5))  # exact is first; controls are timed as well

    def clock(function: Callable[[], object]) -> float:
        function()
        return next(told)

    monkeypatch.setattr("ditkit.bench.timing.seconds_of", clock)  # a busy machine may be as slow as exact
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    out = tmp_path / "tune"
    flags = ["--seeds", "0..1", "--steps", "8", "--converged-steps", "9", "--rounds", "1", "--out", str(out)]
    policy = "taylorseer:interval=2|4,order=1"
    assert main(["tune", str(model), "--policy", policy, "--at-least", "5dB", *flags]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if not line.startswith("wrote")]  # a path may be long
    assert max(map(len, lines)) <= COLUMNS
    assert "Best with at least 5 dB: taylorseer:interval=" in text and f"wrote {out / 'tune.json'}" in text
    rows = [line.split() for line in text.splitlines() if line.startswith((" taylorseer", " exact"))]
    assert len(rows) == 3 and sum(row[-1] == "best" for row in rows) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--at-least", "30"], "got no --policy"),
        (["--policy", "taylorseer"], "expected one of the two"),
        (
            ["--policy", "taylorseer", "--at-least", "30 cm"],
            "--at-least 30 cm, expected decibels such as 35dB",
        ),
        (["--policy", "taylorseer", "--at-most", "2"], "at_most=2, expected a share of the time"),
        (["--policy", "taylorseer:interval=|3", "--at-most", "0.5"], "expected values between bars"),
        (["--policy", "taylorseer:intervall=2|3", "--at-most", "0.5"], "did you mean 'interval'?"),
        (["--policy", "taylorseer:interval=3|3", "--at-most", "0.5"], "is given twice"),
        (["--policy", "taylorseer:warmup=60", "--at-most", "0.5"], "warmup=60"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], line: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["tune", str(model), *words, "--out", str(out)]) == 2
    streams = capsys.readouterr()
    assert line in streams.err and len(streams.err.splitlines()) == 1 and streams.out == ""
    assert not out.exists()


def test_decibels_are_read_with_or_without_their_unit() -> None:
    assert decibels("35dB") == decibels("35") == decibels("35.0db") == 35 and decibels(None) is None
