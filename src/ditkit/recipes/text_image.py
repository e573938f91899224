"""Pictures by prompt, from a folder of pictures with captions."""

from __future__ import annotations

from ditkit.models.text_dit import TextDiTConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal


def text_image() -> ClassImageRecipe:
    """13.6 M parameters that take a prompt, from scratch: give your own pictures with captions in --data.

    A folder with a metadata.jsonl, a metadata.csv, or NAME.txt beside NAME.png. Captions are encoded once, by MiniLM,
    and kept in a hidden folder beside them. Needs ditkit[text].
    """
    return ClassImageRecipe(
        data="openmoji",
        model=TextDiTConfig(),
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
