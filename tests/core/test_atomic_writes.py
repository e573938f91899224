"""Writes that fail half-way leave the earlier files as they were, and nothing else."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditkit.core.checkpoint import read_state, replacing, write_json, write_state
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.model import Model
from ditkit.models.dit import DiT, DiTConfig

SMALL = DiTConfig(size=4, patch=2, channels=1, width=8, depth=1, heads=2, classes=2)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that loads."""
    return DiT(SMALL).save(tmp_path / "model")


def alone(path: Path) -> bool:
    """Nothing but `path` is in its folder."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, ConfigError])
def test_an_error_inside_leaves_the_earlier_file_and_no_draft(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("earlier")
    with pytest.raises(ConfigError if error is OSError else error), replacing(path) as draft:
        draft.write_text("half")
        raise error("no")
    assert path.read_text() == "earlier" and alone(path)


def test_a_finished_file_takes_its_place_readable_to_all(tmp_path):
    path = tmp_path / "deep" / "er" / "a"
    with replacing(path) as draft:
        draft.write_text("whole")
        assert not path.exists() and draft.parent == path.parent
    assert path.read_text() == "whole" and alone(path)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("place", ["file/a", "folder"])
def test_a_place_that_cannot_be_written_is_quoted(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path / place}: "):
        write_json(tmp_path / place, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_in_place_of_the_weights_keeps_the_earlier_config(folder):
    before = (folder / CONFIG).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(ConfigError, match=f"cannot write {folder / WEIGHTS}: it is a folder"):
        DiT(replace(SMALL, classes=3)).save(folder)
    assert (folder / CONFIG).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_weights_are_not_saved_as_integers(tmp_path):
    with pytest.raises(ConfigError, match=r"not torch\.int8"):
        DiT(SMALL).save(tmp_path / "model", dtype=torch.int8)
    assert not (tmp_path / "model").exists()


def test_the_hubs_card_is_written_only_if_asked_for_and_no_other_config_is_taken(tmp_path):
    model = DiT(SMALL)
    with pytest.raises(ConfigError, match="a DiT saves its own config"):
        model.save_pretrained(tmp_path, config={"width": 1})  # type: ignore[arg-type]
    model.save_pretrained(tmp_path, model_card_kwargs={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, model_card_kwargs={})
    assert (tmp_path / "README.md").read_text() == "mine"


def in_child(act: Callable[[], object]) -> tuple[int, str]:
    """Exit status of a forked process that does `act`, and the `DitkitError` that it met."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        except DitkitError as error:
            os.write(write, f"{type(error).__name__} {error}".encode())
            status = 2
        finally:
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as message:
        return os.waitstatus_to_exitcode(status), message.read()


def larger() -> DiT:
    """A model whose weights take about 2 MB."""
    return DiT(replace(SMALL, width=128, depth=2))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_disk_that_fills_half_way_keeps_the_earlier_model(folder):
    before = contents(folder)

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        larger().save(folder)

    status, message = in_child(save)
    assert status == 2 and message.startswith(f"ConfigError cannot write {folder / WEIGHTS}: ")
    assert message.endswith("nothing was changed there") and "\n" not in message
    assert contents(folder) == before


def test_a_kill_half_way_keeps_the_earlier_model(folder, monkeypatch):
    before = contents(folder)

    def half(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
        path.write_bytes(bytes(50_000))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("ditkit.core.model.dump_state", half)
    status, _ = in_child(lambda: larger().save(folder))
    assert status == -signal.SIGKILL
    after = contents(folder)
    assert len(after) == len(before) + 1 and after.items() >= before.items()
    assert Model.load(folder).config == SMALL


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to drop root's right to write anywhere")
def test_a_read_only_folder_is_refused_and_unchanged(folder):
    before = contents(folder)
    for parent in (folder, *folder.parents):
        if parent.owner() == "root" and parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o711)
    folder.chmod(0o555)

    def save() -> None:
        os.seteuid(NOBODY)
        larger().save(folder)

    assert in_child(save) == (2, f"ConfigError cannot write {folder / WEIGHTS}: Permission denied")
    assert contents(folder) == before


def test_any_user_is_told_of_a_folder_without_permission(folder, monkeypatch):
    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    before = contents(folder)
    monkeypatch.setattr("ditkit.core.checkpoint.tempfile.mkstemp", denied)
    with pytest.raises(ConfigError, match=f"cannot write {folder / WEIGHTS}: Permission denied"):
        DiT(SMALL).save(folder)
    assert contents(folder) == before


def test_written_tensors_are_read_back_with_any_strides(tmp_path):
    state = {"a": torch.randn(3, 4).T, "b": torch.randn(4).expand(2, 4), "c": torch.tensor(3)}
    write_state(tmp_path / "w.safetensors", state, {"step": "3"})
    read = read_state(tmp_path / "w.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], state[k]) for k in state)
