"""What a recipe goes on from: another class or size, under transforms; resumed, it applies nothing again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditkit.adapt.lora import LoRA
from ditkit.compress import Kept
from ditkit.core.errors import ConfigError
from ditkit.core.inherit import Inherit
from ditkit.core.model import Model
from ditkit.models.dit import DiT, DiTConfig
from ditkit.recipes.emoji import emoji
from ditkit.report.sheet import write_png
from ditkit.tasks.recipe import describe, started, train_recipe
from ditkit.train.ema import Constant

NAMES = ("cold", "warm")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        place = folder / NAMES[i % 2] / f"{i}.png"
        write_png(place, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)))
    return folder


def recipe(pictures: Path, **changed: Any) -> Any:
    base = emoji()
    model = replace(base.model, size=16, width=32, depth=3, heads=2)
    settings = replace(
        base.settings,
        steps=4,
        batch=4,
        warmup=0,
        precision="float32",
        averages=(Constant(0.9),),
        save_every=1,
        sheet_every=0,
        snapshot_every=0,
        **changed.pop("settings", {}),
    )
    return replace(base, data=str(pictures), model=model, settings=settings, **changed)


@pytest.fixture
def source(tmp_path: Path) -> str:
    config = DiTConfig(
        size=16, patch=4, channels=3, width=32, depth=4, heads=2, classes=2, class_names=NAMES,
        convention=emoji().model.convention,
    )  # fmt: skip
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return str(model.save(tmp_path / "source"))


def test_transforms_are_applied_once_and_replayed_on_resume(
    pictures: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(
        pictures, init=source, transforms=(Kept(blocks=(0, 2, 3)), LoRA(rank=2)), settings={"trained": "lora"}
    )
    assert "inherit" not in describe(given)
    whole = train_recipe(given, tmp_path / "whole")
    short = replace(given, settings=replace(given.settings, steps=2))
    train_recipe(short, tmp_path / "run")
    monkeypatch.setattr(Kept, "apply", lambda *_: pytest.fail("applied again"))
    again = train_recipe(given, tmp_path / "run", resume=True)
    assert again.transforms == whole.transforms == given.transforms
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())
    base = Model.load(source).state_dict()
    kept = whole.state_dict()
    assert torch.equal(kept["blocks.1.attn.qkv.base_layer.weight"], base["blocks.2.attn.qkv.weight"])
    other = replace(given, transforms=(Kept(blocks=(0, 1, 3)), LoRA(rank=2)))
    with pytest.raises(ConfigError, match="transforms was"):
        train_recipe(other, tmp_path / "run", resume=True)


def test_a_student_of_another_depth_takes_its_weights_from_its_teacher(pictures: Path, source: str) -> None:
    rule = Inherit(map=(("blocks.1.*", "blocks.2.*"), ("blocks.2.*", "blocks.3.*")))
    student = started(recipe(pictures, init=source, inherit=rule)).model
    assert student is not None
    teacher = Model.load(source)
    assert torch.equal(student.blocks[1].mlp.inner.weight, teacher.blocks[2].mlp.inner.weight)
    with pytest.raises(ConfigError, match="inherit is how weights are taken from init"):
        recipe(pictures, inherit=rule)
    with pytest.raises(ConfigError, match="no tensor of the model matches"):
        started(recipe(pictures, init=source, inherit=Inherit(skip=("text.*",))))
