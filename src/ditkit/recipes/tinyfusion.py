"""TinyFusion (arXiv 2412.01199): a search for the blocks to keep of a trained DiT, and recovery of what is left."""

from __future__ import annotations

from dataclasses import replace

from ditkit.adapt.lora import LoRA
from ditkit.compress.learned_depth import LearnedDepth
from ditkit.compress.scores import alternate
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.schedules import Ramp
from ditkit.train.settings import Group, Settings
from ditkit.train.terms.masked_distillation import MaskedDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound

SEARCH, RECOVERY = 1000, 2000


def tinyfusion() -> ClassImageRecipe:
    """Search which block of every two of `fashion-dit` stays, 6 of 12, with adapters that stand for training.

    `ditkit.compress.decide` says which. The paper's run is 10,000 steps of 128 of a DiT-XL/2 and averages at 0.999;
    rates, temperatures, and adapters of rank 8 on all linear layers are its own. For another depth give
    `--policy learneddepth:keep=2,of=4,steps=...`.
    """
    return replace(
        fashion_dit(),
        init="fashion-dit",
        transforms=(LoRA(rank=8, alpha=16, layers="all"),),
        policies=(LearnedDepth(steps=SEARCH),),
        settings=Settings(
            steps=SEARCH,
            batch=64,
            learning_rate=1e-4,
            clip=1.0,
            precision="bf16",
            trained="lora+learneddepth",
            groups=(Group("learneddepth", 10.0),),
            averages=(Constant(0.99),),
            save_every=100,
            sheet_every=0,
        ),
    )


def tinyfusion_recovery() -> ClassImageRecipe:
    """Recovery by the plain loss of the blocks that --transform keeps, by default every second.

    Rates fall from 2e-4 as the paper's, which end at 1e-4 after 100,000 steps of 256.
    """
    return replace(
        fashion_dit(),
        init="fashion-dit",
        transforms=(alternate(12),),
        settings=Settings(
            steps=RECOVERY,
            batch=64,
            learning_rate=2e-4,
            cosine=True,
            clip=1.0,
            precision="bf16",
            averages=(Constant(0.999),),
            save_every=100,
            sheet_every=500,
        ),
    )


def tinyfusion_distil() -> ClassImageRecipe:
    """Recovery by masked distillation from the deep model: 0.9 of its answer, 0.1 of the data, and paired features.

    The blocks kept are those of --transform, by default every second; a student's block is paired with the last of its
    two in the teacher.
    """
    distillation = MaskedDistillation(features=Ramp(0.01, 0.0, 0, RECOVERY - 1))
    terms = (Regression(0.1), VariationalBound(0.1), distillation)
    return replace(tinyfusion_recovery(), objective=Denoising(terms))
