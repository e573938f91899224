"""A DiCo of garments: the convolutional rival of `fashion-dit`."""

from __future__ import annotations

from ditkit.models.dico import DiCoConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


def fashion_dico() -> ClassImageRecipe:
    """1.3 M parameters in three stages, noise prediction with learned variance on pictures of 32 x 32."""
    return ClassImageRecipe(
        data="fashion",
        model=DiCoConfig(size=32, channels=1, width=32, depth=(2, 2, 2, 2, 2), classes=10),
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
