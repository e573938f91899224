"""Donors: a run, finished or not, becomes a model folder with a card and earlier averages."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ditkit
from ditkit.core.loading import shipped
from ditkit.core.model import Model, parameter_count
from ditkit.data.images import ImageSet
from ditkit.models.dit import DiT
from ditkit.models.video_dit import VideoDiT
from ditkit.recipes.digits_video_dit import digits_video_dit
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image import recipe as class_image
from ditkit.tasks.recipe import train_recipe
from ditkit.train.ema import Power
from ditkit.train.settings import Settings

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "donors"))

import publish

REPOSITORY = Path(__file__).parents[2]

SHIPPED = {"fashion-dit": (DiT, fashion_dit), "digits-video-dit": (VideoDiT, digits_video_dit)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 8 steps under DDPM's objective, with a sheet at the last, in a folder that is called as the donor."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=g)
    names = tuple(map(str, range(12)))
    images = ImageSet("little", pictures, torch.arange(12) % 3, ("a", "b", "c"), names, names)
    monkeypatch.setattr(class_image, "load_images", lambda name, size: images)
    like = fashion_dit()
    model = replace(like.model, size=8, width=32, depth=1, heads=2)
    settings = Settings(
        steps=8, batch=4, averages=(Power(0.10),), save_every=2, sheet_every=8, snapshot_every=2
    )
    train_recipe(replace(like, model=model, settings=settings), tmp_path / "fashion-dit")
    return tmp_path / "fashion-dit"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root to publish into, with the cards' texts."""
    cards = tmp_path / "root" / "tools" / "cards"
    cards.mkdir(parents=True)
    for name in SHIPPED:
        (cards / f"{name}.md").write_text((REPOSITORY / "tools" / "cards" / f"{name}.md").read_text())
    monkeypatch.setattr(publish, "ROOT", tmp_path / "root")
    monkeypatch.setattr(publish, "HERE", tmp_path / "root" / "donors")
    return tmp_path / "root"


def test_a_sheet_of_a_ddpm_model_is_drawn(run: Path) -> None:
    assert [path.name for path in (run / "samples").iterdir()] == ["000008.png"]


def test_the_newest_average_is_published_and_those_before_it(
    run: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["publish.py", str(run)])
    publish.main()
    own = Model.load(run / "model")
    found = Model.load(published / "src" / "ditkit" / "weights" / "fashion-dit")
    assert found.config == own.config
    assert found.history == ({**own.history[0], "average": 0.1},)
    for name, value in own.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.half().float())
    kept = [Model.load(published / "donors" / "fashion-dit" / share) for share in ("25", "50", "75")]
    assert [model.history[0]["steps"] for model in kept] == [2, 4, 6]
    card = (published / "src" / "ditkit" / "weights" / "fashion-dit" / "README.md").read_text()
    assert "to its end: 8 steps of 4 pictures" in card and "Not yet measured." in card
    losses = [json.loads(line)["loss"] for line in (run / "losses.jsonl").read_text().splitlines()]
    assert f"| 8 | {sum(losses) / 8:.4f} |" in card


def test_a_run_that_was_stopped_is_published_as_far_as_it_came(
    run: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["settings"]["steps"] = 16
    (run / "recipe.json").write_text(json.dumps(recipe))
    donors = published / "donors" / "fashion-dit"
    donors.mkdir(parents=True)
    seen = {"command": "python measure.py", "trained_steps": 4, "figures": {"class_accuracy": 0.5}}
    (donors / "measured.json").write_text(json.dumps(seen))
    monkeypatch.setattr(sys, "argv", ["publish.py", str(run)])
    publish.main()
    assert sorted(path.name for path in donors.iterdir()) == ["25", "50", "measured.json"]
    card = (published / "src" / "ditkit" / "weights" / "fashion-dit" / "README.md").read_text()
    assert "so far 50% of the recipe's 16: 8 steps" in card
    assert "By `python measure.py`, after 4 steps." in card and "| class accuracy | 0.5 |" in card


def test_scores_are_those_of_the_weights_that_were_scored(
    run: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["publish.py", str(run)])
    publish.main()
    config = published / "src" / "ditkit" / "weights" / "fashion-dit" / "config.json"
    earlier = json.loads(config.read_text())
    earlier["history"][-1]["steps"] = 6
    config.write_text(json.dumps(earlier))
    scores = {"psnr_db": 17.0, "ssim": 0.8, "temporal_error": 1.0}
    masks = [{"mask": "predict", "model": scores, "baseline": None}]
    path = published / "donors" / "fashion-dit" / "video.json"
    path.write_text(json.dumps({"command": "ditkit video", "masks": masks}))
    for _ in range(2):
        publish.main()
        card = (config.parent / "README.md").read_text()
        assert "By `ditkit video`, after 6 steps." in card
        assert "| predict | model | 17.000 | 0.800 | 1.000 |" in card


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_donor_is_its_recipes_network(name: str) -> None:
    kind, recipe = SHIPPED[name]
    model = ditkit.load(name)
    assert name in shipped() and isinstance(model, kind)
    wanted = recipe().model
    for field in ("channels", "patch", "width", "depth", "heads", "label_dropout", "convention"):
        assert getattr(model.config, field) == getattr(wanted, field), field
    assert model.config.classes == len(model.config.class_names) == 10
    folder = REPOSITORY / "src" / "ditkit" / "weights" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text()
    assert f"{parameter_count(model):,}" in card and f"{model.history[-1]['steps']:,} steps" in card
