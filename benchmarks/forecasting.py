"""PredFormer against a ConvLSTM on moving digits: trained for the same time in one run, scored on held-out clips.

    python benchmarks/forecasting.py --minutes 120
    python benchmarks/forecasting.py --minutes 1 --clips 32 --keep /tmp/short

Time is the processor's, of all threads, so that a machine with other work gives the same networks. Stopped at any
moment, the same command goes on; where both trainings ended in clearly less time than `--minutes`, they go on to fill
it, at the learning rate that the longer half cosine has there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from common import device, record, show
from ditkit.bench.timing import alternated, medians
from ditkit.core.checkpoint import read_json
from ditkit.core.model import Model, parameter_count
from ditkit.data.loading import load_clips
from ditkit.metrics.forecast import mean
from ditkit.recipes.predformer import convlstm, predformer
from ditkit.sample.forecast import forecast
from ditkit.tasks.forecast.recipe import ClipForecastRecipe
from ditkit.tasks.forecast.scores import score_clips
from ditkit.tasks.recipe import forward_macs, train_recipe
from ditkit.train.log import LOSSES
from ditkit.train.record import RECIPE

RECIPES = {"predformer": predformer, "convlstm": convlstm}
PACED = 6
"""Steps of the trial runs that set how many steps fill the time."""
BATCH, ROUNDS = 16, 5
"""Of the timed forward passes."""


class Trained(NamedTuple):
    """A network after its training, the processor's seconds that it took, and its steps."""

    model: Model
    seconds: float
    steps: int


def steps_in(minutes: float, recipe: ClipForecastRecipe) -> int:
    """As many as fill the processor's time, judged by a trial run."""
    trial = replace(recipe, settings=replace(recipe.settings, steps=PACED, warmup=0, save_every=0))
    with tempfile.TemporaryDirectory() as folder:
        train_recipe(trial, Path(folder) / "warm")
        train_recipe(trial, Path(folder) / "trial")
        return max(PACED, int(60 * minutes * PACED / spent(Path(folder) / "trial")))


def spent(run: Path) -> float:
    """The processor's seconds of all steps of a run, over all its resumes."""
    return sum(line["processor_seconds"] for line in losses(run))


def losses(run: Path) -> list[dict[str, float]]:
    """What a run wrote of its steps, a line each; none yet where it was stopped before the first."""
    written = run / LOSSES
    return [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []


def steps_of(run: Path, minutes: float) -> int:
    """What a begun run was to have; one that ended with a tenth of the time left or more, what fills the time."""
    steps, seconds = int(read_json(run / RECIPE)["settings"]["steps"]), 60 * minutes
    ended = any(line["step"] == steps for line in losses(run))
    return int(steps * seconds / spent(run)) if ended and spent(run) < 0.9 * seconds else steps


def trained(name: str, minutes: float, batch: int, keep: Path) -> Trained:
    """The network after its training, which goes on where an earlier call of this script was stopped."""
    run, recipe = keep / name, RECIPES[name]()
    recipe = replace(recipe, settings=replace(recipe.settings, batch=batch, sheet_every=0))
    begun = (run / RECIPE).exists()
    steps = steps_of(run, minutes) if begun else steps_in(minutes, recipe)
    # a training that goes on has warmed up already, over the steps that it had then
    warmup = read_json(run / RECIPE)["settings"]["warmup"] if begun else min(200, steps // 10)
    settings = replace(recipe.settings, steps=steps, warmup=warmup)
    model = train_recipe(replace(recipe, settings=settings), run, resume=begun)
    return Trained(model, spent(run), steps)


def rows(models: Mapping[str, Trained], clips: int) -> list[dict[str, object]]:
    """One row a forecaster, persistence last."""
    frames = predformer().model.frames
    held_out = load_clips("moving-digits", (64, 64), frames=2 * frames, split="test", length=clips)
    scores = score_clips({name: own.model for name, own in models.items()}, held_out, frames)
    seen = torch.rand(BATCH, 1, frames, 64, 64)
    with torch.no_grad():
        forwards = {name: partial(forecast, own.model, seen, frames) for name, own in models.items()}
        timed = medians(alternated(forwards, ROUNDS, warmup=1))
    found: list[dict[str, object]] = []
    for name, score in scores.items():
        row: dict[str, object] = {"forecast": name}
        if name in models:
            own = models[name]
            row |= {
                "parameters": parameter_count(own.model),
                "giga_macs": forward_macs(RECIPES[name]()) / 1e9,
                "steps": own.steps,
                "training_seconds": round(own.seconds),
                "clips_per_second": BATCH / timed[name],
            }
        else:
            row |= dict.fromkeys(
                ("parameters", "giga_macs", "steps", "training_seconds", "clips_per_second"), 0
            )
        errors = {"mse": score.error.mse_all, "mae": score.error.mae_all, "psnr_db": score.psnr_db}
        row |= {key: mean(values) for key, values in {**errors, "ssim": score.ssim}.items()}
        found.append(row | {"mse_by_lead": [round(value, 2) for value in score.error.mse_all]})
    return found


def main(
    minutes: float = 60.0,
    batch: int = 8,
    clips: int = 256,
    keep: Path = Path("runs/forecasting"),
    networks: tuple[str, ...] = tuple(RECIPES),
) -> None:
    """Print one table, and keep it in results/forecasting.json.

    Args:
        minutes: of processor time that each network is trained. batch: clips a step.
        clips: held-out clips that are scored. keep: folder of both trainings; where they are, they go on.
        networks: to train; with fewer than both there is no table.
    """
    models = {name: trained(name, minutes, batch, keep) for name in networks}
    if models.keys() != RECIPES.keys():
        return
    found = rows(models, clips)
    show(
        f"moving digits, 10 frames to 10, {clips} clips; {device()}",
        [{**r, "mse_by_lead": ""} for r in found],
    )
    record("forecasting", found)


if __name__ == "__main__":
    tyro.cli(main)
