"""The harness of `benchmarks/layouts.py`, and of trainings that are given more time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import common
import forecasting
import layouts
from ditkit.core.errors import ConfigError
from ditkit.core.model import parameter_count
from ditkit.metrics.forecast import PERSISTENCE
from ditkit.models.predformer import VARIANTS, PredFormer
from ditkit.train.log import LOSSES
from ditkit.train.record import RECIPE
from expectations import Claim, judged
from forecasting import spent, steps_of
from layouts import BEST, FULL, PLAIN, Arguments

pytestmark = pytest.mark.usefixtures("drawn_digits")

TINY = Arguments(size=16, frames=2, width=32, steps=2, batch=2, seeds=1, clips=4)
FEWER = 2
"""Networks that have not all layers, of 12 blocks."""


def test_networks_have_as_many_parameters_but_for_fewer_layers() -> None:
    with torch.device("meta"):
        counts = {name: parameter_count(PredFormer(config)) for name, config in Arguments().configs.items()}
    assert list(counts)[:9] == list(VARIANTS) and len(counts) == 9 + FEWER + 1
    fewer = {name for name in counts if "of its layers" in name}
    assert len(fewer) == FEWER and max(counts[name] for name in fewer) < 0.7 * counts[BEST]
    for name in counts.keys() - fewer:
        assert counts[name] == pytest.approx(counts[BEST], rel=0.002)


def test_every_network_has_a_row_and_every_claim_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    layouts.main(replace(TINY, keep=tmp_path / "runs"))
    found = json.loads((tmp_path / "benchmarks" / "results" / "layouts.json").read_text())["rows"]
    rows, verdicts = found[:-5], found[-5:]
    assert [row["network"] for row in rows] == [*TINY.configs, PERSISTENCE]
    assert all(row["mse"] > 0 for row in rows) and rows[0]["layout"] == "F12" and rows[-1]["parameters"] == 0
    assert [verdict["claim"] for verdict in verdicts] == [claim.words for claim in TINY.claims]
    assert all(verdict["holds"] in (True, False) for verdict in verdicts)


def test_a_second_call_goes_on_and_seeds_are_averaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "none")
    some = replace(TINY, networks=(FULL, PLAIN), keep=tmp_path)
    layouts.main(some)
    losses = {path: path.read_text() for path in tmp_path.rglob(LOSSES)}
    full, _, persistence = layouts.rows(replace(some, seeds=2))
    assert len(losses) == 2 and all(path.read_text() == written for path, written in losses.items())
    first, second = full["mse_by_seed"]
    assert first != second and full["mse"] == pytest.approx((first + second) / 2, abs=0.01)
    assert persistence["mse_deviation"] == 0.0 < full["mse_deviation"]
    assert not (tmp_path / "none").exists()  # two networks are no experiment


@pytest.mark.parametrize(
    ("change", "says"),
    [({"blocks": 8}, "blocks=8, expected a multiple of 12"), ({"networks": ("Fulll",)}, "'Fulll'.*Full")],
)
def test_what_is_no_experiment_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_a_claim_holds_where_all_its_pairs_do() -> None:
    rows = [{"name": "a", "error": 4.0}, {"name": "b", "error": 1.5}, {"name": "c", "error": None}]
    pair, reverse, unknown = ("a", "b", "error"), ("b", "a", "error"), ("a", "c", "error")
    claims = [
        Claim("twice", (pair,), 2.0),
        Claim("thrice", (pair,), 3.0),
        Claim("both ways", (pair, reverse)),
        Claim("not measured", (pair, unknown)),
    ]
    verdicts = judged(claims, rows, named="name")
    assert [verdict["holds"] for verdict in verdicts] == [True, False, False, None]
    assert verdicts[0]["figures"] == "error: a 4, b 1.5"


def test_a_training_that_ended_early_is_given_what_fills_the_time(tmp_path: Path) -> None:
    def begun(steps: int, done: int) -> Path:
        (tmp_path / RECIPE).write_text(json.dumps({"settings": {"steps": steps}}))
        lines = [json.dumps({"step": i + 1, "processor_seconds": 3.0}) for i in range(done)]
        (tmp_path / LOSSES).write_text("\n".join(lines))
        return tmp_path

    assert spent(begun(steps=40, done=40)) == 120.0
    assert steps_of(tmp_path, minutes=4) == 80
    assert steps_of(tmp_path, minutes=2.1) == 40  # nearly all of the time: it has ended
    assert steps_of(begun(steps=40, done=30), minutes=4) == 40  # was stopped: it goes on to its own end
    (tmp_path / LOSSES).unlink()
    assert steps_of(tmp_path, minutes=4) == 40


def test_a_short_training_goes_on_with_more_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = layouts.recipe_of(FULL, 0, TINY)
    monkeypatch.setattr(forecasting, "RECIPES", {"tiny": lambda: recipe})
    for told, steps in (("steps_in", 10), ("steps_of", 30)):
        monkeypatch.setattr(forecasting, told, lambda *_, steps=steps: steps)
        assert forecasting.trained("tiny", 1, TINY.batch, tmp_path).steps == steps
    assert len((tmp_path / "tiny" / LOSSES).read_text().splitlines()) == 30
