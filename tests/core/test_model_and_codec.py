"""A codec beside its model: no part of it, saved with it, and never exchanged for another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from codecs_support import LATENT, equal, latent_model, one_line, small
from ditkit.codecs import ImageVae
from ditkit.core.checkpoint import read_state
from ditkit.core.codec import IDENTITY, Identity
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.core.model import Model
from ditkit.models.dit import DiT


def test_a_codec_is_no_part_of_its_model():
    plain, model = DiT(LATENT), latent_model()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))
    assert isinstance(plain.codec, Identity) and isinstance(model.codec, ImageVae)
    model.train()
    assert not model.codec.training and not any(p.requires_grad for p in model.codec.parameters())


def test_a_codec_of_other_latents_is_refused():
    model = DiT(replace(LATENT, channels=3))
    with pytest.raises(ShapeError) as caught:
        model.codec = small()
    assert "latents of shape [3, 4, 4] should be [4, H, W]" in one_line(caught)
    assert model.codec is IDENTITY


def test_a_model_and_its_codec_travel_in_one_folder(tmp_path):
    model = latent_model()
    model.save(tmp_path / "a", dtype=torch.bfloat16)
    files = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == ["codec/codec.safetensors", "codec/config.json", "config.json", "model.safetensors"]
    loaded = Model.load(tmp_path / "a")
    assert equal(loaded.codec, model.codec), "the codec stays in float32"
    z = torch.randn(2, 4, 4, 4)
    assert torch.equal(loaded.codec.decode(z), model.codec.decode(z))
    loaded.save(tmp_path / "b")
    assert read_state(tmp_path / "b/codec/codec.safetensors").keys() == model.codec.state_dict().keys()
    assert equal(DiT.from_pretrained(tmp_path / "b").codec, model.codec)


def test_a_model_without_a_codec_writes_and_says_none(tmp_path):
    DiT(LATENT).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "codec" not in json.loads((tmp_path / "config.json").read_text())
    assert Model.load(tmp_path).codec is IDENTITY


def test_the_hub_is_asked_for_the_codec_too(tmp_path, monkeypatch):
    folder = latent_model().save(tmp_path)
    asked = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(folder)

    monkeypatch.setattr("ditkit.core.model.snapshot_download", download)
    assert isinstance(Model.from_pretrained("owner/name").codec, ImageVae)
    assert {"codec/config.json", "codec/codec.safetensors"} < set(asked["allow_patterns"])


def other_weights(folder: Path) -> None:
    state = load_file(folder / "codec/codec.safetensors")
    state["shift"] += 1
    save_file(state, folder / "codec/codec.safetensors")


def another_codec(folder: Path) -> None:
    small().save(folder / "codec")


def no_codec(folder: Path) -> None:
    (folder / "codec/config.json").unlink()


def other_config(folder: Path) -> None:
    path = folder / "codec/config.json"
    described = json.loads(path.read_text())
    described["config"]["size"] = 32
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            other_weights,
            "codec/codec.safetensors are other weights than {0}/codec/config.json was saved with",
        ),
        (another_codec, "{0}/codec is another codec than {0}/config.json was saved with"),
        (other_config, "{0}/codec is another codec than {0}/config.json was saved with"),
        (no_codec, "cannot read {0}/codec/config.json: No such file"),
    ],
)
def test_a_codec_that_was_not_saved_with_its_model_is_refused(tmp_path, change, expected):
    folder = latent_model().save(tmp_path / "m")
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        Model.load(folder)
    assert expected.format(folder) in one_line(caught)


@pytest.mark.parametrize("stops", range(4))
def test_a_kill_between_two_files_leaves_the_old_the_new_or_a_refusal(tmp_path, monkeypatch, stops):
    """Never a model with the codec of another save."""
    old, new = latent_model(), latent_model()
    folder = old.save(tmp_path / "m")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "replace", killed_at(stops, Path.replace))
        new.save(folder)
    if stops == 0:
        assert equal(Model.load(folder).codec, old.codec)
    else:
        with pytest.raises(CheckpointError, match="was saved with"):
            Model.load(folder)
    assert equal(Model.load(new.save(folder)).codec, new.codec)


def killed_at(stop: int, rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """Stands in for `Path.replace`; drafts of drafts are not counted."""
    done = 0

    def renamed(self: Path, target: Path) -> Path:
        nonlocal done
        if not target.name.startswith("."):
            if done == stop:
                raise KeyboardInterrupt
            done += 1
        return rename(self, target)

    return renamed


def test_a_failed_write_keeps_the_earlier_model_and_codec(tmp_path):
    old = latent_model()
    folder = old.save(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        latent_model().save(folder)
    (folder / "model.safetensors").rmdir()
    (tmp_path / "weights").rename(folder / "model.safetensors")
    assert equal(Model.load(folder).codec, old.codec)
    assert sorted(p.name for p in (folder / "codec").iterdir()) == ["codec.safetensors", "config.json"]
