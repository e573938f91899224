"""A video DiT with full attention on moving digits, at the scale of a CPU."""

from __future__ import annotations

from dataclasses import replace

from ditkit.core.convention import Convention
from ditkit.models.video_dit import VideoDiTConfig
from ditkit.recipes.vdt import vdt
from ditkit.tasks.video.recipe import VideoRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.timesteps import LogitNormal


def video_dit() -> VideoRecipe:
    """1.9 M parameters, 16 frames of 32 x 32 in 1,024 tokens that all see each other; two moving digits.

    By Muon: after 3,000 steps of AdamW its strokes ignored the given frames; after 2,000 of Muon from there they
    follow.
    """
    like = vdt()
    return VideoRecipe(
        data=like.data,
        options={"length": 100_000},
        model=VideoDiTConfig(
            frames=16,
            size=32,
            patch=(1, 4, 4),
            channels=1,
            width=128,
            depth=6,
            heads=4,
            convention=Convention(prediction="data"),
        ),
        settings=replace(like.settings, steps=6000, learning_rate=2e-3),
        objective=Denoising(timesteps=LogitNormal(0.0, 1.0)),
        masks=like.masks,
    )
