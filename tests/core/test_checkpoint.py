"""Weights and configs that are damaged, foreign or hostile are refused in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkit.core import checkpoint
from ditkit.core.checkpoint import fill, read_json, read_state, write_json
from ditkit.core.errors import CheckpointError, DitkitError
from ditkit.core.model import Model
from ditkit.models.dit import DiT, DiTConfig

SMALL = DiTConfig(size=4, patch=2, channels=1, width=8, depth=1, heads=2, classes=2, class_names=("a", "b"))
WEIGHTS, CONFIG = "model.safetensors", "config.json"
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that loads."""
    return DiT(SMALL).save(tmp_path / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that no test changes."""
    return DiT(SMALL).save(tmp_path_factory.mktemp("whole"))


def refused(folder: Path) -> str:
    """The one line with which `Model.load` refuses a folder."""
    with pytest.raises(CheckpointError) as caught:
        Model.load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def loads_or_is_refused(folder: Path) -> bool:
    try:
        model = Model.load(folder)
    except DitkitError as error:
        assert str(error) and "\n" not in str(error)
        return False
    assert all(p.isfinite().all() for p in model.parameters())
    return True


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def edit_config(folder: Path, **change: Any) -> None:
    described = json.loads((folder / CONFIG).read_text())
    described["config"] |= change
    (folder / CONFIG).write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("head.out.bias"), "missing tensor 'head.out.bias' (1 missing)"),
        (
            lambda s: s.update({"head.out.bais": s.pop("head.out.bias")}),
            "missing tensor 'head.out.bias' (1 missing, 1 unexpected such as 'head.out.bais'; "
            "did you mean 'head.out.bias'?)",
        ),
        (lambda s: s.update(more=torch.zeros(1)), "unexpected tensor 'more' (1 extra)"),
        (
            lambda s: s.update({"head.out.bias": torch.zeros(7)}),
            "tensor 'head.out.bias' has shape [7], expected [8]",
        ),
        (lambda s: s["head.out.bias"].fill_(torch.nan), "tensor 'head.out.bias' holds NaN or infinity"),
        (lambda s: s["head.out.bias"].fill_(-torch.inf), "tensor 'head.out.bias' holds NaN or infinity"),
        (
            lambda s: s.update({"head.out.bias": s["head.out.bias"].double() + 1e300}),
            "tensor 'head.out.bias' holds NaN or infinity",
        ),
        (
            lambda s: s.update({"head.out.bias": torch.zeros(8, dtype=torch.int8)}),
            "tensor 'head.out.bias' holds torch.int8, expected torch.float32",
        ),
        (
            lambda s: s.update({"head.out.bias": torch.zeros(8, dtype=torch.complex64)}),
            "tensor 'head.out.bias' holds torch.complex64, expected torch.float32",
        ),
        (lambda s: s.clear(), "missing tensor 'embed.weight'"),
    ],
)
def test_weights_that_are_not_the_models_are_quoted(folder, change, expected):
    edit_weights(folder, change)
    assert f"{folder / WEIGHTS}: {expected}" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_floating_type_is_read_as_float32(folder, dtype):
    edit_weights(folder, lambda s: s.update({k: v.to(dtype) for k, v in s.items()}))
    assert all(p.dtype == torch.float32 for p in Model.load(folder).parameters())


def test_a_refused_file_leaves_the_module_as_it_was(folder):
    model = DiT(SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: torch.ones_like(v) for k, v in before.items()}
    state["head.out.bias"][0] = torch.nan
    with pytest.raises(CheckpointError):
        fill(model, state, "here")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_filling_a_module_keeps_its_storage():
    model = DiT(SMALL)
    places = [p.data_ptr() for p in model.parameters()]
    fill(model, {k: torch.ones_like(v) for k, v in model.state_dict().items()}, "here")
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(p.eq(1).all() for p in model.parameters())


@many
@given(st.data())
def test_a_truncated_file_is_refused(whole, tmp_path, data):
    complete = (whole / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(complete[:8], "little")
    length = data.draw(
        st.sampled_from([0, 1, 7, 8, 9, header - 1, header, header + 1, len(complete) - 1])
        | st.integers(0, len(complete) - 1)
    )
    (tmp_path / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(complete[:length])
    assert "cannot be read as a complete safetensors file" in refused(tmp_path)


@many
@given(st.data())
def test_a_mutated_file_loads_or_is_refused(whole, tmp_path, data):
    content = bytearray((whole / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(bytes(content) + data.draw(st.binary(max_size=3)))
    loads_or_is_refused(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@many
@given(content=st.binary(max_size=64) | st.just(b"PK\x03\x04") | st.just(pickle.dumps({1: 2}, protocol=2)))
def test_any_bytes_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([torch.zeros(1)], "should hold tensors by name, nothing else"),
        ({1: torch.zeros(1)}, "should hold tensors by name, nothing else"),
        ({"opt": {"w": torch.zeros(1)}}, "'opt' should be a dense tensor"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "'w' should be a dense tensor"),
        ({"w": torch.zeros(2, device="meta")}, "'w' should be a dense tensor"),
    ],
)
def test_a_pt_file_of_something_else_is_refused(tmp_path, value, expected):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=expected):
        read_state(tmp_path / "w.pt")


def test_missing_files_and_folders_are_named(folder, tmp_path):
    assert f"cannot read {tmp_path / 'no' / CONFIG}: No such file" in refused(tmp_path / "no")
    (folder / WEIGHTS).unlink()
    assert f"no weights at {folder / WEIGHTS}" in refused(folder)
    (folder / WEIGHTS).mkdir()
    assert f"no weights at {folder / WEIGHTS}" in refused(folder)


def test_a_model_of_another_class_is_refused(folder):
    class Other(DiT): ...

    with pytest.raises(CheckpointError, match="holds a DiT, expected a Other"):
        Other.load(folder)


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    for name in (str(tmp_path / "no"), "nobody/nothing"):
        with pytest.raises(CheckpointError, match=f"no model folder and no model of the hub at {name}: "):
            DiT.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": "32"}, "size='32' should be an integer of at least 1"),
        ({"width": 8.0}, "width=8.0 should be an integer"),
        ({"width": 3.5}, "width=3.5 should be an integer"),
        ({"depth": True}, "depth=True should be an integer"),
        ({"heads": None}, "heads=None should be an integer"),
        ({"label_dropout": "0.1"}, "label_dropout='0.1' should be a number in [0, 1)"),
        ({"label_dropout": True}, "label_dropout=True should be a number"),
        ({"label_dropout": 2}, "label_dropout=2 should lie in [0, 1)"),
        ({"class_names": "ab"}, "class_names='ab' should be a tuple of texts"),
        ({"class_names": ["a", 1]}, "class_names=('a', 1) should be a tuple of texts"),
        ({"class_names": ["a"]}, "1 class names for 2 classes"),
        ({"wdith": 8}, "unknown config key 'wdith'; did you mean 'width'?"),
        ({"convention": "linear"}, "convention: Convention should be an object, not 'linear'"),
        ({"convention": {"pth": "vp"}}, "convention: unknown config key 'pth'; did you mean 'path'?"),
        ({"convention": {"path": "liner"}}, "unknown path 'liner'; did you mean 'linear'?"),
        ({"convention": {"path": ["vp"]}}, "path=['vp'] should be one of linear, cosine"),
        ({"convention": {"time": "nois"}}, "unknown time 'nois'; did you mean 'noise'?"),
        ({"convention": {"prediction": 1}}, "prediction=1 should be one of velocity"),
        ({"convention": {"path": "ddpm"}}, "ddpm goes with index"),
        ({"width": 31}, "width=31 does not divide into heads=2"),
        ({"depth": 2}, "missing tensor 'blocks.1."),
        ({"patch": 1}, "tensor 'embed.weight' has shape [8, 4], expected [8, 1]"),
        ({"classes": 10**9, "class_names": []}, "has shape [3, 8], expected [1000000001, 8]"),
        ({"width": 10**8}, "expected [100000000, 4]"),
        ({"width": 2 * 10**9}, "the config's sizes make no tensor"),
        ({"width": 10**12}, "width=1000000000000 should be at most 2147483647"),
        ({"width": 4 * 10**30}, "should be at most 2147483647"),
        ({"depth": 10**9}, "depth=1000000000 should be at most 1000"),
        ({"depth": -1}, "depth=-1 should be at least 1"),
    ],
)
def test_a_config_that_is_not_the_models_is_quoted(folder, change, expected):
    edit_config(folder, **change)
    assert expected in refused(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "should hold a JSON object, not a list"),
        ("null", "should hold a JSON object, not a NoneType"),
        ("{}", "no 'model' that names an architecture"),
        ('{"model": 1}', "no 'model' that names an architecture"),
        ('{"modle": "DiT"}', "unknown key 'modle'; did you mean 'model'?"),
        ('{"model": "DiTs"}', "unknown model 'DiTs'; did you mean 'dit'?"),
        ('{"model": "DiT"}', "DiTConfig should be an object, not None"),
        ('{"model": "DiT", "config": []}', "DiTConfig should be an object, not []"),
        ('{"model": "DiT", "config": {}, "history": 3}', "'history' should be a list"),
        ("[" * 100_000, "is not JSON"),
        ('{"model": "DiT", "config": ' + '{"a":' * 100_000, "is not JSON"),
        ('{"model": "DiT", "config": {"size": ' + "9" * 5000 + "}}", "is not JSON"),
        ('{"model": "DiT", "config": {"size": ' + "8" * 4000 + "}}", "should be at most 2147483647"),
        ('{"model": "DiT", "config": {"label_dropout": NaN}}', "label_dropout=nan should lie in"),
        ('{"model": "DiT", "config": {"class_names": ' + "[" * 500 + "]" * 500 + "}}", "a tuple of texts"),
    ],
    ids=lambda text: text[:40],
)
def test_a_config_file_that_is_no_config_is_refused(folder, text, expected):
    (folder / CONFIG).write_text(text)
    assert expected in refused(folder)


def test_weights_beside_a_config_that_they_were_not_saved_with_are_refused(folder, monkeypatch):
    Model.load(folder)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "replace", killed_after_the_config(Path.replace))
        DiT(replace(SMALL, label_dropout=0.5)).save(folder)
    assert json.loads((folder / CONFIG).read_text())["config"]["label_dropout"] == 0.5
    assert f"{folder / WEIGHTS} was saved with another config than {folder / CONFIG}" in refused(folder)
    DiT(SMALL).save(folder, history=["again"])
    assert Model.load(folder).history == ("again",)


def test_the_last_training_is_that_which_names_its_data():
    model, first, last = DiT(SMALL), {"trained": "fashion", "steps": 3}, {"trained": "emoji"}
    assert model.last_training is None
    model.history = (first, last, {"average": 0.1}, {"trained": None}, "pruned")
    assert model.last_training == last
    model.history = ("pruned",)
    assert model.last_training is None


def killed_after_the_config(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def renamed(self: Path, target: Path) -> Path:
        if target.name == WEIGHTS:
            raise KeyboardInterrupt
        return rename(self, target)

    return renamed


def test_weights_that_name_no_config_are_taken_as_they_are(folder):
    edit_weights(folder, lambda s: None)  # written without metadata
    edit_config(folder, label_dropout=0.5)
    assert Model.load(folder).config.label_dropout == 0.5


def test_spaces_and_the_order_of_keys_change_no_config(folder):
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(reversed(described.items()))))
    Model.load(folder)


def test_both_files_are_on_disk_before_either_takes_its_place(folder, monkeypatch):
    done = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: done.append("sync"))
    rename = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: done.append(target.name) or rename(self, target)
    )
    DiT(SMALL).save(folder)
    assert done[:3] == ["sync", "sync", CONFIG] and done[-1] == WEIGHTS


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe{}")
    assert "is not JSON" in refused(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(-1, 20) | st.integers() | st.sampled_from([2**31, 2**63 - 1, 2**63, 10**30])


@many
@given(data=st.data())
def test_any_change_of_the_config_loads_or_is_refused(whole, tmp_path, data):
    described = json.loads((whole / CONFIG).read_text())
    target = data.draw(st.sampled_from([described, described["config"], described["config"]["convention"]]))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(target)) | st.text(max_size=8))
        if data.draw(st.integers(0, 4)) == 0:
            target.pop(key, None)
        else:
            target[key] = data.draw(sizes | json_values)
    (tmp_path / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(described))
    loads_or_is_refused(tmp_path)


@many
@given(value=json_values)
def test_json_is_read_as_it_was_written(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, {"value": value})
    assert repr(read_json(path)) == repr({"value": value})


@many
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    try:
        assert isinstance(read_json(tmp_path / "a.json"), dict)
    except CheckpointError as error:
        assert "\n" not in str(error)
