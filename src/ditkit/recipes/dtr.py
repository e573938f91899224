"""DTR (arXiv 2310.07138): the donor's training with a window of channels for each noise level."""

from __future__ import annotations

from dataclasses import replace

from ditkit.adapt.task_routing import TaskRouting
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe


def dtr() -> ClassImageRecipe:
    """`fashion-dit` from the start under task routing: 4,000 steps, 126 TMAC, as many parameters.

    `--policy taskrouting:alpha=1` slides evenly, `--policy taskrouting:routes=random` is the control, and `--policy
    exact` the plain model.
    """
    return replace(fashion_dit(), policies=(TaskRouting(),))
