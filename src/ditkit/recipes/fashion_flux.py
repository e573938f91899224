"""A small FLUX of diffusers on Fashion-MNIST: the network on which caches are raced."""

from __future__ import annotations

from ditkit.models.small_flux import SmallFluxConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal


def fashion_flux() -> ClassImageRecipe:
    """6.2 M parameters, 64 tokens and 16 letters, velocity on the linear path; some fifty minutes of one core."""
    return ClassImageRecipe(
        data="fashion",
        model=SmallFluxConfig(),
        settings=Settings(
            steps=4000,
            batch=64,
            learning_rate=1e-3,
            warmup=200,
            cosine=True,
            betas=(0.9, 0.99),
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10),),
            save_every=250,
            sheet_every=1000,
        ),
        objective=Denoising(timesteps=LogitNormal(0.0, 1.0)),
    )
