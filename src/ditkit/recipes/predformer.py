"""PredFormer, and the ConvLSTM that it is measured against, at the scale of a CPU."""

from __future__ import annotations

from dataclasses import replace

from ditkit.models.convlstm import ConvLSTMConfig
from ditkit.models.predformer import PredFormerConfig
from ditkit.tasks.forecast.recipe import ClipForecastRecipe, FieldForecastRecipe
from ditkit.train.ema import Power
from ditkit.train.settings import Settings

DIGITS = {"length": 100_000}


def predformer() -> ClipForecastRecipe:
    """Quadruplet-TSST on moving digits, 10 frames of 64 x 64 to 10: 2.1 M parameters in 8 blocks.

    The paper's own has 24 blocks of twice the width: PredFormer.preset("Quadruplet-TSST", "mmnist").
    """
    return ClipForecastRecipe(
        data="moving-digits",
        options=DIGITS,
        model=PredFormerConfig(frames=10, size=(64, 64), width=128, heads=4, hidden=512, layout="TSST*2"),
        settings=replace(_settings(steps=4000, batch=16, learning_rate=2e-3), optimizer="muon"),
    )


def convlstm() -> ClipForecastRecipe:
    """Train a ConvLSTM of two layers on the same digits: 0.9 M parameters."""
    return ClipForecastRecipe(
        data="moving-digits",
        options=DIGITS,
        model=ConvLSTMConfig(
            frames=10, size=(64, 64), patch=4, states=(64, 64), input_kernel=3, state_kernel=3
        ),
        settings=_settings(steps=4000, batch=16, learning_rate=1e-3),
    )


def predformer_winds() -> FieldForecastRecipe:
    """Monthly global winds, 12 months to 12, with the paper's regularisation for weather.

    Also for a netCDF file of your own: --data FILE.
    """
    return _weather("winds", frames=12, steps=1500, batch=8)


def predformer_series() -> FieldForecastRecipe:
    """Series of a CSV or netCDF file of your own, 24 steps to 24: --data FILE.csv, a column each beside one of times.

    Also a pandas DataFrame in Python. Then `ditkit forecast MODEL --data FILE.csv --future 24`.
    """
    model = PredFormerConfig(
        frames=24, patch=1, width=128, heads=4, hidden=256, layout="T*4", attn_dropout=0.1, mlp_dropout=0.1
    )
    return FieldForecastRecipe(
        data="series.csv", model=model, settings=_settings(1000, 16, learning_rate=5e-4)
    )


def predformer_rain() -> FieldForecastRecipe:
    """Hourly radar rain of one storm, 4 hours to 4."""
    return _weather("rain", frames=4, steps=600, batch=4)


def _weather(data: str, frames: int, steps: int, batch: int) -> FieldForecastRecipe:
    model = PredFormerConfig(
        frames=frames,
        patch=8,
        width=128,
        heads=4,
        hidden=256,
        layout="TSST*2",
        attn_dropout=0.1,
        mlp_dropout=0.1,
        drop_path=0.25,
    )
    return FieldForecastRecipe(data=data, model=model, settings=_settings(steps, batch, learning_rate=5e-4))


def _settings(steps: int, batch: int, learning_rate: float) -> Settings:
    return Settings(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=min(200, steps // 10),
        cosine=True,
        weight_decay=1e-2,
        precision="bf16",
        averages=(Power(0.05),),
        save_every=100,
        sheet_every=500,
    )
