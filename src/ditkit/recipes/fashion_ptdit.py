"""A PT-DiT of garments: proxies and windows, a rival of `fashion-dit` whose attention is cheap."""

from __future__ import annotations

from ditkit.models.pt_dit import PTDiTConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


def fashion_ptdit() -> ClassImageRecipe:
    """2.2 M parameters in 6 blocks, 256 tokens in windows of 2 x 2, noise prediction with learned variance, 32 x 32.

    As the paper's ablations: 64 proxies, told a class; its rate is 1e-4 at batches of 256.
    """
    return ClassImageRecipe(
        data="fashion",
        model=PTDiTConfig(size=32, patch=2, channels=1, width=96, depth=6, heads=4, window=2, classes=10),
        settings=Settings(
            steps=4000,
            batch=64,
            learning_rate=1e-3,
            warmup=200,
            cosine=True,
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10),),
            save_every=100,
            sheet_every=500,
        ),
        objective=Denoising((Regression(), VariationalBound())),
    )
