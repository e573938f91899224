"""Runs that go on, repeat their samples or learn a table of pandas (found.md, cases 8, 15 and 21)."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ditkit.core.errors import ConfigError
from ditkit.data.content import content_digest
from ditkit.models.dit import DiTConfig
from ditkit.models.predformer import PredFormerConfig
from ditkit.recipes.emoji import emoji
from ditkit.recipes.predformer import predformer_series
from ditkit.tasks.recipe import Recipe, describe, train_recipe
from ditkit.train.ema import Constant
from ditkit.train.record import RECIPE
from ditkit.train.settings import Settings

QUICK = Settings(steps=2, batch=2, averages=(Constant(0.5),), save_every=1, sheet_every=0)
NETWORK = PredFormerConfig(frames=3, patch=1, width=8, heads=2, hidden=8, layout="T")


def table(count: int = 40, shift: float = 0.0) -> pd.DataFrame:
    stamps = pd.date_range("2024-01-01", periods=count, freq="h", name="time")
    return pd.DataFrame(
        {"load": np.sin(np.arange(count) / 4) + shift, "wind": np.arange(count) % 7.0}, index=stamps
    )


def of_series(data: Any, steps: int = 2) -> Recipe:
    return replace(predformer_series(), data=data, model=NETWORK, settings=replace(QUICK, steps=steps))


def pictures(folder: Path, value: int = 0) -> Path:
    (folder / "cat").mkdir(parents=True, exist_ok=True)
    for i in range(3):
        Image.new("L", (8, 8), value + 40 * i).save(folder / "cat" / f"{i}.png")
    return folder


def of_pictures(data: Path, **changes: Any) -> Recipe:
    model = DiTConfig(size=8, patch=4, width=8, depth=1, heads=2)
    return replace(emoji(), data=str(data), options={}, model=model, settings=replace(QUICK, **changes))


def test_found_15_a_resume_knows_its_data_however_their_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    table().to_csv(tmp_path / "a" / "b.csv")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    train_recipe(of_series("a/b.csv", 1), run)
    moved = Path(shutil.copy("a/b.csv", "moved.csv"))
    spellings = ["./a/b.csv", str(tmp_path / "a" / "b.csv"), str(moved)]
    for steps, data in enumerate(spellings, 2):
        train_recipe(of_series(data, steps), run, resume=True)
    assert len((run / "losses.jsonl").read_text().splitlines()) == 4
    table(shift=1.0).to_csv(moved)
    with pytest.raises(ConfigError, match="the files of the data are not those of the run so far"):
        train_recipe(of_series(str(moved), 5), run, resume=True)


def test_found_15_a_record_without_a_digest_is_compared_by_the_path(tmp_path: Path) -> None:
    table().to_csv(tmp_path / "a.csv")
    shutil.copy(tmp_path / "a.csv", tmp_path / "b.csv")
    train_recipe(of_series(str(tmp_path / "a.csv"), 1), tmp_path / "run")
    record = json.loads((tmp_path / "run" / RECIPE).read_text())
    del record["content"]
    (tmp_path / "run" / RECIPE).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"data was .*a\.csv.*now .*b\.csv"):
        train_recipe(of_series(str(tmp_path / "b.csv")), tmp_path / "run", resume=True)


def test_found_8_pictures_that_were_replaced_in_place_are_other_data(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos")
    train_recipe(of_pictures(folder, steps=1), tmp_path / "run")
    pictures(folder, value=9)
    with pytest.raises(ConfigError, match="the files of the data are not those of the run so far"):
        train_recipe(of_pictures(folder), tmp_path / "run", resume=True)
    pictures(folder)
    train_recipe(of_pictures(folder), tmp_path / "run", resume=True)


def test_found_8_the_digest_is_of_names_and_content_alone(tmp_path: Path) -> None:
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other")
    os.utime(other / "cat" / "0.png", (0, 0))
    assert content_digest(one) == content_digest(str(other)) != ""
    (other / "cat" / "0.png").rename(other / "cat" / "9.png")
    assert content_digest(one) != content_digest(other)
    assert content_digest("fashion") == ""
    frame = table()
    assert content_digest(frame) == content_digest(table()) != content_digest(table(shift=1e-9))
    assert content_digest(frame["load"]) != content_digest(frame["wind"])
    data_set = frame.to_xarray()
    assert content_digest(data_set) == content_digest(table().to_xarray()) != content_digest(data_set["load"])


def test_found_21_few_pictures_and_many_steps_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """12,000 steps of 64 of 60 pictures are 12,800 epochs."""
    recipe = of_pictures(pictures(tmp_path / "photos"), steps=3001)
    quoted = "each is seen 2,001 times, and will be learned by heart; fewer steps, about 3000, or more data"
    assert quoted in describe(recipe) and "learned by heart" not in describe(of_pictures(tmp_path / "photos"))
    short = replace(recipe, settings=replace(recipe.settings, steps=2))
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditkit.tasks.recipe.OFTEN", 1)
        train_recipe(short, tmp_path / "run")
    assert "2 steps x 2 of 3 samples: each is seen 1 times" in caplog.text


@pytest.mark.parametrize("kind", ["pandas", "xarray"])
def test_a_table_in_memory_is_learned_as_its_file_is(kind: str, tmp_path: Path) -> None:
    frame = table()
    frame.to_csv(tmp_path / "load.csv")
    data = frame if kind == "pandas" else frame.to_xarray()
    learned = train_recipe(of_series(data), tmp_path / "run")
    filed = train_recipe(of_series(str(tmp_path / "load.csv")), tmp_path / "filed")
    own, other = learned.state_dict(), filed.state_dict()
    assert all(torch.equal(own[name], value) for name, value in other.items())
    assert type(data).__name__ in describe(of_series(data))
    train_recipe(of_series(data, 3), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="the files of the data are not those"):
        train_recipe(of_series(data + 1, 4), tmp_path / "run", resume=True)
