"""UniTS at the scale of a CPU: its four jobs, on series that are simulated from a Landsat scene or on your own."""

from __future__ import annotations

from dataclasses import replace

from ditkit.models.units import Job, UniTSConfig
from ditkit.tasks.remote_sensing.recipe import SatelliteRecipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.settings import Settings


def units() -> SatelliteRecipe:
    """Fill what simulated clouds hide, from the other dates and a second sensor.

    8 dates of 32 x 32 pixels in 6 bands. The dates, the clouds and the radar of the set landsat are simulated from one
    real scene. For a folder of your own GeoTIFFs: --data FOLDER; clouds are then simulated over what is clear. Not yet
    run to its end. The paper's sizes are UniTS.preset("S1+S2") and others, 54.5 M parameters.
    """
    return _recipe("reconstruction")


def units_cloud_removal() -> SatelliteRecipe:
    """Take clouds and shadows off images that have them in their values; nothing says where they are."""
    return _recipe("cloud-removal")


def units_forecast() -> SatelliteRecipe:
    """Make the later half of a series' dates from the first half of its optical images alone."""
    recipe = _recipe("forecasting")
    return replace(recipe, model=replace(recipe.model, radar_channels=0))


def units_change() -> SatelliteRecipe:
    """Map the land cover at each date, from clear images alone: neither dates nor places, as the paper has it."""
    recipe = _recipe("change-detection")
    return replace(recipe, model=replace(recipe.model, radar_channels=0, dates=False, places=False))


def _recipe(job: Job) -> SatelliteRecipe:
    return SatelliteRecipe(
        data="landsat",
        model=UniTSConfig(
            frames=8,
            size=32,
            width=128,
            depth=3,
            heads=4,
            job=job,
            channels=6,
            optical_channels=6,
        ),
        settings=Settings(
            steps=4000,
            batch=8,
            learning_rate=5e-4,
            warmup=100,
            clip=1.0,
            averages=(Constant(0.999),),
            save_every=200,
            sheet_every=500,
        ),
        objective=Denoising(),
    )
