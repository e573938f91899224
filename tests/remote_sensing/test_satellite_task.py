"""The task of satellite series: four jobs trained and measured, and a person's own folder from shell to GeoTIFF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from cli_support import complaint, output
from ditkit.api.evaluate import evaluate
from ditkit.cli.train import found as recipes
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.task import task_of, tasks
from ditkit.data.loading import load_satellite
from ditkit.data.satellite import Scenes, Weather
from ditkit.data.sets import landsat
from ditkit.metrics.gap_filling import linear
from ditkit.metrics.spectral import image_scores
from ditkit.models.units import UniTS, UniTSConfig
from ditkit.sample import Sampling, sample
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.tasks.remote_sensing import own
from ditkit.tasks.remote_sensing.figures import composite, series_strip, shown_bands
from ditkit.tasks.remote_sensing.jobs import given, hidden_of, past_of, target
from ditkit.tasks.remote_sensing.own import process
from ditkit.tasks.remote_sensing.recipe import SatelliteDataset
from ditkit.tasks.remote_sensing.scores import MODEL, judge
from ditkit.train.denoising import Denoising
from ditkit.train.randomness import SampleRNG
from models_support import perturbed
from satellite_support import SIDE, ground, scene

rasterio = pytest.importorskip("rasterio")
JOBS = ("reconstruction", "cloud-removal", "forecasting", "change-detection")
SMALL = {"frames": 4, "size": 8, "width": 16, "depth": 1, "heads": 2, "groups": 4}
FAST = Sampling(steps=2, guidance=1.0)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landsat, "read_scene", scene)


def scenes_of(count: int = 3, size: int = 8) -> Scenes:
    data = landsat.LandsatSeries(ground(), (0, SIDE), 4, (size, size), "train", 50, 0, Weather())
    return data.scenes(torch.arange(count))


def config(job: str, **changes: Any) -> UniTSConfig:
    channels = 4 if job == "change-detection" else 6
    own = {**SMALL, "optical_channels": 6, "channels": channels, "job": job, **changes}
    return UniTSConfig(**own, land_cover=landsat.CLASSES if channels == 4 else ())


def trained(job: str, **changes: Any) -> UniTS:
    torch.manual_seed(0)
    return perturbed(UniTS(config(job, **changes)), 0.05).requires_grad_(False)


# -- jobs


def test_each_job_is_given_what_it_should_be_and_no_truth():
    scenes = scenes_of()
    hidden = scenes.hidden.expand_as(scenes.image)
    for job in JOBS:
        told, (made, counted) = given(config(job), scenes).streams, target(config(job), scenes)
        clear = ~hidden_of(config(job), scenes).expand_as(scenes.image)
        assert torch.equal(told["optical"][clear], scenes.image[clear]), job
        other = scenes._replace(image=torch.where(clear, scenes.image, -scenes.image))
        assert torch.equal(given(config(job), other).streams["optical"], told["optical"]), job
        assert made.shape[2:] == scenes.image.shape[2:] and counted.shape == scenes.known.shape
    removal = given(config("cloud-removal"), scenes).streams
    assert not removal["clouds"].any() and torch.equal(removal["optical"], scenes.observed)
    assert not torch.equal(removal["optical"][hidden], scenes.image[hidden])
    past = past_of(4)
    forecast = given(config("forecasting"), scenes).streams
    assert forecast["clouds"][:, :, past:].all() and not forecast["clouds"][:, :, :past].any()
    assert "radar" not in forecast and "radar" in removal
    assert target(config("forecasting"), scenes)[1].all(), "the past is made of noise, too"
    maps = target(config("change-detection"), scenes)[0]
    assert torch.equal(maps.argmax(1), scenes.labels) and maps.sum(1).unique().tolist() == [-2]
    plain = given(config("change-detection", radar_channels=0, dates=False, places=False), scenes).streams
    assert set(plain) == {"optical", "clouds", "days"}
    short = scenes._replace(present=torch.tensor([True, True, True, False]).expand(3, -1))
    assert not given(config("reconstruction"), short).streams["present"][:, 3].any()


def test_a_forecast_is_not_shown_the_future_by_the_second_sensor():
    scenes = scenes_of()
    later = scenes._replace(radar=scenes.radar.clone())
    later.radar[:, :, past_of(4) :] += 5
    later.image[:, :, past_of(4) :].neg_()
    for whole in (recipes()["units-forecast"]().model, config("forecasting")):
        c = replace(whole, **SMALL)
        first, second = given(c, scenes).streams, given(c, later).streams
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert recipes()["units-forecast"]().model.radar_channels == 0


def test_a_forecast_learns_all_that_it_draws_and_is_judged_by_the_future_alone():
    scenes = scenes_of(2)
    c = config("forecasting")
    truth, learned = target(c, scenes)
    assert learned.all() and torch.equal(truth, scenes.image)
    wrong = truth.clone()
    wrong[:, :, : past_of(4)].neg_()
    whole, ahead, _ = judge(c, scenes, {MODEL: wrong})
    assert whole[MODEL].rmse == ahead[MODEL].rmse == 0
    missing = torch.arange(4).view(1, 1, 4, 1, 1) >= past_of(4) + 1
    gaps = scenes._replace(known=~missing.expand_as(scenes.known))
    truth, learned = target(c, gaps)
    assert torch.equal(learned, gaps.known)
    assert torch.equal(truth[:, :, 3], scenes.image[:, :, 2]), (
        "no grey is mixed with noise where truth is missing"
    )
    labels = scenes.labels.clone()
    labels[:, 1:] = -1
    maps, learned = target(config("change-detection"), scenes._replace(labels=labels))
    assert torch.equal(maps.argmax(1)[:, 3], labels[:, 0]) and not learned[:, :, 1:].any()


def test_what_the_second_sensor_has_not_measured_is_its_mean():
    scenes = scenes_of()
    scenes.radar[:, :, 1] = torch.nan
    c = config("reconstruction", radar_mean=(-12.0, -19.0), radar_std=(2.0, 3.0))
    radar = given(c, scenes).streams["radar"]
    assert radar[:, 0, 1].unique().tolist() == [-12] and radar[:, 1, 1].unique().tolist() == [-19]
    assert torch.equal(radar[:, :, 2:], scenes.radar[:, :, 2:])


def test_clouds_are_others_at_every_visit_of_a_window_and_the_same_again(tmp_path):
    c = config("reconstruction", radar_channels=0)
    for data in (load_satellite(place(tmp_path / "farm"), 8, frames=4), landsat.load(8, 4, length=9)):
        samples = SatelliteDataset(data, c)
        index = torch.tensor([1, 1])
        first, again, later = (
            samples.batch(index, SampleRNG(0, step, range(2)))[1].streams for step in (0, 0, 1)
        )
        assert torch.equal(first["clouds"], again["clouds"])
        assert not torch.equal(first["clouds"], later["clouds"])
        assert not torch.equal(first["clouds"][0], first["clouds"][1])
        assert torch.equal(first["days"], later["days"])


def test_a_place_without_coordinates_is_refused_where_they_are_embedded():
    scenes = scenes_of()._replace(place=torch.full((3, 2), float("nan")))
    with pytest.raises(ConfigError, match=r"no reference system.*places=False"):
        given(config("reconstruction"), scenes)
    assert "place" not in given(config("reconstruction", places=False), scenes).streams


def test_scores_beside_the_baselines_are_of_the_pixels_that_are_meant():
    scenes = scenes_of(4)
    c = config("reconstruction")
    hidden = hidden_of(c, scenes)
    exact = linear(scenes.image, hidden, scenes.days)
    whole, under, change = judge(c, scenes, {MODEL: exact})
    assert whole[MODEL] == whole["linear"] and under[MODEL] == under["linear"] and not change
    assert under["linear"] == image_scores(exact, scenes.image, hidden)
    assert under["linear"].rmse > whole["linear"].rmse > 0  # clear pixels are right
    future = config("forecasting")
    _, ahead, _ = judge(future, scenes, {MODEL: scenes.image})
    assert ahead[MODEL].rmse == 0 and ahead["last"].rmse > 0
    _, _, change = judge(
        config("change-detection"), scenes, {MODEL: target(config("change-detection"), scenes)[0]}
    )
    assert change[MODEL].miou == 1 and change["most frequent class"].miou < 1


RECIPES = dict(zip(JOBS, ("units", "units-cloud-removal", "units-forecast", "units-change"), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_learned_and_measured(job, tmp_path):
    recipe = recipes()[RECIPES[job]]()
    run = replace(recipe.settings, steps=2, batch=2, warmup=1, save_every=0, sheet_every=2)
    recipe = replace(recipe, model=replace(recipe.model, **SMALL), settings=run, options={"length": 6})
    if job in ("reconstruction", "change-detection"):
        assert "simulated: all dates but one" in describe(recipe)
        train_recipe(recipe, tmp_path / "run")
        assert (tmp_path / "run" / "samples" / "000002.png").exists()
        model = ditkit.load(tmp_path / "run" / "model")
    else:  # the same loop; one step of the loss will do
        ready, samples, _ = recipe.prepared()
        model = ready.network().eval()
        data, cond = samples.batch(torch.arange(2), SampleRNG(0, 0, range(2)))
        assert Denoising()(model, model, data, cond, SampleRNG(0, 0, range(2)))["loss"].isfinite()
        assert cond.mask is None
    assert model.config.job == job and task_of(model).name == "remote_sensing"
    assert (model.config.optical_channels, model.config.bands) == (6, landsat.BANDS)
    found = evaluate(model, "landsat", options={"length": 5}, sampling=FAST, count=3)
    figures = found.as_dict()
    if job == "change-detection":
        assert (
            figures["change"][MODEL].keys() == {"miou", "bc", "sc", "scs"} and model.config.radar_mean == ()
        )
    else:
        part = "in_the_future" if job == "forecasting" else "under_the_clouds"
        assert figures[part].keys() == {MODEL, "last", "closest", "linear"}
        assert len(model.config.radar_mean) == (0 if job == "forecasting" else 2)
    (tmp_path / "out").mkdir()
    assert found.save(tmp_path / "out") == [["series-0.png", "series-1.png"]]
    assert found.table() is not None and any("simulated" in line for line in found.remarks())


def test_unknown_pixels_are_neither_read_nor_learned_from():
    scenes = scenes_of(2)
    known = torch.arange(8).view(1, 1, 1, 1, 8).expand_as(scenes.known) < 4
    scenes = scenes._replace(known=known, hidden=scenes.hidden | ~known)
    model = trained("reconstruction")
    losses = []
    for below in (0.3, float("nan")):
        other = scenes._replace(image=scenes.image.masked_fill(~known, below))
        made, counted = target(model.config, other)
        cond = replace(given(model.config, other), mask=counted.float())
        losses.append(Denoising()(model, model, made, cond, SampleRNG(0, 0, range(2))))
    assert torch.equal(losses[0]["loss"], losses[1]["loss"]) and losses[0]["loss"].isfinite()
    whole = replace(cond, mask=torch.ones_like(cond.mask))
    assert Denoising()(model, model, made, whole, SampleRNG(0, 0, range(2)))["loss"] > losses[0]["loss"]


def test_data_of_another_kind_are_refused_in_one_line(tmp_path):
    model = trained("reconstruction")
    with pytest.raises(ConfigError, match=r"guidance=.*a UniTS is not guided"):
        evaluate(model, "landsat", guidance=3.0, count=1)
    with pytest.raises(ConfigError, match=r"landsat has 6 bands \(blue.*the network takes 3"):
        evaluate(
            UniTS(replace(config("reconstruction"), optical_channels=3, channels=3)).eval(),
            "landsat",
            count=1,
        )
    with pytest.raises(ConfigError, match="fashion holds images, expected satellite series"):
        evaluate(model, "fashion", count=1)
    with pytest.raises(ConfigError, match="landsat has 2 windows for 5 seeds"):
        evaluate(model, "landsat", options={"length": 2}, sampling=FAST, seeds=range(5))
    with pytest.raises(DataError, match="nothing that is hidden is known"):
        evaluate(model, "landsat", options={"least_cloud": 0.0, "most_cloud": 0.0}, sampling=FAST, count=1)
    recipe = recipes()["units-change"]()
    bare = place(tmp_path / "bare", classes=False)
    with pytest.raises(ConfigError, match="0 classes of land cover, expected two or more"):
        train_recipe(replace(recipe, data=str(bare), model=replace(recipe.model, **SMALL)), tmp_path / "run")


def test_comparison_draws_the_series_that_data_give():
    model = trained("reconstruction")
    task = tasks()["remote_sensing"]
    _, cond = task.reference(model, "landsat", None, [0, 1], length=4)
    assert set(cond.streams) == set(model.conditions) - {"present"}
    with pytest.raises(ConfigError, match="expected --data"):
        task.reference(model, None, None, [0])
    report = ditkit.compare(
        model,
        cond=cond,
        seeds=[0, 1],
        steps=6,
        guidance=1.0,
        policies="taylorseer:interval=2,order=1",
        memory=False,
        rounds=1,
        converged_steps=7,
    )
    assert len(report.rows) == 2 and report.rows[1].identical is False


# -- pictures


def test_a_strip_shows_given_truth_filled_and_error_under_dates(tmp_path):
    scenes = scenes_of(1, 32)
    hidden, image = scenes.hidden[0], scenes.image[0]
    dates = [str(day) for day in scenes.dates[0]]
    white = torch.where(hidden, 1.0, image)
    page = np.array(
        series_strip(
            observed=white, filled=image, hidden=hidden, dates=dates, truth=image, bands=landsat.BANDS
        )
    )
    other = np.array(
        series_strip(
            observed=white, filled=-image, hidden=hidden, dates=dates, truth=image, bands=landsat.BANDS
        )
    )
    assert page.shape == other.shape and (page != other).any()
    unknown = series_strip(
        observed=white, filled=-image, hidden=hidden, dates=dates, truth=image, known=torch.zeros_like(hidden)
    )
    assert not np.array_equal(np.array(unknown), other)
    without = series_strip(observed=white, filled=image, hidden=hidden, dates=dates)
    assert without.height < page.shape[0]
    assert shown_bands(landsat.BANDS, 6) == (2, 1, 0) and shown_bands(("B2", "B3", "B4"), 3) == (2, 1, 0)
    assert shown_bands(("a",), 1) == (0, 0, 0)
    assert composite(image, landsat.BANDS).shape == (4, 3, 32, 32)


# -- a person's own folder


def write(path: Path, values: Any, crs: str | None = "EPSG:32633") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    grid = rasterio.transform.from_origin(500_000, 5_300_000, 10, 10)
    profile = {
        "count": count,
        "height": height,
        "width": width,
        "dtype": values.dtype.name,
        "transform": grid,
    }
    with rasterio.open(path, "w", driver="GTiff", crs=crs, **profile) as file:
        file.write(values)


def place(folder: Path, dates: int = 5, classes: bool = True, crs: str | None = "EPSG:32633") -> Path:
    """Five dates of 12 x 16 pixels in 6 bands of 16 bits, a strip of each under cloud."""
    draw = np.random.default_rng(0)
    for i in range(dates):
        day = f"2024-0{i + 1}-10"
        write(folder / f"{day}.tif", draw.integers(300, 4000, (6, 12, 16)).astype(np.uint16), crs)
        mask = np.zeros((1, 12, 16), np.uint8)
        mask[:, :, 3 * i : 3 * i + 3] = 255
        write(folder / "clouds" / f"{day}.tif", mask, crs)
        if classes:
            write(folder / "classes" / f"{day}.tif", draw.integers(0, 4, (1, 12, 16)).astype(np.uint8), crs)
    return folder


def test_a_folder_is_filled_in_its_own_type_and_grid_and_clear_pixels_stay(tmp_path, capsys):
    root = place(tmp_path / "farm")
    model = trained("reconstruction").save(tmp_path / "model")
    before = {path: path.read_bytes() for path in root.rglob("*.tif")}
    told = output(capsys, "satellite", model, "--data", root, "--steps", 2, "--out", tmp_path / "out")
    assert "strip.png" in told and {path: path.read_bytes() for path in root.rglob("*.tif")} == before
    for i in range(5):
        day = f"2024-0{i + 1}-10"
        with (
            rasterio.open(root / f"{day}.tif") as given_,
            rasterio.open(tmp_path / "out" / f"{day}.tif") as made,
        ):
            own, values = given_.read(), made.read()
            assert (made.crs, made.transform, made.dtypes) == (given_.crs, given_.transform, given_.dtypes)
            assert made.tags()["ACQUISITION_DATE"] == day
        hidden = np.zeros((12, 16), bool)
        hidden[:, 3 * i : 3 * i + 3] = True
        assert (values[:, ~hidden] == own[:, ~hidden]).all() and (values[:, hidden] != own[:, hidden]).any()
    about = json.loads((tmp_path / "out" / "satellite.json").read_text())
    assert about["dates"][0] == "2024-01-10" and about["hidden_share"][0] == pytest.approx(3 / 16)
    assert about["command"].startswith("ditkit satellite")
    Image.open(tmp_path / "out" / "strip.png").verify()


def test_what_is_under_a_cloud_changes_nothing_of_a_filled_folder(tmp_path):
    model = trained("reconstruction")
    found = [process(model, place(tmp_path / "a"), sampling=FAST).predicted]
    other = place(tmp_path / "b")
    for i in range(5):
        path = other / f"2024-0{i + 1}-10.tif"
        with rasterio.open(path) as file:
            values = file.read()
        values[:, :, 3 * i : 3 * i + 3] = 9999
        write(path, values)
    found.append(process(model, other, sampling=FAST).predicted)
    assert torch.equal(*found)


def test_later_dates_and_classes_of_a_folder_are_made(tmp_path, capsys):
    root = place(tmp_path / "farm")
    forecast = trained("forecasting").save(tmp_path / "forecast")
    days = ("2024-06-01", "2024-07-15")
    output(
        capsys,
        "satellite",
        forecast,
        "--data",
        root,
        "--dates",
        *days,
        "--steps",
        2,
        "--out",
        tmp_path / "later",
    )
    assert sorted(p.name for p in (tmp_path / "later").glob("*.tif")) == [f"{day}.tif" for day in days]
    change = trained("change-detection", radar_channels=0).save(tmp_path / "change")
    output(capsys, "satellite", change, "--data", root, "--steps", 2, "--out", tmp_path / "classes")
    with rasterio.open(tmp_path / "classes" / "2024-03-10.tif") as file:
        maps = file.read()
    assert maps.shape == (1, 12, 16) and maps.dtype == np.uint8 and maps.max() < 4


def test_folders_that_a_network_cannot_work_on_are_refused_and_nothing_is_left(tmp_path, capsys):
    root = place(tmp_path / "farm")
    model = trained("reconstruction", radar_channels=0).save(tmp_path / "model")
    out = tmp_path / "out"

    def refused(*words: object, data: Path = root, of: Path = model) -> str:
        line = complaint(capsys, "satellite", of, "--data", data, "--steps", 2, "--out", out, *words)
        assert not out.exists()
        return line

    assert "expected none" in refused("--dates", "2024-06-01")
    forecast = trained("forecasting").save(tmp_path / "forecast")
    assert "0 dates to forecast, expected 1 to 2" in refused(of=forecast)
    assert "expected days after 2024-05-10" in refused("--dates", "2024-05-01", of=forecast)
    assert "expected a day such as 2024-05-31" in refused("--dates", "soon", of=forecast)
    assert "is not guided" in refused("--guidance", "3")
    short = place(tmp_path / "short", dates=1)
    assert "short has 1 dates, the network forecasts from 2" in refused(
        "--dates", "2024-06-01", data=short, of=forecast
    )
    bare = place(tmp_path / "bare", crs=None)
    assert "no longitude and latitude" in refused(data=bare)
    for path in (root / "clouds").iterdir():
        write(path, np.ones((1, 12, 16), np.uint8))
    assert "every pixel of all 5 dates is hidden" in refused()
    line = complaint(capsys, "satellite", model, "--data", root, "--out", root)
    assert "is the folder of the data, expected another" in line
    fine = place(tmp_path / "fine")
    before = {path: path.read_bytes() for path in fine.rglob("*.tif")}
    for part in ("clouds", "classes"):
        line = complaint(capsys, "satellite", model, "--data", fine, "--steps", 2, "--out", fine / part)
        assert f"{part}/2024-01-10.tif was read, and is not replaced" in line
    assert {path: path.read_bytes() for path in fine.rglob("*.tif")} == before


@pytest.mark.parametrize(("size", "split"), [(8, True), (12, False)])
def test_scores_say_whether_a_folder_was_really_split(size, split, tmp_path):
    model = trained("reconstruction", radar_channels=0, size=size)
    data = str(place(tmp_path / "farm"))
    if split:  # 5 crops or more
        for i in range(5):
            write(tmp_path / "wide" / f"2024-0{i + 1}-10.tif", np.full((6, 8, 44), 900 + i, np.uint16))
        data = str(tmp_path / "wide")
    found = evaluate(model, data, sampling=FAST, count=1)
    assert found.has_split == split
    assert any("no test split" in line for line in found.remarks()) != split


def test_crops_of_a_larger_scene_are_blended_without_gaps(tmp_path, monkeypatch):
    model = trained("cloud-removal", radar_channels=0)
    made = process(model, place(tmp_path / "farm", dates=3), sampling=FAST)
    assert made.predicted.shape == (3, 6, 12, 16) and made.predicted.isfinite().all()
    monkeypatch.setattr(own, "AT_ONCE", 4)
    done: list[tuple[int, int]] = []
    again = process(
        model, place(tmp_path / "farm", dates=3), sampling=FAST, progress=lambda *two: done.append(two)
    )
    torch.testing.assert_close(again.predicted, made.predicted, atol=1e-5, rtol=0)
    assert done == sorted(done) and done[-1][0] == done[-1][1]
    whole = process(model, place(tmp_path / "more", dates=5), sampling=FAST).predicted
    assert whole.shape == (5, 6, 12, 16) and whole.isfinite().all()
    alone = sample(model, given(model.config, scenes_of(1)), [0], steps=2).samples
    assert alone.shape == (1, 6, 4, 8, 8)
