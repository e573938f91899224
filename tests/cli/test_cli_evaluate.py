"""`ditkit evaluate`: scores and nearest neighbours, and what it refuses before it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli_support import Capture, complaint, output, save_photos
from ditkit.metrics.features import HEAD_TAP, POOLED_TAP
from ditkit.tasks.image import scores
from models_support import save_tiny, tiny_model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos")


class Features:
    """Stands for the pretrained network: per-channel statistics of a picture."""

    def taps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return {POOLED_TAP: pooled, HEAD_TAP: torch.cat([pooled, pooled.square()], 1)}


def test_evaluate_measures_and_shows_neighbours(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "m", tmp_path / "out"
    tiny_model(classes=2, class_names=("cat", "dog")).save(folder)
    monkeypatch.setattr(scores, "load_efficientnet_lite0", Features)
    monkeypatch.setattr(
        scores, "extract", lambda network, images, progress: network.taps(torch.stack(list(images)))
    )
    (photos / "dog" / "bad.png").write_bytes(b"no image")
    flags = ["--data", photos, "--max-bad", "1", "--count", "6", "--steps", "4", "--batch-size", "4"]
    flags += ["--guidance-interval", "0.2", "0.8", "--real-count", "4"]
    text = output(capsys, "evaluate", folder, *flags, "--policy", "taylorseer:interval=2", "--out", out)
    assert "KID" in text and "n = 6 drawn, 4 real" in text and "efficientnet" in text

    result = json.loads((out / "evaluation.json").read_text())
    assert (result["n_fake"], result["n_real"]) == (6, 4) and result["fid"] is None
    assert result["settings"]["policies"] == ["taylorseer:interval=2"] and result["macs_each"] > 0
    assert result["command"].startswith(
        f"ditkit evaluate {folder} --data {photos} --max-bad 1 --real-count 4 --count 6 --steps 4"
    )
    assert "--guidance 2.0 --guidance-interval 0.2 0.8 --solver euler" in result["command"]
    assert result["command"].endswith("--policy taylorseer:interval=2 --batch-size 4")
    assert len(result["nearest"]) == 6
    ids = {f"{name}/{i}.png" for name, i in (("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1))}
    assert all(entry["pixels"]["id"] in ids and entry["features"]["id"] in ids for entry in result["nearest"])
    assert Image.open(out / "neighbours.png").size[0] > 3 * 96


def test_evaluate_refuses_other_classes(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    model = save_tiny(tmp_path / "m")
    line = complaint(capsys, "evaluate", model, "--data", photos, "--out", tmp_path / "out")
    assert "photos has 2 classes, the model has 4" in line


def test_evaluate_refuses_too_few_real_pictures_before_drawing(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(classes=2, class_names=("cat", "dog")).save(tmp_path / "m")
    for name in ("cat/0", "cat/1", "dog/2"):
        (photos / f"{name}.png").unlink()
    monkeypatch.setattr(scores, "generate", lambda *_, **__: pytest.fail("work has started"))
    words = ["evaluate", tmp_path / "m", "--data", photos, "--out", tmp_path / "out"]
    assert "photos has 3 pictures, expected at least 4" in complaint(capsys, *words)
    words += ["--real-count", 5]
    (photos / "dog" / "3.png").write_bytes((photos / "dog" / "0.png").read_bytes())
    assert "real_count=5, expected 4 to 4, as photos has" in complaint(capsys, *words)
    assert not (tmp_path / "out").exists()
