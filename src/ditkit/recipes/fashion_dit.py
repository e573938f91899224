"""A donor: a small DiT of Fashion-MNIST under DDPM's objective, the picture model that methods start from."""

from __future__ import annotations

from ditkit.core.convention import DDPM
from ditkit.models.dit import DiTConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


def fashion_dit() -> ClassImageRecipe:
    """3.7 M parameters in 12 blocks, 64 tokens, noise prediction with learned variance; 126 TMAC in all.

    What ships as `fashion-dit` (see its card). Its snapshots at 25, 50 and 75 % are `benchmarks/donors/fashion-dit`.
    """
    return ClassImageRecipe(
        data="fashion",
        model=DiTConfig(
            size=32, patch=4, channels=1, width=128, depth=12, heads=4, classes=10, convention=DDPM
        ),
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
            save_every=100,
            sheet_every=500,
            snapshot_every=250,
        ),
        objective=Denoising((Regression(), VariationalBound())),
    )
