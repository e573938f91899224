"""The task of forecasts: later frames of clips, later fields, later values of series."""

from __future__ import annotations

from typing import Any

from ditkit.core.task import Evaluation, Progress, Task


class ForecastTask(Task):
    """Frames [C, T, H, W] that follow those that are observed."""

    name, noun, data, axes = "forecast", "forecast", "fields", ("C", "T", "H", "W")
    command, generates, has_frames = "ditkit forecast", False, True
    settings = ("count", "horizon", "validation", "test", "show")

    @property
    def recipe(self) -> type:
        from ditkit.tasks.forecast.recipe import ForecastRecipe

        return ForecastRecipe

    def evaluate(
        self, model: Any, data: str, *, sampling: Any, progress: Progress | None, **settings: Any
    ) -> Evaluation:
        from ditkit.tasks.forecast.scores import evaluate_forecasts

        return evaluate_forecasts({"model": model}, data, progress=progress, **settings)
