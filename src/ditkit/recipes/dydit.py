"""DyDiT++ (arXiv 2504.06803): a trained DiT learns which heads, channels and tokens each noise level needs."""

from __future__ import annotations

from dataclasses import replace

from ditkit.compress.dydit import DyDiT
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.schedules import Between
from ditkit.train.settings import Group, Settings
from ditkit.train.terms.budget import Budget
from ditkit.train.terms.complete_model import CompleteModel
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from ditkit.train.timesteps import Stratified

STEPS = 1000


def dydit() -> ClassImageRecipe:
    """`fashion-dit` down to half of its blocks' MACs: 1,000 steps, the first 300 beside the complete model.

    The budget's target falls from 1 in 200 steps, and routers learn at 30 times the rate of the rest. The paper's run
    for 0.5 is 200,000 steps of 256 at one rate, 30,000 beside the complete model, and a fall of 1,000; its rate, its
    clipping and its skipped steps are these.
    """
    terms = (
        Regression(),
        VariationalBound(),
        CompleteModel(Between(1.0, 0, 3 * STEPS // 10)),
        Budget(target=0.5, warmup=STEPS // 5, hold=STEPS // 50),
    )
    return replace(
        fashion_dit(),
        init="fashion-dit",
        policies=(DyDiT(),),
        objective=Denoising(terms, clock=Stratified(4)),
        settings=Settings(
            steps=STEPS,
            batch=64,
            learning_rate=1e-4,
            clip=200.0,
            skip_above=200.0,
            precision="bf16",
            groups=(Group("dydit", 30.0),),
            averages=(Constant(0.99),),
            save_every=100,
            sheet_every=500,
        ),
    )
