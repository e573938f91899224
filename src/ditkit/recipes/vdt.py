"""VDT on clips of a digit, or of a room: all of its masks by one network, at the scale of a CPU."""

from __future__ import annotations

from dataclasses import replace

from ditkit.core.convention import Convention
from ditkit.models.vdt import VDTConfig
from ditkit.tasks.video.recipe import VideoRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal


def vdt() -> VideoRecipe:
    """3.1 M parameters, 16 frames of 32 x 32 in 1,024 tokens, a slow digit; data prediction on the linear path.

    Of the usual two digits at 3 to 5 pixels a frame (--option digits=2 --option speed=3,5) it learns where they go,
    and in hours of a CPU not what they look like. Noise-times lie high because there it is decided whether a shape is
    carried over or made up. Not yet run from fresh weights (see the card of `digits`). The paper's models are
    VDT.preset("S/2") and ("L/2"), under DDPM's objective on latents.
    """
    return VideoRecipe(
        data="moving-digits",
        options={"length": 100_000, "digits": 1, "speed": (1.0, 2.0)},
        model=VDTConfig(
            frames=16,
            size=32,
            patch=4,
            channels=1,
            width=128,
            depth=8,
            heads=4,
            convention=Convention(prediction="data"),
        ),
        settings=Settings(
            steps=10_000,
            batch=8,
            optimizer="muon",
            learning_rate=1e-3,
            warmup=200,
            cosine=True,
            betas=(0.9, 0.99),
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10), Power(0.05)),
            save_every=100,
            sheet_every=500,
            snapshot_every=500,
        ),
        objective=Denoising(timesteps=LogitNormal(1.0, 1.3)),
    )


def vdt_vizdoom() -> VideoRecipe:
    """Train the same on a walk through a room in colour, a frame at each tic of the game.

    What ships as `vizdoom` (see its card). Open views move as they should, and walls seen from near are blocks.
    """
    recipe = vdt()
    return replace(
        recipe,
        data="vizdoom",
        options={"scenario": "health_gathering", "frame_skip": 1, "episodes": 100},
        settings=replace(recipe.settings, steps=10_000, learning_rate=2e-3),
    )
