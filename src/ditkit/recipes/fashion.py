"""Fashion-MNIST, 32 x 32, under DDPM's objective: DiT's own recipe at the scale of a CPU."""

from __future__ import annotations

from ditkit.core.convention import DDPM
from ditkit.models.dit import DiTConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


def fashion() -> ClassImageRecipe:
    """4.2 M parameters, 64 tokens, noise prediction with learned variance; not yet run to its end.

    Measured: 41 images/s on one core beside another training, so some four hours there; after 120 steps the total
    loss is 0.13. Its FID is not known.
    """
    return ClassImageRecipe(
        data="fashion",
        model=DiTConfig(
            size=32, patch=4, channels=1, width=192, depth=6, heads=3, classes=10, convention=DDPM
        ),
        settings=Settings(
            steps=10_000,
            batch=64,
            learning_rate=5e-4,
            warmup=200,
            clip=1.0,
            averages=(Constant(0.999),),
        ),
        objective=Denoising((Regression(), VariationalBound())),
    )
