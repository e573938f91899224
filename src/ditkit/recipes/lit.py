"""LiT (arXiv 2501.12976): a trained DiT made linear in its tokens, by inheritance and hybrid distillation."""

from __future__ import annotations

from dataclasses import replace

from ditkit.attention.linear import WITHOUT_ATTENTION, ReluLinear
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.terms.distillation import PredictionDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variance_distillation import VarianceDistillation
from ditkit.train.terms.variational_bound import VariationalBound


def lit() -> ClassImageRecipe:
    """Make `fashion-dit` linear: 2 heads, 5 x 5 convolutions, all weights but attention's, the donor as teacher.

    1,000 steps, a quarter of the donor's own. The paper's short run is 100,000 steps of 256 at 1e-4, from a donor of
    600,000. Another DiT: `--init FOLDER`; without the convolution: `--policy relulinear:kernel=0`.
    """
    terms = (Regression(), VariationalBound(), PredictionDistillation(), VarianceDistillation())
    return replace(
        fashion_dit(),
        init="fashion-dit",
        inherit=WITHOUT_ATTENTION,
        policies=(ReluLinear(),),
        objective=Denoising(terms),
        settings=Settings(
            steps=1000,
            batch=64,
            learning_rate=5e-4,
            warmup=50,
            cosine=True,
            betas=(0.9, 0.99),
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10),),
            save_every=100,
            sheet_every=500,
        ),
    )
