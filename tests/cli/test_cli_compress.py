"""`ditkit compress`: a folder in, a folder out; what is wrong is one line, and nothing is written."""

from __future__ import annotations

import pytest

import ditkit
from ditkit.cli.main import main
from rig import tiny_dit


@pytest.fixture
def folder(tmp_path):
    return tiny_dit().save(tmp_path / "model")


def test_a_folder_out(folder, tmp_path, capsys):
    assert (
        main(["compress", str(folder), "kept:blocks=0+2", "lora:rank=2", "--out", str(tmp_path / "out")]) == 0
    )
    model = ditkit.load(tmp_path / "out")
    assert [type(t).__name__ for t in model.transforms] == ["Kept", "LoRA"]
    assert [entry["transform"]["name"] for entry in model.history] == ["Kept", "LoRA"]
    assert "numbers" in capsys.readouterr().out
    assert main(["compress", str(folder), "kept:blocks=0", "--out", str(tmp_path / "out")]) == 2
    assert "holds a model already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["kept:blocks=0+9"], "name block 9, expected numbers of the 3"),
        (["keep:blocks=0"], "unknown transform 'keep'; did you mean 'kept'"),
        (["lora:rank=2", "lora:rank=2"], "the model has one already"),
        (["lora:rank=2", "kept:block=0"], "unknown field of Kept 'block'"),
    ],
)
def test_what_is_wrong_is_one_line(folder, tmp_path, capsys, words, line):
    assert main(["compress", str(folder), *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
