"""A video DiT with full attention on moving digits, at the scale of a CPU."""

from __future__ import annotations

from dataclasses import replace

from ditkit.core.convention import Convention
from ditkit.models.video_dit import VideoDiTConfig
from ditkit.recipes.vdt import vdt
from ditkit.tasks.video import FullVideoRecipe


def video_dit() -> FullVideoRecipe:
    """1.9 M parameters, 16 frames of 32 x 32 in 1,024 tokens that all see each other; as `vdt` in all else."""
    like = vdt()
    return FullVideoRecipe(
        data=like.data,
        options=like.options,
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
        settings=replace(like.settings, steps=10_000, batch=8),
        objective=like.objective,
        masks=like.masks,
    )
