"""Prompts, from a folder of captions to `ditkit train`, `generate`, `compare` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli_support import Capture, complaint, exit_code, output
from ditkit.metrics.features import HEAD_TAP, POOLED_TAP
from ditkit.tasks.image import scores
from models_support import save_tiny

TINY = ["--width", "32", "--depth", "1", "--heads", "2", "--text-tokens", "6", "--text-encoder", "letters"]
RUN = ["--size", "8", "--patch", "4", "--steps", "2", "--batch", "4", "--warmup", "0", "--sheet-every", "2"]
RUN += ["--learning-rate", "0.05"]  # what begins at zero is heard after two steps


def captioned(folder: Path, *captions: str | None) -> Path:
    """Pictures of noise, 0.png and so on, with a line each in metadata.jsonl."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, caption in enumerate(captions):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data, and the model that a run on them saved."""
    root = tmp_path_factory.mktemp("prompt")
    data = captioned(root / "data", "a red apple", "a cat", "two cats", "a very long caption")
    words = ["train", "text-image", "--data", data, "--out", root / "run", *TINY, *RUN]
    assert exit_code(*words) == 0
    return data, root / "run" / "model"


def test_captions_are_encoded_once_beside_the_data(trained: tuple[Path, Path]) -> None:
    data, model = trained
    (kept,) = (data / ".ditkit").iterdir()
    before = kept.stat().st_mtime_ns
    again = model.parent.parent / "again"
    assert exit_code("train", "text-image", "--data", data, "--out", again, *TINY, *RUN) == 0
    assert kept.stat().st_mtime_ns == before
    lines = [(folder / "losses.jsonl").read_text().splitlines() for folder in (model.parent, again)]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]
    assert list((again / "samples").glob("*.png"))


def test_generate_draws_what_is_asked(trained: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    capsys.readouterr()
    asked = ["--prompt", "a cat", "--prompt", "A red apple!", "--seeds", "0", "1", "--steps", "4"]
    text = output(capsys, "generate", trained[1], *asked, "--out", tmp_path / "out")
    assert "4 pictures" in text
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["A-red-apple-0.png", "A-red-apple-1.png", "a-cat-0.png", "a-cat-1.png", "sheet.png"]
    content = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert [one["prompt"] for one in content["pictures"]] == [
        "a cat",
        "a cat",
        "A red apple!",
        "A red apple!",
    ]
    a, b = ((tmp_path / "out" / name).read_bytes() for name in (names[0], names[2]))
    assert a != b


def test_compare_and_tune_take_prompts(trained: tuple[Path, Path], tmp_path: Path) -> None:
    common = ["--policy", "taylorseer:interval=2", "--steps", "4", "--rounds", "1", "--seeds", "0"]
    compared = ["--no-memory", "--converged-steps", "5", "--prompt", "a cat", "--out", tmp_path / "c"]
    assert exit_code("compare", trained[1], *common, *compared) == 0
    assert json.loads((tmp_path / "c" / "report.json").read_text())["settings"]["prompts"] == ["a cat"]
    tuned = ["--at-least", "1", "--converged-steps", "5", "--prompt", "a cat", "--out", tmp_path / "t"]
    assert exit_code("tune", trained[1], *common, *tuned) == 0


def test_evaluate_draws_by_captions_and_measures_retrieval(
    trained: tuple[Path, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Features:
        """Stands for the pretrained network: the pixels themselves."""

        def taps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
            return {POOLED_TAP: pooled, HEAD_TAP: images.flatten(1)}

    monkeypatch.setattr(scores, "load_efficientnet_lite0", Features)
    monkeypatch.setattr(
        scores, "extract", lambda network, images, progress: network.taps(torch.stack(list(images)))
    )
    capsys.readouterr()
    text = output(
        capsys,
        "evaluate",
        trained[1],
        "--data",
        trained[0],
        "--count",
        "4",
        "--steps",
        "2",
        "--out",
        tmp_path,
    )
    assert "retrieval" in text and "chance 0.250, 1.000" in text
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["retrieval"]["top5"] == 1 and found["nearest"][0]["prompt"]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (
            (None, "a cat", " "),
            "2 of 3 pictures have no caption, first '0.png', expected one each; --option blank=",
        ),
        ((None, ""), "none of 2 pictures has a caption, expected one each: a metadata.jsonl"),
    ],
)
def test_missing_captions_are_refused(
    captions: tuple[str | None, ...], message: str, tmp_path: Path, capsys: Capture
) -> None:
    data = captioned(tmp_path / "data", *captions)
    assert message in complaint(
        capsys, "train", "text-image", "--data", data, "--out", tmp_path / "run", *TINY, *RUN
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("blank", ["keep", "drop"])
def test_missing_captions_are_kept_or_dropped_where_asked(
    blank: str, tmp_path: Path, capsys: Capture
) -> None:
    data = captioned(tmp_path / "data", None, "a cat", "a dog")
    words = ["--data", data, "--option", f"blank={blank}", "--out", tmp_path / "run", *TINY, *RUN]
    assert exit_code("train", "text-image", *words) == 0


def test_a_prompt_for_a_model_of_classes_is_refused(tmp_path: Path, capsys: Capture) -> None:
    model = save_tiny(tmp_path / "model")
    for verb in ("generate", "compare"):
        words = [
            verb,
            model,
            "--prompt",
            "a cat",
            "--policy",
            "taylorseer:interval=2",
            "--out",
            tmp_path / "out",
        ]
        assert "prompt='a cat': a DiT takes no prompt, expected label" in complaint(capsys, *words)


def test_a_label_for_a_model_of_prompts_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    words = ["generate", trained[1], "--label", "0", "--out", tmp_path / "out"]
    assert "a TextDiT takes no class labels" in complaint(capsys, *words)
