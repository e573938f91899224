"""`ditkit video`: what it writes and says, and what it refuses in one line before any work."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import ditkit
from cli_support import Capture, complaint, output
from ditkit.core.convention import Convention
from ditkit.data.sets import moving_digits
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.report import film as films
from ditkit.tasks.video import evaluation
from ditkit.tasks.video.masks import KINDS, LEARNED
from ditkit.tasks.video.scores import complete
from models_support import perturbed, save_tiny

FRAMES, SIDE = 8, 16
EVERY = (*LEARNED, "unconditional")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = VDTConfig(1, FRAMES, SIDE, patch=4, width=8, depth=2, heads=1, convention=Convention())
    return perturbed(VDT(config), 0.1).save(folder / "vdt")


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares stand for the handwritten digits."""

    def squares(split: str) -> Tensor:
        pictures = torch.zeros(10, 28, 28, dtype=torch.uint8)
        pictures[:, 6:22, 6:22] = 255
        return pictures

    monkeypatch.setattr(moving_digits, "read_digits", squares)


def test_every_mask_is_drawn_scored_and_shown(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--data", "moving-digits", "--count", "2", "--seeds", "7", "9", "--steps", "6"]
    flags += ["--policy", "taylorseer:interval=2,order=1", "--out", str(tmp_path)]
    text = output(capsys, "video", model, *flags)
    films = {f"{mask}.{suffix}" for mask in EVERY for suffix in ("mp4", "gif", "png")}
    assert {path.name for path in tmp_path.iterdir()} == films | {"leadtime.png", "video.json"}
    assert all(name in text for name in films) and str(tmp_path) in text and "14 clips in" in text

    done = json.loads((tmp_path / "video.json").read_text())
    assert [scores["mask"] for scores in done["masks"]] == list(EVERY)
    predicted = done["masks"][0]
    assert predicted["model"]["psnr_db_by_frame"][: FRAMES // 2] == [None] * (FRAMES // 2)
    assert all(predicted[by]["psnr_db"] > 0 for by in ("model", "baseline"))
    assert predicted["receipts"][0]["policy"].startswith("TaylorSeer")
    assert done["clips"] == ["test-0-000000", "test-0-005000"]
    for mask in ("predict", "unconditional"):
        with Image.open(tmp_path / f"{mask}.gif") as film:
            assert film.n_frames == FRAMES  # type: ignore[attr-defined]


def test_what_is_given_can_be_favoured(model: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--data", "moving-digits", "--mask", "predict", "--mask", "unconditional", "--count", "2"]
    clips = moving_digits.load(SIDE, FRAMES, split="test").clips(torch.tensor([0, 5000]))
    scores = {}
    for scale in ("1", "3"):
        flags = [*words, "--steps", "3", "--guidance", scale, "--out", tmp_path / scale]
        output(capsys, "video", model, *flags)
        noted = json.loads((tmp_path / scale / "video.json").read_text())
        scores[scale] = [found["model"] for found in noted["masks"]]
        assert f"--guidance {float(scale)}" in noted["command"]
        drawn = complete(
            ditkit.load(model), clips, KINDS["predict"], seeds=(0, 1), steps=3, guidance=float(scale)
        )
        assert json.loads(json.dumps(asdict(drawn.scores)))["model"] == scores[scale][0]
    assert scores["1"][0] != scores["3"][0]
    strips = [(tmp_path / scale / "unconditional.png").read_bytes() for scale in scores]
    assert strips[0] == strips[1]  # nothing is given that could be favoured


def test_the_command_that_is_noted_gives_the_same_again(model: Path, tmp_path: Path, capsys: Capture) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    flags = ["--data", "moving-digits", "--mask", "region", "--mask", "first-last", "--count", "2"]
    output(capsys, "video", model, *flags, "--frames", "4", "--size", "20", "--steps", "2", "--out", first)
    assert not (first / "leadtime.png").exists()
    noted = json.loads((first / "video.json").read_text())
    assert noted["settings"]["size"] == [20, 20] and noted["settings"]["frames"] == 4
    output(capsys, *shlex.split(noted["command"])[1:], "--out", again)
    found = json.loads((again / "video.json").read_text())
    for scores in noted["masks"] + found["masks"]:
        del scores["seconds"]
    assert found == noted
    assert (again / "region.png").read_bytes() == (first / "region.png").read_bytes()


def test_without_data_only_what_needs_none(model: Path, tmp_path: Path, capsys: Capture) -> None:
    text = output(capsys, "video", model, "--count", "3", "--steps", "1", "--frames", "5", "--out", tmp_path)
    assert "no --data" in text and "PSNR" not in text
    assert {path.stem for path in tmp_path.iterdir()} == {"unconditional", "video"}
    with Image.open(tmp_path / "unconditional.gif") as film:
        assert film.n_frames == 5  # type: ignore[attr-defined]


def test_without_pyav_there_are_gifs_and_a_line_that_says_so(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (evaluation, films):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    text = output(capsys, "video", model, "--count", "1", "--steps", "1", "--out", tmp_path)
    assert "no MP4" in text and "ditkit[video]" in text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gif", ".json", ".png"]


DIGITS = ["--data", "moving-digits"]
REFUSED = [
    (["--mask", "predct", *DIGITS], ["'predct'", "did you mean 'predict'?"]),
    (["--mask", "predict"], ["--mask predict needs clips", "--data"]),
    (["--mask", "region", "--mask", "region", *DIGITS], ["--mask region", "twice"]),
    (["--mask", "predict", "--frames", "1", *DIGITS], ["'predict' needs 2 frames"]),
    (["--mask", "first-last", "--frames", "2", *DIGITS], ["'first-last' needs 3 frames"]),
    (["--size", "18"], ["height=18", "patches of 4"]),
    (["--size", "16", "20", "24"], ["(16, 20, 24)", "(height, width)"]),
    (["--size", "16", "20", *DIGITS], ["16 x 20", "square"]),
    (["--size", "0"], ["size=0"]),
    (["--frames", "0"], ["--frames=0"]),
    (["--count", "0"], ["--count=0"]),
    (["--count", "3", "--seeds", "0..3"], ["4 seeds", "--count=3"]),
    (["--count", "20000", *DIGITS], ["10000 clips", "20000"]),
    (["--steps", "0"], ["steps=0"]),
    (["--data", "emoji"], ["emoji holds images, expected clips"]),
    (["--data", "moving-digts"], ["'moving-digts'", "did you mean 'moving-digits'?"]),
    (["--policy", "taylorser"], ["'taylorser'", "did you mean 'taylorseer'?"]),
    (["--solver", "ancestral"], ["Ancestral", "discrete path"]),
]


@pytest.mark.parametrize(("words", "parts"), REFUSED, ids=lambda v: " ".join(v)[:40])
def test_one_line_and_nothing_written(
    words: list[str], parts: list[str], model: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    line = complaint(capsys, "video", model, *words, "--out", out)
    assert [part for part in parts if part not in line] == []
    assert not out.exists()


def test_a_film_shorter_than_the_clip_is_named(model: Path, tmp_path: Path, capsys: Capture) -> None:
    film = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    films.write_mp4(tmp_path / "short.mp4", film, 10.0)
    line = complaint(capsys, "video", model, "--data", tmp_path, "--out", tmp_path / "out")
    assert "short.mp4" in line and "4" in line and "8" in line


def test_other_channels_than_the_models(model: Path, tmp_path: Path, capsys: Capture) -> None:
    films.write_mp4(tmp_path / "rgb.mp4", torch.zeros(9, 3, SIDE, SIDE, dtype=torch.uint8), 10.0)
    line = complaint(capsys, "video", model, "--data", tmp_path, "--count", 2, "--out", tmp_path / "out")
    assert "3 channels, the model draws 1" in line


def test_each_command_names_the_one_for_another_kind_of_model(
    model: Path, folder: Path, capsys: Capture
) -> None:
    pictures = save_tiny(folder / "dit")
    config = PredFormerConfig(frames=2, size=(8, 8), patch=4, width=8, heads=1, hidden=8, layout="F1")
    forecasts = PredFormer(config).save(folder / "predformer")
    for command, given, named in (
        ("generate", forecasts, f"ditkit forecast {forecasts} --data DATA"),
        ("compare", forecasts, f"ditkit forecast {forecasts} --data DATA"),
        ("tune", forecasts, f"ditkit forecast {forecasts} --data DATA"),
        ("video", pictures, f"makes pictures, expected a model of clips; try: ditkit generate {pictures}"),
        ("video", forecasts, f"ditkit forecast {forecasts}"),
        ("forecast", model, f"makes clips, expected a model of forecasts; try: ditkit video {model}"),
    ):
        policy = ["--policy", "taylorseer"] if command in ("compare", "tune") else []
        policy += {"tune": ["--at-most", "0.5"], "forecast": DIGITS}.get(command, [])
        assert named in complaint(capsys, command, given, *policy)
    assert "makes pictures" in complaint(
        capsys, "video", pictures, "--mask", "predict"
    )  # not that it needs --data
