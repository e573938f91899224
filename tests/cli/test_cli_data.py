"""Data of one's own on the command line: every recipe takes them, and `--option` speaks to their loader."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from cli_support import Capture, complaint, exit_code, output, save_photos
from ditkit.cli.train import found
from ditkit.core.convention import Convention
from ditkit.core.grid import Grid
from ditkit.core.spec import spec
from ditkit.data.clips import MemoryClips
from ditkit.data.sets import moving_digits, vizdoom
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.tasks.forecast.recipe import ClipForecastRecipe
from ditkit.tasks.video import VideoTask
from ditkit.tasks.video.recipe import VideoRecipe
from models_support import perturbed, save_tiny

FRAMES, SIDE = 4, 16
CLIP_RECIPES = [
    name for name, build in found().items() if isinstance(build(), VideoRecipe | ClipForecastRecipe)
]
EVEN, UNEVEN = [100] * 12, [100] * 6 + [300] * 6
TINY = ["--patch", "1", "--frames", "3", "--sheet-every", "0"]
QUICK = ["--steps", "2", "--warmup", "0", "--batch", "2", "--precision", "float32"]


def write_film(path: Path, durations_ms: Sequence[int]) -> Path:
    """A GIF whose frames, each of another brightness, are shown for so long."""
    path.parent.mkdir(exist_ok=True)
    frames = [Image.new("RGB", (SIDE, SIDE), (10 * i,) * 3) for i in range(len(durations_ms))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=list(durations_ms))
    return path


@pytest.fixture
def films(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    return write_film(tmp_path / "films" / "a.gif", EVEN).parent


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    return write_film(tmp_path / "uneven" / "a.gif", UNEVEN).parent


@pytest.fixture
def gap(tmp_path: Path) -> Path:
    """Hourly loads with two hours missing and one line too late."""
    pytest.importorskip("pandas")
    hours = np.datetime64("2024-01-01T00") + np.arange(60)
    lines = [f"{hour},{np.sin(i):.4f},{i}" for i, hour in enumerate(hours) if i not in (20, 21)]
    lines[5], lines[6] = lines[6], lines[5]
    path = tmp_path / "gap.csv"
    path.write_text("time,load,wind\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares stand for the handwritten digits; they are brighter in the test split."""
    monkeypatch.setattr(
        moving_digits,
        "read_digits",
        lambda split: torch.full((10, 28, 28), 200 if split == "test" else 100, dtype=torch.uint8),
    )


def small(name: str, place: Path) -> list[object]:
    """Flags that make the recipe's clips 4 frames of 16 x 16, or a model of that size to go on from."""
    recipe = found()[name]()
    if recipe.init or any(term.needs_teacher for term in recipe.objective.active):
        config = VideoDiTConfig(
            3, FRAMES, (SIDE, SIDE), (1, 4, 4), width=16, depth=1, heads=2, convention=Convention()
        )
        near = "neighbourhood:radius=1,span=2,block=8,kernel=cpu"
        of_init = [spec(type(policy).small(Grid(FRAMES, 4, 4))) for policy in recipe.policies if recipe.init]
        return ["--init", VideoDiT(config).save(place), "--policy", *(of_init or [near])]
    sides = (SIDE,) if isinstance(recipe, VideoRecipe) else (SIDE, SIDE)
    return ["--frames", FRAMES, "--size", *sides]


# -- every recipe, any data of its kind


@pytest.mark.parametrize("name", CLIP_RECIPES)
def test_a_recipe_of_clips_takes_a_folder_of_films(
    name: str, films: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = output(capsys, "train", name, "--data", films, *small(name, tmp_path / "model"), "--dry-run")
    assert text.splitlines()[0].split(maxsplit=1)[1].startswith(f"{films}, ")
    assert " clips [3, " in text


@pytest.mark.parametrize("name", CLIP_RECIPES)
def test_a_recipe_of_clips_takes_another_named_set(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def episode(
        size: tuple[int, int] | int,
        frames: int = 16,
        split: str = "train",
        scenario: str = "",
        episodes: int = 1,
        frame_skip: int = 1,
    ) -> MemoryClips:
        return MemoryClips(split, (torch.zeros(12, 3, SIDE, SIDE, dtype=torch.uint8),), ("a",), 10.0, frames)

    monkeypatch.setattr(vizdoom, "load", episode)
    words = ["train", name, "--data", "vizdoom", *small(name, tmp_path / "model"), "--dry-run"]
    assert " clips [3, " in output(capsys, *words)


def test_the_recipes_own_options_stay_with_its_own_data(squares: None, capsys: Capture) -> None:
    assert "moving-digits, 100000 clips" in output(capsys, "train", "vdt", "--dry-run")
    words = ["train", "vdt", "--dry-run", "--option", "length=70", "--option", "digits=1"]
    assert "moving-digits, 70 clips" in output(capsys, *words)


# -- `--option` in training and after it


def test_repairs_are_asked_for_in_training_and_in_a_forecast(
    gap: Path, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # each repair is logged, which is tested with the loaders
    train = ["train", "predformer-winds", "--data", gap, *TINY, *QUICK, "--out", tmp_path / "run"]
    assert "line 8" in (line := complaint(capsys, *train)) and "repair='sort'" in line
    assert "repair='interpolate'" in complaint(capsys, *train, "--option", "repair=sort")
    assert not (tmp_path / "run").exists()
    mended = ["--option", "repair=sort,interpolate", "--option", "columns=wind"]
    capsys.readouterr()
    assert exit_code(*train, *mended) == 0
    hint = shlex.join(["ditkit", "forecast", str(tmp_path / "run" / "model"), "--data", str(gap)])
    assert capsys.readouterr().out.endswith(f"go on with: {hint}\n")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["options"] == {
        "repair": ["sort", "interpolate"],
        "columns": ["wind"],
    }
    assert exit_code(*train, *mended, "--resume") == 0
    capsys.readouterr()

    forecast, other, out = (
        ["forecast", tmp_path / "run" / "model", "--data"],
        tmp_path / "b.csv",
        tmp_path / "out",
    )
    shutil.copy(gap, other)
    assert "repair='sort'" in complaint(capsys, *forecast, other, "--out", out)
    assert not out.exists()
    assert (
        exit_code(*forecast, other, *mended[:2], "--out", out) == 0
    )  # of more columns, those that it learned
    assert exit_code(*forecast, other, *mended, "--out", out) == 0
    said = f"{gap} as the model was trained on it: --option repair=sort,interpolate --option columns=wind\n"
    assert said in output(capsys, *forecast, gap, "--out", out)
    noted = json.loads((out / "forecast.json").read_text())
    assert "--option repair=sort,interpolate --option columns=wind" in noted["command"]
    assert exit_code(*shlex.split(noted["command"])[1:], "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "forecast.json").read_text())
    assert again["scores"] == noted["scores"]


def test_models_of_one_forecast_were_trained_on_the_same_data_or_a_word_decides(
    gap: Path, tmp_path: Path, capsys: Capture
) -> None:
    models = []
    for repairs in ("sort,interpolate", "sort,first,interpolate"):
        models.append(tmp_path / repairs[5:] / "model")
        learned = ["--option", f"repair={repairs}", "--option", "columns=wind"]
        train = ["train", "predformer-winds", "--data", gap, *TINY, *QUICK, *learned]
        assert exit_code(*train, "--out", models[-1].parent) == 0
    forecast = ["forecast", *models, "--data", gap, "--out", tmp_path / "out"]
    capsys.readouterr()
    line = complaint(capsys, *forecast)
    assert (
        "options, repair=sort,interpolate columns=wind and repair=sort,first,interpolate columns=wind" in line
    )
    assert not (tmp_path / "out").exists()
    told = output(capsys, *forecast, "--option", "repair=sort,interpolate")
    assert "trained on it: --option columns=wind\n" in told


def test_clips_are_made_of_the_data_as_the_model_was_trained_on_them(
    squares: None, tmp_path: Path, capsys: Capture
) -> None:
    network = [*small("vdt", tmp_path), "--width", "8", "--depth", "1", "--heads", "1"]
    asked = ["--option", "speed=0.5,1", "--option", "length=70"]
    train = ["train", "vdt", *network, *QUICK, "--optimizer", "adamw", "--sheet-every", "0", *asked]
    assert exit_code(*train, "--out", tmp_path / "run") == 0
    model = tmp_path / "run" / "model"
    assert ditkit.load(model).history == (
        {"trained": "moving-digits", "options": {"digits": 1, "speed": [0.5, 1.0]}, "steps": 2, "batch": 2},
    )
    few = ["--count", "1", "--steps", "1"]
    words = ["--data", "moving-digits", "--mask", "predict", *few, "--out", tmp_path]
    capsys.readouterr()
    text = output(capsys, "video", model, *words)
    assert "moving-digits as the model was trained on it: --option digits=1 --option speed=0.5,1.0\n" in text
    noted = json.loads((tmp_path / "video.json").read_text())
    assert noted["settings"]["option"] == ["digits=1", "speed=0.5,1.0"]
    assert "trained on it: --option speed=0.5,1.0\n" in output(
        capsys, "video", model, *words, "--option", "digits=2"
    )
    compare = ["compare", model, "--policy", "taylorseer", "--steps", "6", "--no-memory", "--rounds", "1"]
    compare += ["--data", "moving-digits", "--seeds", "0", "--guidance", "1", "--converged-steps", "9"]
    assert "as the model was trained on it" in output(capsys, *compare, "--out", tmp_path)
    tune = ["tune", model, "--policy", "taylorseer", "--at-most", "0.9", *compare[4:6], *compare[7:]]
    assert "as the model was trained on it" in output(capsys, *tune, "--out", tmp_path)


def test_films_of_a_variable_rate_are_resampled_where_a_rate_is_given(
    uneven: Path, tmp_path: Path, capsys: Capture
) -> None:
    train = ["train", "predformer", "--data", uneven, *small("predformer", tmp_path), "--dry-run"]
    assert "variable frame rate" in (line := complaint(capsys, *train)) and "fps=" in line
    assert " clips [3, 8, 16, 16]" in output(capsys, *train, "--option", "fps=10")

    torch.manual_seed(0)
    config = PredFormerConfig(3, 3, (SIDE, SIDE), patch=4, width=8, heads=1, hidden=8, layout="TS")
    model = PredFormer(config).save(tmp_path / "predformer")
    clips = VDTConfig(3, FRAMES, SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())
    vdt = perturbed(VDT(clips), 0.1).save(tmp_path / "vdt")
    compare = ["compare", vdt, "--policy", "taylorseer:interval=2", "--steps", "6", "--converged-steps", "9"]
    for command in (
        ["forecast", model],
        ["video", vdt, "--mask", "predict", "--steps", "1", "--count", "2"],
        [*compare, "--guidance", "1", "--seeds", "0", "1", "--rounds", "1", "--no-memory"],
    ):
        out = tmp_path / f"out-{command[0]}"
        words = [*command, "--data", uneven, "--out", out]
        assert "variable frame rate" in complaint(capsys, *words) and not out.exists()
        assert exit_code(*words, "--option", "fps=10") == 0, capsys.readouterr().err
        assert list(out.iterdir())
        capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "{vdt}", "--policy", "taylorseer", "{digits}"], "unknown split of moving_digits 'tset'"),
        (["tune", "{vdt}", "--policy", "taylorseer", "--at-most", "0.5", "{digits}"], "'tset'"),
        (["video", "{vdt}", "{digits}"], "'tset'"),
        (["forecast", "{predformer}", "{digits}"], "'tset'"),
        (["evaluate", "{dit}", "--data", "{photos}", "--option", "max_bytes=10"], "max_bytes=10"),
        (
            ["compare", "{dit}", "--policy", "taylorseer", "--data", "{photos}", "--option", "max_bytes=10"],
            "max_bytes",
        ),
        (
            ["evaluate", "{dit}", "--data", "{photos}", "--option", "max_bad=1", "--max-bad", "2"],
            "given twice",
        ),
        (["video", "{vdt}", "--option", "fps=3"], "got fps=3 for the loader of --data, but no --data"),
        (["video", "{vdt}", "--max-bad", "3"], "got max_bad=3"),
        (["compare", "{vdt}", "--policy", "taylorseer", "--option", "fps=3"], "but no --data"),
        (
            ["tune", "{vdt}", "--policy", "taylorseer", "--at-most", "0.5", "--option", "fps=3"],
            "but no --data",
        ),
        (["train", "vdt", "--option", "frames=3"], "--option frames=3: size and frames are the model's"),
        (["forecast", "{predformer}", "--data", "moving-digits", "--option", "size=3"], "size and frames"),
        (["train", "predformer-winds", "--option", "fps"], "option 'fps', expected NAME=VALUE"),
        (["train", "vdt", "--max-bad", "3"], "--max-bad 3 with --data moving-digits, expected a folder"),
    ],
    ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else "",
)
def test_options_reach_the_loader_or_are_refused_in_one_line(
    words: list[str], said: str, squares: None, tmp_path: Path, capsys: Capture
) -> None:
    vdt = VDTConfig(1, FRAMES, SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())
    config = PredFormerConfig(frames=2, size=(SIDE, SIDE), patch=4, width=8, heads=1, hidden=8, layout="F1")
    places = {
        "vdt": VDT(vdt).save(tmp_path / "vdt"),
        "predformer": PredFormer(config).save(tmp_path / "predformer"),
        "dit": save_tiny(tmp_path / "dit"),
        "photos": save_photos(tmp_path / "photos"),
    }
    digits = ["--data", "moving-digits", "--option", "split=tset"]
    command = [w for word in words for w in (digits if word == "{digits}" else [word.format(**places)])]
    assert said in complaint(capsys, *command, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_split_is_given_where_it_is_asked_for(squares: None) -> None:
    config = VDTConfig(1, FRAMES, SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())
    model = VDT(config)
    for options, brightest in (({}, 200), ({"split": "train"}, 100)):
        _, cond = VideoTask().reference(model, "moving-digits", None, [0], **options)
        assert cond.context is not None
        assert ((cond.context.max() + 1) * 127.5).round().item() == brightest


# -- how many clips


def test_without_a_count_there_are_as_many_clips_as_the_data_hold(
    films: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = VDTConfig(3, FRAMES, SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())
    model = perturbed(VDT(config), 0.1).save(tmp_path / "vdt")
    words = ["video", model, "--data", films, "--frames", 8, "--mask", "predict", "--steps", "1"]
    for flags, seeds in (
        ([], [0, 1, 2, 3, 4]),
        (["--seeds", "7", "9"], [7, 9]),
        (["--count", "3"], [0, 1, 2]),
    ):
        out = tmp_path / f"out-{len(seeds)}"
        assert exit_code(*words, *flags, "--out", out) == 0
        settings = json.loads((out / "video.json").read_text())["settings"]
        assert settings["seeds"] == seeds and settings["count"] == len(seeds)
    capsys.readouterr()
    for flags in (["--count", "6"], ["--seeds", "0..5"]):
        assert "5 clips of 8 frames, asked for 6" in complaint(
            capsys, *words, *flags, "--out", tmp_path / "no"
        )


def test_comparing_with_fewer_clips_than_seeds_says_how_many_seeds_there_can_be(
    films: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = VDTConfig(3, 8, SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())
    model = VDT(config).save(tmp_path / "vdt")
    words = ["compare", model, "--policy", "taylorseer", "--data", films, "--out", tmp_path / "no"]
    assert "has 5 clips of 8 frames for 8 seeds, try: --seeds 0..4" in complaint(capsys, *words)
