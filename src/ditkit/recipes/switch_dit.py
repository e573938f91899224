"""Switch-DiT (arXiv 2403.09176): the donor's training with experts in each block that the noise-time chooses."""

from __future__ import annotations

from dataclasses import asdict, replace

from ditkit.models.switch_dit import SwitchDiTConfig
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.terms.diffusion_prior import DiffusionPrior


def switch_dit() -> ClassImageRecipe:
    """`fashion-dit` with two of three experts in each block and the diffusion prior: 4.3 M parameters, 4,000 steps.

    `ditkit experts runs/switch-dit/model` shows which experts its noise-times use. `--active 1` leaves no path that all
    noise-times share.
    """
    donor = fashion_dit()
    sizes = {**asdict(donor.model), "convention": donor.model.convention}
    terms = (*donor.objective.terms, DiffusionPrior())
    return replace(donor, model=SwitchDiTConfig(**sizes), objective=replace(donor.objective, terms=terms))
