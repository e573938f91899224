"""TEMPO on hourly series of several sets, with the body of SmolLM2, and the DLinear that it is measured against."""

from __future__ import annotations

from dataclasses import replace

from ditkit.adapt.lora import LoRA
from ditkit.models.dlinear import DLinearConfig
from ditkit.models.tempo import PRESETS
from ditkit.tasks.forecast.series import SeriesForecastRecipe
from ditkit.train.ema import Constant
from ditkit.train.forecasting import Forecasting
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression

SETS = "electricity+traffic+beijing"
WEEK, DAY = 168, 24
FROZEN = "norms+lora+own"
"""The parts trained beside the language body's own weights; SmolLM2 has no table of positions."""
PUBLISHED_LORA = LoRA(rank=16, alpha=16.0, layers="qkv", dropout=0.1, bias=True)
"""The paper's low-rank update: of queries, keys and values, whose biases are trained, too."""


def tempo() -> SeriesForecastRecipe:
    """Train TEMPO on a week of hours to a day, of three sets at once: 4 blocks of SmolLM2, frozen but for LoRA.

    Then `ditkit forecast MODEL --data FILE.csv --future 24`, also of series that it never saw, of the same step. For
    quantiles: --distribution student-t.
    """
    return SeriesForecastRecipe(
        data=SETS,
        model=replace(PRESETS["smollm2-4"], frames=WEEK, horizon=DAY),
        body="smollm2",
        transforms=(PUBLISHED_LORA,),
        settings=replace(_settings(2000, 64), trained=FROZEN),
    )


def tempo_small() -> SeriesForecastRecipe:
    """Train a small TEMPO whose body begins anew and is trained whole: two blocks of width 64.

    For series of your own, a day's worth of cycles: --data FILE.csv.
    """
    model = replace(PRESETS["smollm2-2"], frames=WEEK, horizon=DAY, width=64, heads=4, kv_heads=4, hidden=128)
    return SeriesForecastRecipe(data=SETS, model=model, settings=_settings(2000, 64))


def dlinear() -> SeriesForecastRecipe:
    """Train DLinear on the same windows: two linear layers."""
    return SeriesForecastRecipe(
        data=SETS,
        model=DLinearConfig(frames=WEEK, horizon=DAY),
        objective=Forecasting(terms=(Regression(),)),
        settings=_settings(2000, 64),
    )


def _settings(steps: int, batch: int) -> Settings:
    return Settings(
        steps=steps,
        batch=batch,
        learning_rate=1e-3,
        cosine=True,
        averages=(Constant(0.99),),
        save_every=200,
        sheet_every=500,
    )
