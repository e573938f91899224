"""A task is a folder in `ditkit.tasks`: once it is there, every verb and command finds it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ditkit
import ditkit.tasks
from cli_support import Capture, complaint, output
from ditkit.core.errors import ConfigError
from ditkit.core.task import Task, task_of, tasks
from ditkit.sample import Sampling
from models_support import tiny_model

TASK = '''
"""Sounds as mel spectrograms: a toy."""
import torch
from dataclasses import dataclass
from ditkit.core.task import Evaluation, Task
from ditkit.metrics.error import errors
from ditkit.report.sheet import as_pictures

@dataclass(frozen=True)
class Loudness(Evaluation):
    mean: float

    def as_dict(self):
        return {"loudness": self.mean}

    def table(self):
        return None

    def save(self, folder):
        (folder / "loudness.txt").write_text(str(self.mean))
        return [["loudness.txt"]]

class SoundTask(Task):
    name, noun, data, axes = "sound", "sound", "sounds", ("C", "F", "T")
    settings = ("count", "hush")
    recipe = None

    def error(self, x, ref, generated=None):
        return errors(x, ref, generated) | {"ssim": 0.25}

    def draw(self, samples):
        return as_pictures(samples.flip(2))

    def write(self, folder, samples, names, columns):
        for name, sample in zip(names, samples):
            (folder / f"{name}.wav").write_bytes(sample.numpy().tobytes())
        return [f"{name}.wav" for name in names]

    def evaluate(self, model, data, *, sampling, progress, options, count=2, hush=1.0):
        from ditkit.api.generate import generate
        drawn = generate(model, sampling=sampling, seeds=range(count))
        return Loudness(hush * float(drawn.samples.abs().mean()))
'''


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A trained model of the toy task, of two files: the task, and the package that imports it."""
    folder = tmp_path / "tasks" / "sound"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from ditkit.tasks.sound.task import SoundTask\n")
    (folder / "task.py").write_text(TASK)
    monkeypatch.setattr(ditkit.tasks, "__path__", [*ditkit.tasks.__path__, str(folder.parent)])
    model = tiny_model()
    model.task = "sound"
    yield model.save(tmp_path / "model")
    known = tasks()["sound"]
    known.__class__.homes = ("nowhere",)  # classes outlive their module
    for name in [name for name in sys.modules if name.startswith("ditkit.tasks.sound")]:
        del sys.modules[name]
    known.__class__.__module__ = "gone"


def test_a_saved_model_names_its_task(sound: Path) -> None:
    assert json.loads((sound / "config.json").read_text())["task"] == "sound"
    model = ditkit.load(sound)
    assert model.task == "sound" and task_of(model).noun == "sound"
    assert model.with_weights(model.state_dict(), "itself").task == "sound"


def test_a_folder_that_names_none_has_the_task_of_its_class(tmp_path: Path) -> None:
    folder = tiny_model().save(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    assert described.pop("task") == "image"
    (folder / "config.json").write_text(json.dumps(described))
    state = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(state), state)  # as weights that do not say with which config they were saved
    assert ditkit.load(folder).task == "image"


def test_generate_writes_its_samples(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    text = output(capsys, "generate", sound, "--seeds", "3", "5", "--steps", "2", "--out", out)
    assert "2 sounds in " in text
    written = json.loads((out / "generated.json").read_text())
    assert [entry["file"] for entry in written["sounds"]] == ["animal-bird-3.wav", "flag-other-5.wav"]
    drawn = ditkit.generate(ditkit.load(sound), seeds=[3, 5], steps=2)
    assert (out / "flag-other-5.wav").read_bytes() == drawn.samples[1].numpy().tobytes()


def test_compare_measures_and_shows_them(sound: Path, tmp_path: Path) -> None:
    report = ditkit.compare(
        ditkit.load(sound), policies="taylorseer:interval=2", steps=4, rounds=1, memory=False, control=False
    )
    assert report.rows[1].ssim == 0.25 and report.settings["model"]["task"] == "sound"
    assert "sounds" in report.headline
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Sounds</h2>" in page and "plainly another sound" in page
    drawn = ditkit.generate(ditkit.load(sound), steps=4).samples
    assert torch.equal(report.pictures["exact"], task_of(ditkit.load(sound)).draw(drawn))


def test_evaluate_asks_it_and_refuses_words_that_it_does_not_have(
    sound: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = ditkit.load(sound)
    found = ditkit.evaluate(model, "nothing", steps=2, count=1, hush=0.5)
    drawn = ditkit.generate(model, sampling=Sampling(steps=2)).samples
    assert found.as_dict() == {"loudness": 0.5 * float(drawn.abs().mean())}
    with pytest.raises(ConfigError, match="unknown setting of evaluating sounds 'hsuh'; did you mean 'hush'"):
        ditkit.evaluate(model, "nothing", hsuh=1)
    line = complaint(capsys, "evaluate", sound, "--data", "emoji", "--real-count", "5", "--out", tmp_path)
    assert "'real_count'" in line
    text = output(
        capsys, "evaluate", sound, "--data", "emoji", "--count", "1", "--steps", "2", "--out", tmp_path
    )
    assert "evaluation.json, loudness.txt" in text


def test_it_is_gone_with_its_folder() -> None:
    assert "sound" not in tasks()


@pytest.mark.parametrize("task", tasks().values(), ids=lambda task: task.name)
def test_every_task_is_that_of_its_recipes(task: Task) -> None:
    assert task.recipe.task == task.name  # type: ignore[attr-defined]
    assert task.noun and task.axes[0] == "C" and task.data


def test_a_model_of_no_task_is_named() -> None:
    model = tiny_model()
    model.task = ""
    with pytest.raises(ConfigError, match="a DiT names no task, expected one of forecast, image"):
        task_of(model)
    model.task = "imgae"
    with pytest.raises(ConfigError, match="unknown task 'imgae'; did you mean 'image'"):
        task_of(model)
