"""VDT on moving digits: prediction, interpolation and completion by one network, at the scale of a CPU."""

from __future__ import annotations

from ditkit.core.convention import Convention
from ditkit.models.vdt import VDTConfig
from ditkit.tasks.video import VideoRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal


def vdt() -> VideoRecipe:
    """7.1 M parameters, 16 frames of 32 x 32 in 256 tokens, two digits; data prediction on the linear path.

    The paper's models are VDT.preset("S/2") and ("L/2"), under DDPM's objective on latents.
    """
    return VideoRecipe(
        data="moving-digits",
        options={"length": 100_000},
        model=VDTConfig(
            frames=16,
            size=32,
            patch=8,
            channels=1,
            width=192,
            depth=8,
            heads=6,
            convention=Convention(prediction="data"),
        ),
        settings=Settings(
            steps=6000,
            batch=16,
            learning_rate=1e-3,
            warmup=200,
            decay_after=2000,
            betas=(0.9, 0.99),
            clip=1.0,
            precision="bf16",
            averages=(Power(0.10), Power(0.05)),
            save_every=100,
            sheet_every=500,
            snapshot_every=500,
        ),
        objective=Denoising(timesteps=LogitNormal(0.0, 1.0)),
    )
