"""PredFormer's small experiment: the paper's nine layouts, fewer layers and no gates, trained alike.

    python benchmarks/layouts.py
    python benchmarks/layouts.py --size 64 --width 128 --steps 20000 --keep runs/layouts64
    python benchmarks/layouts.py --seeds 1 --networks Full Quadruplet-TSST

The second is of the specification's size and wants a GPU. Stopped at any moment, the same command goes on. Every
network has the same data, order and number of steps, and, where layers are not counted, parameters to 0.2 %. Errors
are of held-out clips, as in Table 2 of the paper: squared, summed over a frame, averaged over frames and clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import tyro

from common import device, record, show
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model, parameter_count
from ditkit.data.loading import load_clips
from ditkit.metrics.forecast import PERSISTENCE
from ditkit.models.predformer import VARIANTS, PredFormerConfig, published_layout
from ditkit.recipes.predformer import predformer
from ditkit.tasks.forecast.recipe import ClipForecastRecipe
from ditkit.tasks.forecast.scores import score_clips
from ditkit.tasks.recipe import forward_macs, train_recipe
from ditkit.train.record import RECIPE
from expectations import Claim, judged
from forecasting import spent

BEST = "Quadruplet-TSST"
FULL, BY_STAGE = "Full", ("Fac-S-T", "Fac-T-S")
INTERLEAVED = tuple(name for name in VARIANTS if name not in (FULL, *BY_STAGE))
LAYER = 4
"""Blocks of a layer of TSST."""
PLAIN = "without gates"
BELOW_PERSISTENCE, ABOUT = 2.0, 0.95
"""The ratio of errors that counts as far below, and the one that counts as equal or less."""


@dataclass(frozen=True)
class Arguments:
    """Sizes of the experiment.

    Args:
        size: of a frame, in pixels. frames: seen, and said. patch: side of a token.
        width: of a token; heads have 32 each, and a SwiGLU has four times as many hidden.
        blocks: of every network but those with fewer layers; 12 is the least that all layouts divide.
        steps, batch: of each training. seeds: trainings a network. clips: held out.
        keep: folder of all trainings; where they are, they go on.
        networks: to train; with fewer than all there are no claims, and nothing is recorded.
    """

    size: int = 32
    frames: int = 10
    patch: int = 8
    width: int = 64
    blocks: int = 12
    steps: int = 1000
    batch: int = 8
    seeds: int = 3
    clips: int = 256
    keep: Path = Path("runs/layouts")
    networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.blocks % 12:
            raise ConfigError(f"blocks={self.blocks}, expected a multiple of 12, which all layouts divide")
        for name in self.networks:
            if name not in self.configs:
                raise ConfigError(unknown("network", name, self.configs))

    @property
    def configs(self) -> dict[str, PredFormerConfig]:
        """Every network of the experiment, by its name."""
        base = PredFormerConfig(
            frames=self.frames,
            size=(self.size, self.size),
            patch=self.patch,
            width=self.width,
            heads=max(1, self.width // 32),
            hidden=4 * self.width,
        )
        found = {name: replace(base, layout=published_layout(name, self.blocks)) for name in VARIANTS}
        for layers in self.fewer:
            found[layered(layers)] = replace(base, layout=f"TSST*{layers}")
        found[PLAIN] = replace(found[BEST], gated=False, hidden=3 * base.hidden // 2)
        return found

    @property
    def fewer(self) -> range:
        """Layers of the networks that have not all."""
        return range(1, self.blocks // LAYER)

    @property
    def trained(self) -> tuple[str, ...]:
        return self.networks or tuple(self.configs)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The specification's, section 2 of its checks; in each pair the first should have the larger error."""

        def pairs(*names: tuple[str, str]) -> tuple[tuple[str, str, str], ...]:
            return tuple((worse, better, "mse") for worse, better in names)

        ladder = [layered(layers) for layers in self.fewer] + [BEST]
        return (
            Claim(
                f"every layout has less than 1/{BELOW_PERSISTENCE:g} of persistence's error",
                pairs(*((PERSISTENCE, name) for name in VARIANTS)),
                BELOW_PERSISTENCE,
            ),
            Claim("every interleaved layout beats full attention", pairs(*((FULL, n) for n in INTERLEAVED))),
            Claim(
                "full attention is about equal to one axis after the other, or better",
                pairs(*((n, FULL) for n in BY_STAGE)),
                ABOUT,
            ),
            Claim("more layers have less error", pairs(*pairwise(ladder))),
            Claim("gates beat a plain MLP of as many parameters", pairs((PLAIN, BEST))),
        )


def layered(layers: int) -> str:
    return f"{BEST}, {layers} of its layers"


def recipe_of(name: str, seed: int, arguments: Arguments) -> ClipForecastRecipe:
    base = predformer()
    settings = replace(
        base.settings,
        steps=arguments.steps,
        batch=arguments.batch,
        warmup=min(200, arguments.steps // 10),
        seed=seed,
        save_every=500,
        sheet_every=0,
    )
    return replace(base, model=arguments.configs[name], settings=settings)


def run_of(name: str, seed: int, arguments: Arguments) -> Path:
    return arguments.keep / name.replace(" ", "_").replace(",", "") / str(seed)


def trained(name: str, seed: int, arguments: Arguments) -> Model:
    """A network after its training, which goes on where an earlier call was stopped."""
    run = run_of(name, seed, arguments)
    return train_recipe(recipe_of(name, seed, arguments), run, resume=(run / RECIPE).exists())


def rows(arguments: Arguments) -> list[dict[str, object]]:
    """One row a network, its errors the mean over seeds, persistence last."""
    held_out = load_clips(
        "moving-digits",
        (arguments.size,) * 2,
        frames=2 * arguments.frames,
        split="test",
        length=arguments.clips,
    )
    seeds = range(arguments.seeds)
    errors: dict[str, list[float]] = {}
    # seeds outside: whatever stops this leaves every network as many
    models = {(name, seed): trained(name, seed, arguments) for seed in seeds for name in arguments.trained}
    for seed in seeds:
        own = {name: models[name, seed] for name in arguments.trained}
        for name, score in score_clips(own, held_out, arguments.frames).items():
            errors.setdefault(name, []).append(mean(score.error.mse_all))
    return [row(name, found, models.get((name, 0)), arguments) for name, found in errors.items()]


def row(name: str, errors: Sequence[float], model: Model | None, arguments: Arguments) -> dict[str, object]:
    facts: Mapping[str, object] = {"layout": "", "parameters": 0, "giga_macs": 0, "training_seconds": 0}
    if model is not None:
        facts = {
            "layout": arguments.configs[name].layout,
            "parameters": parameter_count(model),
            "giga_macs": forward_macs(recipe_of(name, 0, arguments)) / 1e9,
            "training_seconds": round(mean(spent(run_of(name, s, arguments)) for s in range(len(errors)))),
        }
    spread = stdev(errors) if len(errors) > 1 else 0.0
    each = {"mse_by_seed": [round(error, 2) for error in errors]}
    return {"network": name, **facts, "mse": mean(errors), "mse_deviation": spread, **each}


def main(arguments: Arguments) -> None:
    found = rows(arguments)
    title = (
        f"moving digits of {arguments.size} px, {arguments.steps} steps, {arguments.seeds} seeds; {device()}"
    )
    show(title, [{**row, "mse_by_seed": ""} for row in found])
    if set(arguments.trained) == set(arguments.configs):
        verdicts = judged(arguments.claims, found, named="network")
        show("claims", verdicts)
        record("layouts", [*found, *verdicts])


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
