"""PredFormer against a ConvLSTM on moving digits: trained for the same time in one run, scored on held-out clips.

python benchmarks/forecasting.py --minutes 60
python benchmarks/forecasting.py --minutes 1 --clips 32
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from common import device, record, show
from ditkit.core.model import Model, parameter_count
from ditkit.data.loading import load_clips
from ditkit.evaluate.clock import alternated, medians
from ditkit.recipes.predformer import convlstm, predformer
from ditkit.tasks.forecast import ClipForecastRecipe
from ditkit.tasks.forecast_scores import score_clips
from ditkit.tasks.recipe import forward_macs, train_recipe
from ditkit.train.settings import Settings

RECIPES = {"PredFormer TSST*2": predformer, "ConvLSTM": convlstm}
PACED = 6
"""Steps of the trial runs that set how many steps fill the time."""
BATCH = 16


def trained(recipe: ClipForecastRecipe, settings: Settings, folder: Path) -> tuple[Model, float]:
    """The model after its training, and the processor's seconds that it took."""
    before = time.process_time()
    model = train_recipe(replace(recipe, settings=settings), folder)
    return model, time.process_time() - before


def main(minutes: float = 60.0, batch: int = 8, clips: int = 256, keep: Path | None = None) -> None:
    """Print one table, and keep it in results/forecasting.json.

    Args:
        minutes: of processor time that each network is trained. batch: clips a step.
        clips: held-out clips that are scored. keep: folder for the trained models.
    """
    models: dict[str, Model] = {}
    steps: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name, build in RECIPES.items():
        recipe = build()
        with tempfile.TemporaryDirectory() as folder:
            given = replace(recipe.settings, batch=batch, save_every=0, sheet_every=0)
            trial = replace(given, steps=PACED, warmup=0)
            trained(recipe, trial, Path(folder) / "warm")
            _, taken = trained(recipe, trial, Path(folder) / "trial")
            steps[name] = max(PACED, int(60 * minutes * PACED / taken))
            whole = replace(given, steps=steps[name], warmup=min(200, steps[name] // 10))
            models[name], seconds[name] = trained(recipe, whole, Path(folder) / "run")
        if keep is not None:
            models[name].save(keep / name.partition(" ")[0].lower())
    frames = 2 * predformer().model.frames
    held_out = load_clips("moving-digits", (64, 64), frames=frames, split="test", length=clips)
    scores = score_clips(models, held_out, frames // 2)
    given_frames = torch.rand(BATCH, 1, frames // 2, 64, 64)
    with torch.no_grad():
        timed = medians(alternated({n: lambda m=m: m(given_frames) for n, m in models.items()}, 5, warmup=1))
    rows = []
    for name, found in scores.items():
        known = name in models
        rows.append(
            {
                "forecast": name,
                "parameters": parameter_count(models[name]) if known else 0,
                "giga_macs": forward_macs(RECIPES[name]()) / 1e9 if known else 0.0,
                "steps": steps.get(name, 0),
                "training_seconds": round(seconds.get(name, 0.0)),
                "mse": sum(found.error.mse_all) / len(found.error.mse_all),
                "mae": sum(found.error.mae_all) / len(found.error.mae_all),
                "psnr_db": sum(found.psnr_db) / len(found.psnr_db),
                "ssim": sum(found.ssim) / len(found.ssim),
                "clips_per_second": BATCH / timed[name] if known else 0.0,
                "mse_by_lead": [round(v, 2) for v in found.error.mse_all],
            }
        )
    show(
        f"moving digits, 10 frames to 10, {clips} clips; {device()}", [{**r, "mse_by_lead": ""} for r in rows]
    )
    record("forecasting", rows)


if __name__ == "__main__":
    tyro.cli(main)
