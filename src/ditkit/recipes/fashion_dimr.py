"""A DiMR of garments: two resolutions, with the loss of both."""

from __future__ import annotations

from ditkit.models.dimr import DiMRConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.terms.multi_scale import MultiScale


def fashion_dimr() -> ClassImageRecipe:
    """0.7 M parameters: transformer blocks on 8 x 8 tokens, ConvNeXt blocks on 16 x 16; pictures of 32 x 32."""
    return ClassImageRecipe(
        data="fashion",
        model=DiMRConfig(
            size=32, channels=1, width=(96, 48), depth=(5, 3), patch=(4, 2), heads=4, classes=10
        ),
        settings=Settings(
            steps=4000,
            batch=64,
            learning_rate=1e-3,
            warmup=200,
            cosine=True,
            betas=(0.9, 0.99),
            weight_decay=0.03,
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10),),
            save_every=100,
            sheet_every=500,
        ),
        objective=Denoising((MultiScale(),)),
    )
