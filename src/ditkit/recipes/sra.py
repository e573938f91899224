"""SRA (arXiv 2505.02831): a SiT of garments whose early blocks are aligned with later ones of its own average."""

from __future__ import annotations

from dataclasses import replace

from ditkit.core.convention import Convention
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.schedules import EpochDecay
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.self_alignment import SelfAlignment


def sra() -> ClassImageRecipe:
    """`fashion-dit`'s network under flow matching, block 3 aligned with block 8 of its average; 154 TMAC.

    The pair is that of SiT-B, which has as many blocks. The average is of the last tenth of the run, where the paper
    takes 0.9999, which would still hold a good part of the first weights after 4,000 steps.
    """
    donor = fashion_dit()
    fading = EpochDecay(samples=60_000, batch=donor.settings.batch)
    return replace(
        donor,
        model=replace(donor.model, convention=Convention()),
        settings=replace(donor.settings, snapshot_every=0),
        objective=Denoising((Regression(), SelfAlignment(fading))),
    )
