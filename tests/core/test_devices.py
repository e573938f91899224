"""Where a model is loaded, by name: on the CPU, on the meta device, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ditkit
from cli_support import Capture, complaint, output
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.devices import WANTED, Placement, placed, read_device
from ditkit.core.errors import ConfigError
from ditkit.train.loop import _on_cpu
from rig import tiny_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dit().save(tmp_path_factory.mktemp("model"))


def test_weights_are_moved_once_and_samples_follow(folder: Path) -> None:
    model = ditkit.load(folder, device="cpu", dtype="bfloat16")
    assert {(w.device.type, w.dtype) for w in model.parameters()} == {("cpu", torch.bfloat16)}
    drawn = ditkit.generate(model, seeds=[0], steps=4, policies=[TaylorSeer(interval=2)]).samples
    exact = ditkit.generate(
        ditkit.load(folder), seeds=[0], steps=4, policies=[TaylorSeer(interval=2)]
    ).samples
    assert 0 < (drawn.double() - exact.double()).norm() < 0.1 * exact.double().norm()


def test_the_meta_device_has_shapes_alone(folder: Path) -> None:
    model = ditkit.load(folder, device="meta")
    with torch.device("meta"):
        x, t, label = torch.zeros(2, *model.sample_shape), torch.ones(2), torch.zeros(2, dtype=torch.long)
    assert model(x, t, Cond(label=label)).is_meta


def test_auto_is_the_best_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda: False)
        assert read_device("auto") == torch.device("cpu"), kind
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert read_device("auto") == torch.device("mps")


@pytest.mark.parametrize(
    ("device", "dtype", "line"),
    [
        ("cuda", None, r"device=cuda: torch .* finds none here; choose from: auto, cpu"),
        ("cup", None, "unknown device 'cup'; did you mean 'cpu'"),
        (None, "bf16", "unknown dtype 'bf16'"),
    ],
)
def test_what_is_not_there_is_refused(
    folder: Path, device: str | None, dtype: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=line):
        ditkit.load(folder, device=device, dtype=dtype)


def test_a_block_places_what_is_loaded_inside_alone(folder: Path) -> None:
    with placed("cpu", "float16"):
        assert next(ditkit.load(folder).parameters()).dtype == torch.float16
        assert next(ditkit.load(folder, dtype="float32").parameters()).dtype == torch.float32
        assert _on_cpu()
    assert WANTED.get() == Placement() and next(ditkit.load(folder).parameters()).dtype == torch.float32


def test_commands_take_the_flags(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "generate", folder, "--seeds", "0", "--steps", "2", "--out", tmp_path / "out"
    output(capsys, *words, "--device", "cpu", "--dtype", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = complaint(capsys, *words[:-1], tmp_path / "none", "--device", "cuda:1")
    assert "device=cuda:1" in line and not (tmp_path / "none").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_what_the_processor_draws(folder: Path) -> None:
    settings = {"seeds": [0, 1], "steps": 6, "policies": [TaylorSeer(interval=2)]}
    there = ditkit.generate(ditkit.load(folder, device="cuda"), **settings).samples
    here = ditkit.generate(ditkit.load(folder), **settings).samples
    assert there.is_cuda and (there.cpu() - here).norm() < 1e-3 * here.norm()
