"""SLA (arXiv 2509.24006) on a clip model: most of its attention becomes linear, by fine-tuning in one stage or two."""

from __future__ import annotations

from dataclasses import replace

from ditkit.attention.sparse_linear import SparseLinear
from ditkit.recipes.digits_video_dit import digits_video_dit
from ditkit.tasks.video.recipe import VideoRecipe
from ditkit.train.aligning import Aligning
from ditkit.train.ema import Constant
from ditkit.train.settings import Group, Settings

ALIGNED = 1000
MAP = "sparselinear"


def sla() -> VideoRecipe:
    """Fine-tune all of `digits-video-dit` under SLA by its own loss, the paper's single stage: 2,000 steps of 16.

    1,024 tokens are 32 blocks of 32, of which 3 are critical and 3 negligible. The paper's 5 and 10 % of blocks of 64
    take 20,000 tokens and more; its run is 2,000 steps of 64 clips of Wan2.1-1.3B. The map begins at 0, where a step
    of Adam is as long as any, hence the warm-up. `--policy sparselinear:variant=sla1,critical=0.1,block=32` is the
    published code's method, `--policy exact` the dense model.
    """
    return replace(
        digits_video_dit(),
        init="digits-video-dit",
        policies=(SparseLinear(critical=0.1, negligible=0.1, block=32),),
        settings=Settings(
            steps=2000,
            batch=16,
            learning_rate=1e-4,
            warmup=100,
            clip=1.0,
            averages=(Constant(0.99),),
            save_every=100,
            sheet_every=500,
        ),
    )


def sla_align() -> VideoRecipe:
    """Teach the maps alone to give what dense attention gave, layer by layer on its own activations: a first stage.

    1,000 steps at 1e-4, of which a second-hand recipe of two stages speaks; the paper has one. Go on with `ditkit
    train sla-finish --init FOLDER`.
    """
    one = sla()
    return replace(
        one,
        objective=Aligning(),
        settings=replace(one.settings, steps=ALIGNED, trained=MAP, clip=0.0, sheet_every=0),
    )


def sla_finish() -> VideoRecipe:
    """Fine-tune all weights after `sla_align`, those of the model at 1e-5 and the maps at five times that.

    Give the aligned model with --init.
    """
    one = sla()
    return replace(
        one,
        settings=replace(one.settings, learning_rate=1e-5, groups=(Group(MAP, 5.0),)),
    )
