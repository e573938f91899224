"""`ditkit generate` and `ditkit evaluate` on models of every task, which says what is measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import ditkit
from cli_support import Capture, complaint, exit_code, output, save_photos
from codecs_support import small
from ditkit.core.convention import Convention
from ditkit.data.loading import load_images
from ditkit.data.sets import moving_digits
from ditkit.metrics.image import psnr_db
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.tasks.video.masks import KINDS
from ditkit.tasks.video.scores import complete
from models_support import perturbed

FRAMES, SIDE = 4, 16


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares stand for the handwritten digits."""

    def squares(split: str) -> Tensor:
        pictures = torch.zeros(10, 28, 28, dtype=torch.uint8)
        pictures[:, 6:22, 6:22] = 255
        return pictures

    monkeypatch.setattr(moving_digits, "read_digits", squares)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = VDTConfig(1, FRAMES, SIDE, patch=4, width=8, depth=1, heads=1, convention=Convention())
    return perturbed(VDT(config), 0.1).save(tmp_path / "vdt")


def test_clips_are_generated_without_data(clips: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    text = output(capsys, "generate", clips, "--seeds", "3", "7", "--steps", "2", "--out", out)
    assert "2 clips in " in text
    written = json.loads((out / "generated.json").read_text())
    assert [(entry["seed"], entry["label"]) for entry in written["clips"]] == [(3, "0"), (7, "0")]
    assert all((out / entry["file"]).exists() for entry in written["clips"])
    assert (out / "sheet.png").stat().st_size
    drawn = ditkit.generate(ditkit.load(clips), seeds=[3, 7], steps=2, guidance=1.0)
    with Image.open(out / "7.gif") as film:
        assert film.n_frames == FRAMES  # type: ignore[attr-defined]
        corner = torch.tensor(film.convert("RGB").getpixel((0, 0))[0])
    assert torch.allclose(corner.float(), (drawn.samples[1, 0, 0, 0, 0].clamp(-1, 1) + 1) * 127.5, atol=1)


def test_clips_are_evaluated_under_masks(clips: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--data", "moving-digits", "--count", "2", "--steps", "2", "--guidance", "1"]
    text = output(capsys, "evaluate", clips, *flags, "--out", tmp_path / "out")
    assert "interpolate" in text and "leadtime.png" in text
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    truth = moving_digits.load(SIDE, FRAMES, split="test").clips(torch.tensor([0, 5000]))
    done = complete(ditkit.load(clips), truth, KINDS["interpolate"], seeds=[0, 1], steps=2).scores
    (same,) = (scores for scores in found["masks"] if scores["mask"] == "interpolate")
    assert done.model is not None and same["model"]["psnr_db"] == done.model.psnr_db
    assert found["settings"]["count"] == 2 and "--count 2 --steps 2" in found["command"]
    line = complaint(capsys, "evaluate", clips, *flags, "--neighbours", "3", "--out", tmp_path / "no")
    assert "unknown setting of evaluating clips 'neighbours'" in line
    assert "expected --data" in complaint(capsys, "evaluate", clips, "--out", tmp_path / "no")


def test_forecasts_are_evaluated_and_have_no_steps(tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    config = PredFormerConfig(frames=2, size=(SIDE, SIDE), patch=4, width=8, heads=1, hidden=8, layout="F1")
    model = PredFormer(config).save(tmp_path / "predformer")
    flags = ["--data", "moving-digits", "--count", "2", "--out"]
    output(capsys, "evaluate", model, *flags, tmp_path / "one")
    output(capsys, "forecast", model, *flags, tmp_path / "two")
    one, two = (
        json.loads((tmp_path / name).read_text())["scores"]
        for name in ("one/evaluation.json", "two/forecast.json")
    )
    assert one["model"] == two["predformer"] and one["persistence"] == two["persistence"]
    assert (tmp_path / "one" / "leadtime.png").exists() and (tmp_path / "one" / "model.png").exists()
    line = complaint(capsys, "evaluate", model, "--steps", "5", *flags, tmp_path / "no")
    assert "forecasts of data has no settings of sampling" in line


def test_a_codec_is_evaluated_by_what_it_decodes(tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    codec = small()
    codec.save(tmp_path / "vae")
    photos = save_photos(tmp_path / "photos")
    assert exit_code("evaluate", tmp_path / "vae", "--data", photos, "--out", tmp_path / "out") == 0
    assert "6 pictures, coded" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    pictures = load_images(photos, 16).images_float()
    with torch.no_grad():
        again = codec.decode(codec.encode(pictures)).clamp(-1, 1)
    expected = psnr_db(again.reshape(1, -1), pictures.reshape(1, -1)).item()
    assert found["pictures"] == 6 and found["psnr_db"] == pytest.approx(expected)
    assert (tmp_path / "out" / "sheet.png").exists()
