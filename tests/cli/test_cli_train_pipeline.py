"""`ditkit train FOLDER` of a pipeline, and the flags of groups and inherited weights that all trainings share."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import ditkit
from cli_support import complaint, exit_code, output
from ditkit.cli.train_flags import groups_of, inherit_of
from ditkit.core.errors import ConfigError
from ditkit.core.inherit import Inherit
from ditkit.train.settings import Group
from latents_support import file_of, folder_of, pipe_of

SHORT = ["--steps", "1", "--batch", "2", "--save-every", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("pipeline")
    return folder_of("flux", where), file_of("flux", where)


def test_a_dry_run_says_all_and_writes_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, file = place
    lines = output(
        capsys,
        "train",
        folder,
        "--data",
        file,
        "--transform",
        "lora:rank=2",
        "--group",
        "lora:rate=2",
        "--dry-run",
    )
    for part in (
        "FluxTransformer2DModel",
        "6 latents [4, 8, 8], prompt_embeds [5, 32]",
        "path linear, prediction velocity",
        "LogitNormal",
        "settings.trained",
        "lora",
        "a folder that ditkit.load opens",
        "Group(part='lora', rate=2.0",
    ):
        assert part in lines, part
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_how_its_result_is_opened(place, tmp_path, capsys):
    folder, file = place
    words = ["train", folder, "--data", file, *SHORT, "--out"]
    assert exit_code(*words, tmp_path / "tuned") == 0
    assert f"FluxTransformer2DModel.from_pretrained('{tmp_path}/tuned/model')" in capsys.readouterr().out
    assert exit_code(*words, tmp_path / "lora", "--transform", "lora:rank=2") == 0
    printed = capsys.readouterr().out
    assert f"ditkit.load('{tmp_path}/lora/model').transformer" in printed
    merge = printed.partition("ditkit compress ")[2].split()
    assert exit_code("compress", *merge) == 0
    plain = type(pipe_of("flux").transformer).from_pretrained(tmp_path / "lora" / "merged")
    assert plain.config.num_layers == 2
    kept = ["--transform", "kept:blocks=0+2,stack=single", "--term", "regression:weight=0.5"]
    assert exit_code(*words, tmp_path / "cut", *kept) == 0
    record = json.loads((tmp_path / "cut" / "recipe.json").read_text())
    assert record["objective"]["terms"] == [{"is": "Regression", "weight": 0.5}]
    # and the result is trained further
    assert (
        exit_code("train", tmp_path / "cut" / "model", "--data", file, *SHORT, "--out", tmp_path / "more")
        == 0
    )
    assert len(ditkit.load(tmp_path / "more" / "model").transforms) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--times", "beta"], "--times beta, expected one of uniform, logit-normal"),
        (["--shift", "-1"], "shift"),
        (["--group", "lora:rate=2"], "unknown part 'lora'"),
        (["--group", "all"], "expected a part and its rate or decay"),
        (["--term", "regresion"], "unknown term 'regresion'; did you mean 'regression'"),
        (["--transform", "kept:blocks=0+9"], "name block 9, expected numbers of the 2"),
        (["--policy", "neighbourhood:radius=-1"], "radius"),
        (["--dropout", "1.5"], "label_dropout=1.5"),
        (["--trained", "loraa"], "unknown part 'loraa'"),
        (["--stepz", "3"], "unknown flag '--stepz'; did you mean '--steps'"),
    ],
)
def test_what_is_wrong_is_one_line(place, tmp_path, capsys, words, line):
    folder, file = place
    words = [*([] if "--stepz" in words else SHORT), *words]
    assert line in complaint(capsys, "train", folder, "--data", file, *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_folder_is_refused(place, tmp_path, capsys):
    _, file = place
    assert "unknown recipe 'emojy'; did you mean 'emoji'" in complaint(capsys, "train", "emojy")
    assert "holds neither a pipeline" in complaint(capsys, "train", tmp_path / "none", "--data", file)
    assert "data" in complaint(capsys, "train", place[0])
    assert "no file" in complaint(capsys, "train", place[0], "--data", tmp_path / "none.safetensors")


def test_groups_are_read():
    default = (Group("norms", 2.0),)
    assert groups_of((), default) == default
    words = ("lora:rate=10", "norms:rate=2,decay=none", "parts:decay=0.1")
    assert groups_of(words, default) == (Group("lora", 10.0), Group("norms", 2.0), Group("parts", 1.0, 0.1))
    for word, message in (
        ("lora", "expected a part and its rate or decay"),
        (":rate=2", "expected a part"),
        ("lora:speed=2", "unknown field of a group 'speed'"),
        ("lora:rate=2,rate=3", "rate is given twice"),
        ("lora:rate=fast", "expected a number"),
        ("lora:rate=0", "should be positive and finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            groups_of((word,), ())


def test_rules_of_inheritance_are_read():
    assert inherit_of(()) is None and inherit_of(("same",)) == Inherit()
    words = ("skip=head.*", "blocks.1.*=blocks.3.*", "skip=tokens.*")
    assert inherit_of(words) == Inherit(("head.*", "tokens.*"), (("blocks.1.*", "blocks.3.*"),))
    for word, message in (
        ("head.*", "expected same, skip=PATTERN .* or OWN=OTHER"),
        ("skip=", "expected same"),
        ("blocks.*.a=blocks.b", "expected as many stars in both"),
    ):
        with pytest.raises(ConfigError, match=message):
            inherit_of((word,))


def test_a_recipe_takes_groups_and_inherited_weights(tmp_path, capsys, monkeypatch):
    from cli_support import save_photos

    photos = save_photos(tmp_path / "photos")
    sizes = ["--size", "16", "--width", "32", "--heads", "2", "--patch", "4"]
    run = [
        "train",
        "emoji",
        "--data",
        photos,
        *SHORT,
        "--warmup",
        "0",
        "--sheet-every",
        "0",
        "--snapshot-every",
        "0",
    ]
    run += ["--precision", "float32"]
    assert exit_code(*run, *sizes, "--depth", "4", "--out", tmp_path / "deep") == 0, capsys.readouterr().err
    deep = tmp_path / "deep" / "model"
    again = [*run, *sizes, "--depth", "2", "--init", deep, "--out", tmp_path / "flat"]
    capsys.readouterr()
    assert "or --inherit for the weights of another one" in complaint(capsys, *again)
    rules = ["--inherit", "blocks.1.*=blocks.3.*", "--group", "attention:rate=2", "--learning-rate", "1e-12"]
    assert exit_code(*again, *rules) == 0, capsys.readouterr().err
    one, two = (load_file(folder / "model.safetensors") for folder in (deep, tmp_path / "flat" / "model"))
    assert torch.allclose(two["blocks.1.attn.qkv.weight"], one["blocks.3.attn.qkv.weight"], atol=1e-8)
    assert torch.allclose(two["blocks.0.attn.qkv.weight"], one["blocks.0.attn.qkv.weight"], atol=1e-8)
    capsys.readouterr()
    for flags, line in (
        (["--inherit", "skip=nothing.*"], "no tensor of the model matches 'nothing.*'"),
        (["--inherit", "blocks.1.*=blocks.7.*"], "has no tensor 'blocks.7."),
        (["--inherit", "same", "--width", "64"], "expected [64"),
        (["--inherit", "same", "--group", "lora:rate=2"], "unknown part 'lora'"),
    ):
        other = [*again[:-1], tmp_path / "no", *flags]
        assert line in complaint(capsys, *other), flags
    assert "inherit is how weights are taken from init" in complaint(capsys, *run, "--inherit", "same")
    assert not (tmp_path / "no").exists()
    with pytest.raises(SystemExit):
        from ditkit.cli.main import ditkit_commands

        ditkit_commands().resolve(["train", "emoji", "--help"])()
    help_text = capsys.readouterr().out
    assert "--inherit" in help_text and "--group" in help_text
