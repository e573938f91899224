"""Backbones that are no plain transformers, from `ditkit train` to `ditkit generate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_support import Capture, exit_code, save_photos

NETWORKS = {
    "fashion-dico": ["--width", "8", "--depth", *"11111"],
    "fashion-lamamba": ["--width", "8", "--depth", *"1111", "--no-deeper"],
    "fashion-ptdit": ["--width", "16", "--depth", "1", "--heads", "2"],
    "fashion-dimr": ["--width", "16", "8", "--depth", "1", "1", "--patch", "2", "1", "--heads", "2"],
}
RUN = [
    "--size",
    "8",
    "--steps",
    "2",
    "--batch",
    "4",
    "--warmup",
    "0",
    "--precision",
    "float32",
    "--sheet-every",
    "0",
]


@pytest.mark.parametrize("recipe", NETWORKS)
def test_a_run_is_drawn_from_under_a_cache_and_under_no_pattern(
    recipe: str, tmp_path: Path, capsys: Capture
) -> None:
    photos, run = save_photos(tmp_path / "photos"), tmp_path / "run"
    assert exit_code("train", recipe, "--data", photos, "--out", run, *NETWORKS[recipe], *RUN) == 0
    capsys.readouterr()
    sampling = ["--label", "cat", "--seeds", "0", "--steps", "4", "--solver", "ddim"]
    cached = ["--policy", "taylorseer:interval=2,order=1", "--out", tmp_path / "drawn"]
    assert exit_code("generate", run / "model", *sampling, *cached) == 0
    assert list((tmp_path / "drawn").glob("*.png"))
    capsys.readouterr()
    patterned = ["--policy", "band:keep=0.2,block=8,kernel=cpu", "--out", tmp_path / "refused"]
    assert exit_code("generate", run / "model", *sampling, *patterned) == 2
    assert "Band: " in capsys.readouterr().err
