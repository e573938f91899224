"""Classes of clips: the digits' labels, and how a class-conditional clip model is trained and told by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.model import Model
from ditkit.data.clips import LabelledClips, MemoryClips, class_labels, spread
from ditkit.data.sets import moving_digits
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.recipes.digits_video_dit import digits_video_dit
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.tasks.video import VideoTask
from ditkit.tasks.video.masks import PREDICT
from ditkit.tasks.video.recipe import MaskedClipDataset, VideoRecipe, conditioned, labels_for
from ditkit.tasks.video.scores import complete
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings

EACH = 3
SIDE, FRAMES = 16, 4
ONE = {"digits": 1, "length": 40, "labels": True}


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pictures a digit, all of one brightness: 25 for each whole number from 1."""

    def parts(split: str) -> list[Tensor]:
        return [torch.full((EACH, 28, 28), 25 * (digit + 1), dtype=torch.uint8) for digit in range(10)]

    monkeypatch.setattr(moving_digits, "_read_each", parts)


def small(**changes: object) -> VideoRecipe:
    like = digits_video_dit()
    model = replace(like.model, frames=FRAMES, size=SIDE, width=16, depth=1, heads=1)
    return replace(
        like,
        options=ONE,
        model=model,
        settings=Settings(steps=2, batch=4, save_every=0, sheet_every=2),
        **changes,
    )


def test_the_label_is_the_digit_that_is_drawn() -> None:
    clips = moving_digits.load(SIDE, FRAMES, **ONE)
    assert isinstance(clips, LabelledClips) and clips.classes == tuple("0123456789")
    index = torch.tensor([39, 0, 7, 7, 12])
    label = clips.class_labels(index)
    assert label.dtype == torch.int64 and len(set(label.tolist())) > 2
    brightness = ((clips.clips(index).amax((1, 2, 3, 4)) + 1) * 127.5).round()
    assert torch.equal(brightness.long(), 25 * (label + 1))


def test_labels_change_no_bit_of_a_clip() -> None:
    plain = moving_digits.load(SIDE, FRAMES, digits=1, length=40)
    labelled = moving_digits.load(SIDE, FRAMES, **ONE)
    assert torch.equal(plain.clips(torch.arange(40)), labelled.clips(torch.arange(40)))
    assert plain.classes == ()
    with pytest.raises(ConfigError, match="loaded without labels, expected labels=True"):
        plain.class_labels(torch.tensor([0]))


def test_several_digits_have_no_label() -> None:
    with pytest.raises(ConfigError, match="labels with digits=2, expected digits=1"):
        moving_digits.load(SIDE, FRAMES, labels=True)


def test_a_part_of_a_set_keeps_its_labels() -> None:
    clips = moving_digits.load(SIDE, FRAMES, **ONE)
    part = spread(clips, 4)
    assert part.classes == clips.classes
    assert torch.equal(
        part.class_labels(torch.tensor([3, 1])), clips.class_labels(part.indices[torch.tensor([3, 1])])
    )
    films = (torch.zeros(6, 1, 4, 4, dtype=torch.uint8),)
    plain = spread(MemoryClips("films", films, ("a",), 10.0, 3), 2)
    assert plain.classes == ()
    with pytest.raises(DataError, match="films: its clips have no labels"):
        class_labels(plain, torch.tensor([0]))


def test_a_batch_says_its_labels_and_only_where_there_are_any() -> None:
    recipe = small()
    clips = moving_digits.load(SIDE, FRAMES, **ONE)
    index, chance = torch.tensor([5, 1, 8]), SampleRNG(0, 0, range(3))
    data, cond = MaskedClipDataset(clips, recipe.masks).batch(index, chance)
    assert cond.label is not None and torch.equal(cond.label, clips.class_labels(index))
    plain = moving_digits.load(SIDE, FRAMES, digits=1, length=40)
    same, bare = MaskedClipDataset(plain, recipe.masks).batch(index, chance)
    assert bare.label is None and bare.mask is not None and cond.mask is not None
    assert torch.equal(same, data) and torch.equal(bare.mask, cond.mask)


def test_the_recipe_trains_by_classes_that_the_data_name(tmp_path: Path) -> None:
    model = train_recipe(small(), tmp_path / "run")
    assert isinstance(model, VideoDiT)
    assert model.config.classes == 10 and model.config.class_names == tuple("0123456789")
    assert model.last_training is not None and model.last_training["options"]["labels"] is True
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    again = Model.load(tmp_path / "run" / "model")
    drawn = generate(again, "3", seeds=[0], steps=1)
    assert drawn.labels == ("3",) and drawn.samples.shape == (1, 1, FRAMES, SIDE, SIDE)


def test_classes_need_labels_and_labels_no_classes(tmp_path: Path) -> None:
    unlabelled = {"digits": 1, "length": 40}
    plain = replace(small(), options=unlabelled)
    assert plain.prepared().recipe.model.classes == 0
    told_classes = replace(plain, model=replace(plain.model, classes=10))
    with pytest.raises(
        ConfigError, match=r"no labels, the network has 10 classes; try: --option labels=true"
    ):
        told_classes.prepared()


def test_the_recipe_costs_what_its_docstring_says() -> None:
    recipe = digits_video_dit()
    shown = describe(replace(recipe, options={**recipe.options, "length": 40}))
    assert "model.classes                    10" in shown and "1,869,456" in shown
    step = next(line for line in shown.splitlines() if line.startswith("MACs of a step"))
    assert int(step.split()[-1].replace(",", "")) * recipe.settings.steps < 300e12


def tiny() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(1, FRAMES, SIDE, 8, 16, 1, 1, classes=10, class_names=tuple("0123456789"))
    model = VideoDiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_clip_is_completed_under_its_own_class() -> None:
    model = tiny()
    clips = spread(moving_digits.load(SIDE, FRAMES, **ONE), 2)
    label = labels_for(model, clips)
    assert label is not None and label.tolist() != [0, 5], "else the default would do as well"
    given = clips.clips(torch.arange(2))
    drawn = generate(
        model, seeds=[4, 5], steps=1, guidance=1.0, cond=conditioned(given, PREDICT, [4, 5], label)
    )
    assert drawn.labels == tuple(str(i) for i in label.tolist())
    done = complete(model, given, PREDICT, label=label, seeds=[4, 5], steps=1, guidance=1.0)
    assert torch.equal(done.generated, drawn.samples)
    others = complete(model, given, PREDICT, seeds=[4, 5], steps=1, guidance=1.0)
    assert not torch.equal(others.generated, drawn.samples)


def test_the_commands_tell_a_model_the_class_of_given_clips() -> None:
    _, cond = VideoTask().reference(tiny(), "moving-digits", PREDICT, [0, 1], **ONE)
    clips = spread(moving_digits.load(SIDE, FRAMES, split="test", **ONE), 2)
    assert cond.label is not None and torch.equal(cond.label, clips.class_labels(torch.arange(2)))
    without = VDT(VDTConfig(1, FRAMES, SIDE, patch=4, width=16, depth=1, heads=1, convention=Convention()))
    assert VideoTask().reference(without, "moving-digits", PREDICT, [0, 1], **ONE)[1].label is None
