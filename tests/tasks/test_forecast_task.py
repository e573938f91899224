"""Forecasting from data to scores: recipes on clips, fields and series; the command and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ditkit.cli.main import main
from ditkit.codecs.standardised import Standardised
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.data.clips import MemoryClips
from ditkit.data.loading import load_fields
from ditkit.metrics.forecast import PERSISTENCE
from ditkit.models.convlstm import ConvLSTM, ConvLSTMConfig
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.recipes.predformer import convlstm, predformer, predformer_winds
from ditkit.tasks.forecast import recipe as task
from ditkit.tasks.forecast.scores import score_clips
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.train.ema import Constant
from ditkit.train.settings import Settings

SIDE, FRAMES = 16, 3
TINY = PredFormerConfig(
    channels=1, frames=FRAMES, size=(SIDE, SIDE), patch=4, width=32, heads=2, hidden=32, layout="TS"
)
QUICK = Settings(
    steps=80, batch=4, learning_rate=3e-3, averages=(Constant(0.8),), save_every=0, sheet_every=40
)


def sliding(films: int = 6, length: int = 12) -> MemoryClips:
    """A bright bar that moves one pixel a frame."""
    column = torch.arange(SIDE)
    frames = [
        [((column - start - t) % SIDE < 4).expand(SIDE, SIDE)[None] * 255 for t in range(length)]
        for start in range(films)
    ]
    bars = tuple(torch.stack(film).to(torch.uint8) for film in frames)
    return MemoryClips("bars", bars, tuple(map(str, range(films))), 10.0, frames=2 * FRAMES)


@pytest.fixture
def bars(monkeypatch) -> MemoryClips:
    clips = sliding()
    monkeypatch.setattr(task, "load_clips", lambda *args, **options: clips)
    monkeypatch.setattr("ditkit.tasks.forecast.scores.load_held_out", lambda *args, **options: clips)
    return clips


def csv_of(path: Path, steps: int = 96) -> Path:
    """Two daily waves, hour by hour, one of them large."""
    hours = np.datetime64("2024-01-01T00") + np.arange(steps)
    wave = np.sin(2 * np.pi * np.arange(steps) / 24)
    lines = [f"{t},{v:.4f},{100 + 50 * w:.4f}" for t, v, w in zip(hours, wave, np.roll(wave, 6), strict=True)]
    path.write_text("time,load,price\n" + "\n".join(lines) + "\n")
    return path


def test_a_recipe_learns_clips_beyond_persistence(bars, tmp_path):
    model = train_recipe(replace(predformer(), model=TINY, settings=QUICK), tmp_path)
    found = score_clips({"ours": model}, bars, FRAMES)
    assert list(found) == ["ours", PERSISTENCE]
    ours, still = (sum(found[name].error.mse_all) for name in found)
    assert ours < still / 2
    assert (tmp_path / "samples" / "000080.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] / 4


def test_persistence_is_scored_by_hand(bars):
    """A bar of 4 columns that moves one pixel a frame leaves 2 k columns wrong after k frames, k up to 3."""
    found = score_clips({}, bars, FRAMES)[PERSISTENCE]
    assert found.error.mse_all == pytest.approx([2 * SIDE, 4 * SIDE, 6 * SIDE])
    assert found.error.mae_all == pytest.approx(found.error.mse_all)
    assert found.psnr_db == pytest.approx([10 * np.log10(1 / (k * 2 / SIDE)) for k in (1, 2, 3)], abs=1e-4)


class Overshooting(nn.Module):
    """Says where the bars of `sliding` will be, half of their height too far at both ends: -0.5 and 1.5."""

    config = TINY

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(FRAMES, -1) * 2 - 0.5


def test_similarity_is_of_what_a_screen_shows_and_the_squared_error_is_not(bars):
    """PSNR and SSIM clip to [0, 1] first, MSE does not (PredFormer's code)."""
    found = score_clips({"far": Overshooting()}, bars, FRAMES)["far"]
    assert found.psnr_db == (float("inf"),) * FRAMES
    assert found.ssim == pytest.approx((1.0,) * FRAMES)
    assert found.error.mse_all == pytest.approx((0.25 * SIDE**2,) * FRAMES)


def test_fields_are_standardised_by_their_training_part_and_it_is_saved(tmp_path):
    data = csv_of(tmp_path / "load.csv")
    recipe = replace(
        predformer_winds(), data=str(data), model=replace(TINY, patch=1), settings=replace(QUICK, steps=4)
    )
    train_recipe(recipe, tmp_path / "run")
    model = Model.load(tmp_path / "run" / "model")
    assert isinstance(model.codec, Standardised) and model.codec.config.variables == ("load", "price")
    training = load_fields(str(data)).split(0.1, 0.2).training
    values = training.values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.codec.mean, values.mean(1))
    torch.testing.assert_close(model.codec.std, values.std(1, correction=0))
    coded = model.codec.encode(training.values)
    torch.testing.assert_close(model.codec.decode(coded), training.values.float())
    assert model.sample_shape == (2, FRAMES, 1, 1)


def test_cells_without_data_are_not_learned(tmp_path):
    """Padding to whole patches is masked: what the model says there moves no weight."""
    samples = (
        replace(predformer_winds(), data=str(csv_of(tmp_path / "a.csv")), model=replace(TINY, patch=4))
        .prepared()
        .samples
    )
    target, cond = samples.batch(torch.tensor([0, 1]), None)
    assert target.shape == (2, 2, FRAMES, 4, 4)
    assert cond.mask.sum() == 2 * 2 and cond.mask[:, :, :, 0, 0].all()


def test_recipes_describe_themselves(bars):
    for recipe in (predformer(), convlstm()):
        said = describe(replace(recipe, model=replace(recipe.model, size=(SIDE, SIDE), patch=4)))
        assert "clips [1, 6, 16, 16], half of each observed" in said and "parameters" in said
    with pytest.raises(ConfigError, match="a ClipForecastRecipe learns no latents"):
        replace(predformer(), codec="somewhere")


def saved(folder: Path, model: Model) -> str:
    return str(model.save(folder))


def test_the_command_on_clips(bars, tmp_path, capsys):
    models = [
        saved(tmp_path / "a", PredFormer(TINY)),
        saved(tmp_path / "b", ConvLSTM(ConvLSTMConfig(frames=FRAMES, size=(SIDE, SIDE), states=(4,)))),
    ]
    out = tmp_path / "out"
    assert main(["forecast", *models, "--data", "bars", "--count", "2", "--out", str(out)]) == 0
    pictures = {f"{name}.{suffix}" for name in "ab" for suffix in ("png", "gif", "mp4")}
    assert {path.name for path in out.iterdir()} == {"forecast.json", "leadtime.png", *pictures}
    written = json.loads((out / "forecast.json").read_text())
    assert list(written["scores"]) == ["a", "b", PERSISTENCE]
    assert written["settings"] == {"data": "bars", "clips": 2, "observed": FRAMES}
    assert "--count 2" in written["command"] and "--max-bad" not in written["command"]
    assert len(written["scores"]["a"]["psnr_db"]) == FRAMES
    shown = capsys.readouterr().out
    assert "persistence" in shown and "100.0%" in shown
    assert max(len(line) for line in shown.splitlines() if not line.startswith("wrote")) <= 80
    assert shown.splitlines()[-2:] == ["  a.png, a.mp4, a.gif", "  b.png, b.mp4, b.gif"]


def test_the_command_on_series(tmp_path, capsys):
    data = csv_of(tmp_path / "load.csv")
    recipe = replace(
        predformer_winds(),
        data=str(data),
        model=replace(TINY, patch=1),
        settings=replace(QUICK, steps=4, sheet_every=4),
    )
    train_recipe(recipe, tmp_path / "run")
    model = str(tmp_path / "run" / "model")
    out = tmp_path / "out"
    assert main(["forecast", model, "--data", str(data), "--horizon", "5", "--out", str(out)]) == 0
    written = json.loads((out / "forecast.json").read_text())
    assert written["settings"]["horizon"] == 5 and len(written["scores"]) == 3
    assert sorted(path.name for path in out.iterdir()) == [
        "forecast.json",
        "leadtime.png",
        "run-load.png",
        "run-price.png",
    ]
    assert "persistence" in capsys.readouterr().out
    with Image.open(out / "run-load.png") as lines, Image.open(tmp_path / "run/samples/000004.png") as sheet:
        assert sheet.height == 2 * lines.height  # of load and of price


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "bars"], "got no model, expected a folder"),
        (["{d}", "--data", "{csv}", "--show", "999"], "--show=999 should be at most 16"),
        (["{d}", "--data", "{csv}", "--future", "3", "--count", "8"], "--count 8 with --future 3"),
        (
            ["{d}", "--data", "{csv}", "--future", "3", "--validation", "0.1"],
            "--validation 0.1 with --future 3",
        ),
        (["{d}", "--data", "{csv}", "--future", "3", "--test", "0.2"], "--test 0.2 with --future 3"),
        (["{d}", "--data", "{csv}", "--future", "3", "--show", "0"], "--show 0 with --future 3"),
        (["{d}", "--data", "{csv}", "--show", "-1"], "--show=-1 should be at least 0"),
        (["{a}", "{a}", "--data", "bars"], "is given twice, expected different models"),
        (["{a}", "{b}", "--data", "bars"], "frames=3 and b has frames=4, expected the same"),
        (["{a}", "{c}", "--data", "bars"], "c forecasts fields and a clips"),
        (["{a}", "--data", "bars", "--horizon", "0"], "--horizon=0"),
        (["{a}", "--data", "bars", "--count", "0"], "--count=0"),
        (["{a}", "--data", "bars", "--show", "99"], "--show=99"),
        (["{d}", "{e}", "--data", "{csv}"], "d and e standardise by other means or deviations"),
        (["{c}", "--data", "{csv}"], "('load', 'price'), the model was trained on ('x',)"),
    ],
)
def test_the_command_refuses_in_one_line_before_it_scores(bars, tmp_path, capsys, monkeypatch, words, said):
    field_model, series_model = PredFormer(TINY), PredFormer(replace(TINY, channels=2, size=(1, 1), patch=1))
    field_model.codec = Standardised.of(["x"], ["m"], torch.zeros(1), torch.ones(1))
    series_model.codec = Standardised.of(["load", "price"], ["", ""], torch.zeros(2), torch.ones(2))
    other_model = PredFormer(series_model.config)
    other_model.codec = Standardised.of(["load", "price"], ["", ""], torch.zeros(2), 2 * torch.ones(2))
    for scoring in ("score_clips", "compare_forecasts"):
        monkeypatch.setattr(f"ditkit.tasks.forecast.scores.{scoring}", lambda *args, **options: pytest.fail())
    places = {
        "a": saved(tmp_path / "a", PredFormer(TINY)),
        "b": saved(tmp_path / "b", PredFormer(replace(TINY, frames=4))),
        "c": saved(tmp_path / "c", field_model),
        "d": saved(tmp_path / "d", series_model),
        "e": saved(tmp_path / "e", other_model),
        "csv": str(csv_of(tmp_path / "load.csv")),
    }
    command = ["forecast", *(word.format(**places) for word in words), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
