"""The experiments of the specifications, each the command of `benchmarks/` that records it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_baselines_on_toy_latents(monkeypatch):
    """Fewer MACs, worse loss; the average beats the last weights; guidance raises class accuracy."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    eight, four, two = runpy.run_path(str(BENCHMARKS / "baselines.py"))["rows"](1500)
    assert eight["macs"] < four["macs"] < two["macs"]
    assert eight["loss_averaged"] > four["loss_averaged"] > two["loss_averaged"]
    for row in (eight, four, two):
        assert row["loss_averaged"] < row["loss"]
    assert two["accuracy_guidance_1.0"] < two["accuracy_guidance_2.0"] < two["accuracy_guidance_4.0"]


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_predformer_on_moving_digits(monkeypatch, tmp_path):
    """Two hours of one core each: a third of persistence's error, and less than the ConvLSTM's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    forecasting = runpy.run_path(str(BENCHMARKS / "forecasting.py"))
    models = {name: forecasting["trained"](name, 120.0, 8, tmp_path) for name in forecasting["RECIPES"]}
    predformer, convlstm, persistence = forecasting["rows"](models, 256)
    assert predformer["mse"] < persistence["mse"] / 3
    assert predformer["mse"] < convlstm["mse"]
    assert predformer["ssim"] > persistence["ssim"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_confident_taylor_on_emoji(monkeypatch):
    """The gate's error tells that of the forecast, and its list is better than one of equal intervals."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = runpy.run_path(str(BENCHMARKS / "confident_taylor.py"))
    (row,), _, memory, _ = module["experiment"](module["Arguments"](thresholds=(0.008,)))
    assert row["rank_correlation"] >= 0.6
    assert row["better_than_equal_intervals"] > 0.5
    assert row["mse_gate"] < min(row["mse_reused"], row["mse_fewer_steps"])
    assert all(policy["held_bytes"] == policy["derived_bytes"] for policy in memory)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_regions_on_emoji(monkeypatch):
    """Keys and resets earn their place; the published order of rows does not: rows at random are nearer."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = runpy.run_path(str(BENCHMARKS / "regional.py"))
    rows = module["experiment"](module["Arguments"](steps=(20,))).rows
    error = {row["method"]: row["mse_to_reference"] for row in rows}
    assert error["published"] < error["no resets"] < error["no keys kept"]
    fewer_steps = rows[0]["fewer_mse_to_reference"]
    assert fewer_steps < min(error["random rows"], error["in turns"]) < error["published"]


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_masks_on_a_bouncing_ball(monkeypatch, tmp_path):
    """Four of the specification's claims of VDT; that one network comes near each specialist has not been seen."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = runpy.run_path(str(BENCHMARKS / "video_masks.py"))
    arguments = module["Arguments"](keep=tmp_path)
    models = {name: module["trained"](name, arguments) for name in module["VARIANTS"]}
    claims = module["judge"](module["rows"](models, arguments))
    assert all(claim["holds"] for claim in claims if "specialist" not in claim["claim"])


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_layouts_on_moving_digits(monkeypatch, tmp_path):
    """Axes in turn beat attention over both, and more layers and gates help; two claims have not been seen so small."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = runpy.run_path(str(BENCHMARKS / "layouts.py"))
    arguments = module["Arguments"](seeds=2, keep=tmp_path)
    verdicts = module["judged"](arguments.claims, module["rows"](arguments), named="network")
    assert [verdict["holds"] for verdict in verdicts if "full attention is" not in verdict["claim"]][1:] == [
        True
    ] * 3
