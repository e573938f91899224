"""Pictures by prompt with proxies and windows, from a folder of pictures with captions."""

from __future__ import annotations

from ditkit.core.convention import Convention
from ditkit.models.pt_dit import PTDiTConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal


def ptdit_text() -> ClassImageRecipe:
    """11.6 M parameters that take a prompt, 64 proxies a picture: give pictures with captions in --data.

    A folder as of `text-image`; captions are encoded by MiniLM. Needs ditkit[text].
    """
    return ClassImageRecipe(
        data="openmoji",
        model=PTDiTConfig(
            size=32,
            patch=2,
            channels=3,
            width=192,
            depth=10,
            heads=4,
            window=2,
            classes=0,
            text_encoder="minilm",
            text_width=384,
            text_tokens=16,
            time_scale=1000.0,
            convention=Convention(),
        ),
        settings=Settings(
            steps=12_000,
            batch=64,
            learning_rate=1e-3,
            warmup=200,
            decay_after=2500,
            betas=(0.9, 0.99),
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10), Power(0.05)),
            save_every=250,
            sheet_every=1000,
        ),
        objective=Denoising(timesteps=LogitNormal(0.0, 1.0)),
    )
