"""Checkpoints as training scripts write them, and paths that the system refuses (found.md, cases 14, 27 and 30)."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkit
from ditkit.core.checkpoint import fill, read_json, read_state
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.files import kind_of

WEIGHTS = {"embed.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}


class Settings:
    """An object of a script's own."""

    def __init__(self) -> None:
        self.rate = 1e-4


def prefixed(prefix: str, state: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
CHECKPOINTS: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "DiT's": (
        {
            "model": WEIGHTS,
            "ema": AVERAGE,
            "opt": OPTIMIZER,
            "args": argparse.Namespace(lr=1e-4, out=Path("a")),
        },
        AVERAGE,
        "'ema'",
    ),
    "average": ({"ema": AVERAGE}, AVERAGE, "'ema'"),
    "lightning": ({"state_dict": WEIGHTS, "epoch": 3, "hyper": Settings()}, WEIGHTS, "'state_dict'"),
    "nested": ({"ema": {"state_dict": AVERAGE, "decay": 0.99}}, AVERAGE, "'ema' 'state_dict'"),
    "distributed": (prefixed("module."), WEIGHTS, ""),
    "compiled": (prefixed("_orig_mod."), WEIGHTS, ""),
    "both": ({"model": prefixed("module._orig_mod.")}, WEIGHTS, "'model'"),
    "plain": (WEIGHTS, WEIGHTS, ""),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_found_14_known_wrappings_are_taken_off(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved, expected, named = CHECKPOINTS[case]
    torch.save(saved, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        found = read_state(tmp_path / "a.pt")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    assert (f"the weights under {named} are read" in caplog.text) == bool(named)
    net = nn.ModuleDict({"embed": nn.Linear(3, 2, bias=False), "head": nn.Module()})
    net["head"].register_parameter("bias", nn.Parameter(torch.zeros(2)))
    fill(net, found, "a.pt")


@pytest.mark.parametrize("saved", [{"opt": OPTIMIZER}, {"model": {"embed": Settings()}}, [1, 2]])
def test_found_14_what_holds_no_weights_is_refused_in_a_line(saved: Any, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "a.pt")
    assert "\n" not in str(caught.value) and "\033" not in str(caught.value)
    assert "Weights only load failed" not in str(caught.value)


class Code:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_found_14_no_code_of_a_wrapped_checkpoint_runs(tmp_path: Path) -> None:
    """Nor is one read that would run some; an unknown function's place stays empty."""
    torch.save({"ema": AVERAGE, "args": Code(str(tmp_path / "ran"))}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds code"):
        read_state(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


LONG = "x" * 300


@pytest.mark.parametrize("name", [LONG, "a\0b"])
def test_found_27_a_name_that_the_system_refuses_is_a_line(name: str, tmp_path: Path) -> None:
    for look in (ditkit.load, lambda path: ditkit.data.load(path, 8)):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            look(str(tmp_path / name))
        assert "cannot look at" in str(caught.value) and "\n" not in str(caught.value)


def test_found_27_a_folder_that_one_may_not_enter_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs as root may enter all, so the system's refusal is a stand-in's."""
    stat = os.stat

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if "locked" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr("os.stat", refuse)
    with pytest.raises(ConfigError, match=r"cannot look at locked/a\.csv: Permission denied"):
        kind_of("locked/a.csv")
    for look in (ditkit.load, lambda path: ditkit.data.load(path, 8)):
        with pytest.raises(ConfigError, match=r"cannot look at locked/a\.csv: Permission denied"):
            look("locked/a.csv")


def test_found_30_a_pipe_is_no_config_and_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not a regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not a regular file"):
        ditkit.load(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="no weights at"):
        read_state(tmp_path / "model.safetensors")
