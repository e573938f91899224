"""DTR (arXiv 2310.07138): the donor's training with a window of channels for each noise level, and other weights."""

from __future__ import annotations

from dataclasses import replace

from ditkit.adapt.task_routing import TaskRouting
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.settings import Group
from ditkit.train.terms.min_snr import MinSNR
from ditkit.train.terms.uncertainty import RATE, UncertaintyWeighting
from ditkit.train.terms.variational_bound import VariationalBound
from ditkit.train.timesteps import Stratified


def dtr() -> ClassImageRecipe:
    """`fashion-dit` from the start under task routing: 4,000 steps, 126 TMAC, as many parameters.

    `--policy taskrouting:alpha=1` slides evenly, `--policy taskrouting:routes=random` is the control, and `--policy
    exact` the plain model.
    """
    return replace(fashion_dit(), policies=(TaskRouting(),))


def dtr_min_snr() -> ClassImageRecipe:
    """DTR with errors weighted by min(SNR, 5) / SNR, which the paper combines it with: 4,000 steps, 126 TMAC."""
    recipe = dtr()
    return replace(recipe, objective=replace(recipe.objective, terms=(MinSNR(), VariationalBound())))


def dtr_uw() -> ClassImageRecipe:
    """DTR with ANT-UW, the paper's best: 8 parts of noise-time, a batch even over them, weights of each learned.

    4,000 steps, 126 TMAC.
    """
    recipe = dtr()
    part = Group("uncertaintyweighting", RATE / recipe.settings.learning_rate)
    return replace(
        recipe,
        settings=replace(recipe.settings, groups=(part,)),
        objective=Denoising((UncertaintyWeighting(),), clock=Stratified(8)),
    )
