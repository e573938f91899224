"""PPCL (arXiv 2511.16156): spans of blocks of a trained DiT, each replaced by a student that the DiT itself teaches."""

from __future__ import annotations

from dataclasses import replace

from ditkit.compress.contiguous import Contiguous
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.settings import Settings
from ditkit.train.terms.span_distillation import SpanDistillation

STEPS = 1000


def ppcl() -> ClassImageRecipe:
    """Replace spans of `fashion-dit` by students, 8 of 12 blocks left; a step costs the donor's pass and the students'.

    The spans are those that `ditkit compress fashion-dit contiguous:remove=4` finds; --transform names others, and
    --init another model, such as `fashion` with `--transform contiguous:stack=single,spans=...`. The paper's run is
    6,000 steps with 13 students of Qwen-Image, AdamW with betas of 0.9 and 0.95, decay of 0.02; the published script
    does not clip gradients.
    """
    return replace(
        fashion_dit(),
        init="fashion-dit",
        transforms=(Contiguous(spans=("4-5", "6-7", "8-9", "10-11")),),
        settings=Settings(
            steps=STEPS,
            batch=64,
            learning_rate=5e-4,
            warmup=16,
            cosine=True,
            betas=(0.9, 0.95),
            weight_decay=0.02,
            precision="bf16",
            trained="contiguous",
            averages=(Constant(0.99),),
            save_every=100,
            sheet_every=0,
        ),
        objective=Denoising((SpanDistillation(),)),
    )
