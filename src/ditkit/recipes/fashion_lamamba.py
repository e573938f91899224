"""A LaMamba-Diff of garments: scans and windows, the linear rival of `fashion-dit`."""

from __future__ import annotations

from ditkit.models.lamamba import LaMambaConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


def fashion_lamamba() -> ClassImageRecipe:
    """2.2 M parameters in three stages, tokens of 2 x 2 pixels, noise prediction with learned variance, 32 x 32.

    The paper's tokens are of one latent pixel; its rate is 1e-4 at batches of 256, its weight decay 0.01.
    """
    return ClassImageRecipe(
        data="fashion",
        model=LaMambaConfig(
            size=32,
            patch=2,
            channels=1,
            width=24,
            depth=(1, 1, 1, 1),
            middle=1,
            heads=4,
            window=4,
            classes=10,
        ),
        settings=Settings(
            steps=4000,
            batch=64,
            learning_rate=1e-3,
            warmup=200,
            cosine=True,
            weight_decay=0.01,
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10),),
            save_every=100,
            sheet_every=500,
        ),
        objective=Denoising((Regression(), VariationalBound())),
    )
