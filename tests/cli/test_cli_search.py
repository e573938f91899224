"""`ditkit search` writes a table, which `compare`, `tune` and `plan` take by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ditkit.attention import HeadTable
from ditkit.cli.main import main
from ditkit.core.convention import Convention
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from models_support import save_tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VideoDiTConfig(
        frames=4, size=16, patch=2, width=24, depth=2, heads=2, channels=2, convention=Convention()
    )
    network = VideoDiT(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    network.save(folder := tmp_path_factory.mktemp("model"))
    return folder


def said(capsys: Capture, *words: object, code: int = 0) -> str:
    assert main([*map(str, words)]) == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


QUICK = ("--seeds", "0", "--steps", "2", "--guidance", "1")


def test_from_search_to_compare_tune_and_plan(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "heads.json"
    text = said(
        capsys, "search", model, *QUICK, "--block", 8, "--epsilon", 0.9, "--cost", "sparsity", "--out", out
    )
    table = HeadTable.load(out)
    assert f"layer   1  {table.heads[1]}" in text and f"searched:table={out}" in text
    assert set("".join(table.heads)) != {"0"}, "the test needs a table that leaves out something"
    by_name = f"searched:table={out},kernel=cpu"
    compared = [*QUICK, "--converged-steps", "3", "--rounds", "1"]
    without_memory = (
        "--no-memory",
        "--out",
        tmp_path / "compare",
    )  # another test measures it, in processes apart
    said(capsys, "compare", model, *compared, "--policy", by_name, *without_memory)
    rows = json.loads((tmp_path / "compare" / "report.json").read_text())["rows"]
    assert [row["kind"] for row in rows][:2] == ["exact", "policy"] and rows[1]["macs_ratio"] < 1
    draft = "draft:patch=2+4,block=8,kernel=cpu,dense_share=0,sparsity=0.5|0.8"
    given = ("--policy", by_name, "--policy", draft)
    said(capsys, "tune", model, *compared, "--at-least", "3dB", *given, "--out", tmp_path / "tune")
    tuned = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert len(tuned["rows"]) == 4
    shown = said(capsys, "plan", model, "--policy", by_name, "--out", tmp_path / "plan.png")
    assert "of 4 heads" in " ".join(shown.split()) and (tmp_path / "plan.png").exists()


def test_bad_input_is_one_line(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out, other = tmp_path / "heads.json", save_tiny(tmp_path / "other")
    for words, line in (
        ((model, "--out", tmp_path / "heads.txt"), "expected a name that ends in .json"),
        ((other, "--out", out), "makes pictures, expected a model of clips"),
        (
            (model, *QUICK, "--block", 8, "--target", 0.99, "--sparsity", 0.1, 0.1, 0.1, "--weight", 0),
            "target=0.99",
        ),
        ((model, *QUICK, "--sparsity", 0.1, 0.1, 1.0), "sparsity=(0.1, 0.1, 1.0) should lie in [0, 1)"),
    ):
        error = said(capsys, "search", *words, *(() if "--out" in words else ("--out", out)), code=2)
        assert line in error and len(error.splitlines()) == 1 and not out.exists()
    said(capsys, "search", model, *QUICK, "--block", 8, "--out", out)
    error = said(capsys, "plan", "--grid", "4x4x4", "--policy", f"searched:table={out}", code=2)
    assert "searched on 4 x 8 x 8 tokens, got 4 x 4 x 4; search again" in error
    error = said(capsys, "generate", other, "--policy", f"searched:table={out}", code=2)
    assert "is of VideoDiT with 2 attentions of 2 heads, got a model of" in error
