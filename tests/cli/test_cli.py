"""The commands do what their help says, and say where they wrote what."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ditkit
from cli_support import Capture, exit_code, output, save_photos
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli import compare as compare_command
from ditkit.cli import generate as generate_command
from ditkit.cli.generate import file_stems, slug
from ditkit.cli.main import COMMANDS, ditkit_commands, main, summary
from ditkit.cli.options import policies_of, seeds_of, writable
from ditkit.cli.parsing import Group, one_line
from ditkit.cli.sampling import Guiding
from ditkit.cli.train import found
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.pipelines.accelerate import DEFAULT
from ditkit.report.sheet import grid
from ditkit.sample import Autoguidance, ClassifierFree, Samples, Sampling, Unguided
from ditkit.tasks.image.recipe import write_sheet
from models_support import CLASSES, save_tiny, tiny_model

COLUMNS = 80
SMALL = ["--size", "16", "--width", "16", "--depth", "1", "--heads", "2", "--warmup", "0"]
SMALL += ["--precision", "float32", "--snapshot-every", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos")


HELPS = [(), ("train",), *((command,) for command in COMMANDS), *(("train", name) for name in found())]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_fits_the_terminal_and_ends_well(
    words: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    text = output(capsys, *words, "--help")
    assert text.startswith(f"usage: {' '.join(('ditkit', *words))}")
    overlong = [line for line in text.splitlines() if len(line) > COLUMNS and "--" not in line]
    assert overlong == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "train"])
def test_help_explains_every_flag_and_shows_examples(command: str, capsys: Capture) -> None:
    text = output(capsys, command, "--help")
    assert f"Examples:\n    ditkit {command}" in text
    unexplained = re.findall(r"^│ (--\S+) .*│\n│\s+\(default", text, re.MULTILINE)
    assert unexplained == []


def test_no_words_list_the_commands(capsys: Capture) -> None:
    text = output(capsys)
    assert [command for command in COMMANDS if not re.search(rf"^  {command}  ", text, re.MULTILINE)] == []
    assert text == output(capsys, "-h")


def test_version(capsys: Capture) -> None:
    assert output(capsys, "--version") == f"ditkit {ditkit.__version__}\n"


def test_train_alone_lists_the_recipes(capsys: Capture) -> None:
    text = output(capsys, "train")
    assert "emoji" in found() and all(name in text for name in found())


def test_generate_writes_pictures_a_sheet_and_what_it_did(
    model: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "new" / "out"
    policy = "taylorseer:interval=3,order=1"
    flags = ["--label", CLASSES[1], "--label", CLASSES[2], "--seeds", "0", "4..5", "--steps", "8"]
    text = output(capsys, "generate", model, *flags, "--policy", policy, "--out", out)
    names = {f"{label}-{seed}.png" for label in ("animal-mammal", "flag-other") for seed in (0, 4, 5)}
    assert {path.name for path in out.iterdir()} == names | {"sheet.png", "generated.json"}
    assert all(Image.open(out / name).size == (16, 16) for name in names)
    assert str(out) in text and "sheet.png" in text and "6 pictures in" in text
    assert "computed 0-1 4 7, forecast 2-3 5-6" in text

    done = json.loads((out / "generated.json").read_text())
    assert done["settings"]["policies"] == [policy] and done["settings"]["solver"] == "euler"
    assert done["receipts"][0]["lanes"]["cond"]["forecast"] == "2-3 5-6"
    assert {entry["file"] for entry in done["pictures"]} == names
    assert done["pictures"][-1] == {"file": "flag-other-5.png", "seed": 5, "label": CLASSES[2]}
    assert done["seconds"] > 0 and done["policy_bytes"] > 0


def test_the_files_hold_what_generate_draws(model: Path, tmp_path: Path, capsys: Capture) -> None:
    output(
        capsys, "generate", model, "--label", CLASSES[0], "--seeds", "7", "--steps", "3", "--out", tmp_path
    )
    drawn = ditkit.generate(ditkit.load(model), CLASSES[0], seeds=[7], steps=3).samples[0]
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    read = torch.frombuffer(
        bytearray(Image.open(tmp_path / "animal-bird-7.png").tobytes()), dtype=torch.uint8
    )
    assert torch.equal(read, expected.flatten())


def test_generate_spreads_over_the_classes_by_default(model: Path, tmp_path: Path, capsys: Capture) -> None:
    output(capsys, "generate", model, "--seeds", "0..3", "--steps", "2", "--out", tmp_path)
    pictures = json.loads((tmp_path / "generated.json").read_text())["pictures"]
    assert [entry["label"] for entry in pictures] == list(CLASSES)


def test_list_labels_draws_nothing(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert (
        output(capsys, "generate", model, "--list-labels", "--out", tmp_path / "o")
        == "\n".join(CLASSES) + "\n"
    )
    assert not (tmp_path / "o").exists()


def test_exact_is_a_policy_that_changes_nothing(model: Path, tmp_path: Path, capsys: Capture) -> None:
    for name, flags in {"plain": [], "exact": ["--policy", "exact"]}.items():
        output(capsys, "generate", model, "--seeds", "0", "--steps", "2", *flags, "--out", tmp_path / name)
    plain, exact = ((tmp_path / name / "animal-bird-0.png").read_bytes() for name in ("plain", "exact"))
    assert plain == exact


def test_compare_writes_its_report_and_says_where(model: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--policy", "exact", "--policy", "taylorseer:interval=3", "--seeds", "0..1", "--steps", "6"]
    text = output(
        capsys, "compare", model, *flags, "--rounds", "1", "--no-memory", "--fewer-steps", "--out", tmp_path
    )
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "sheet.png"}
    assert f"open {tmp_path / 'report.html'} in a browser" in text
    kinds = [row["kind"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]]
    assert kinds == ["exact", "policy", "control"]


def test_a_narrow_terminal_is_sent_to_the_page(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    flags = [
        "--policy",
        "taylorseer:interval=3",
        "--seeds",
        "0",
        "--steps",
        "6",
        "--rounds",
        "1",
        "--no-memory",
    ]
    assert exit_code("compare", model, *flags, "--out", tmp_path) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "the table needs 80 columns and this terminal has 60: see report.html"
    assert (tmp_path / "report.html").is_file()


def test_the_demo_is_what_it_says(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    class Stop(Exception):
        """What was asked is known."""

    def noted(_: object, **options: object) -> None:
        asked.update(options)
        raise Stop

    monkeypatch.setattr(compare_command, "compared", noted)
    with pytest.raises(Stop):
        main(["compare", str(model), "--demo", "--out", str(tmp_path)])
    sampling = asked["sampling"]
    assert isinstance(sampling, Sampling)
    assert sampling.policies == (DEFAULT, TaylorSeer(interval=4, order=1), TaylorSeer(interval=6, order=2))
    assert (tmp_path / "first.png").is_file() and "takes about" in capsys.readouterr().err
    assert (asked["rounds"], asked["memory"], asked["converged_steps"]) == (1, False, 100)
    assert asked["controls_as_rows"] is True and sampling.seeds == tuple(range(8)) and sampling.steps == 50


def test_train_from_a_folder_then_generate(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    words = ["train", "emoji", "--data", photos, *SMALL, "--batch", "4", "--sheet-every", "2"]
    words += ["--save-every", "1", "--out", run]
    assert exit_code(*words, "--steps", "2") == 0
    assert f"ditkit generate {run / 'model'}" in capsys.readouterr().out
    assert Image.open(run / "samples" / "000002.png").size[0] > 16
    assert len((run / "losses.jsonl").read_text().splitlines()) == 2

    assert exit_code(*words, "--steps", "3", "--resume") == 0
    capsys.readouterr()
    assert len((run / "losses.jsonl").read_text().splitlines()) == 3
    assert output(capsys, "generate", run / "model", "--list-labels") == "cat\ndog\n"


def test_captions_train_as_one_class_and_only_what_exists_is_named(
    photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    names = [f"cat/{i}.png" for i in range(3)]
    lines = [json.dumps({"file_name": name, "text": f"picture {name}"}) for name in names]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    words = ["train", "emoji", "--data", photos, *SMALL, "--steps", "1", "--batch", "2", "--sheet-every", "0"]
    words += ["--save-every", "0", "--out", run]
    assert exit_code(*words) == 0
    said = capsys.readouterr().out
    assert f"wrote {run}: model, losses.jsonl, tensorboard; go on with: " in said
    assert not (run / "samples").exists() and not (run / "state.safetensors").exists()
    assert output(capsys, "generate", run / "model", "--list-labels") == "photos\n"
    told = output(capsys, *words, "--dry-run")
    assert re.search(r"3 images \[3, 16, 16\], 1 classes", told)


def test_only_the_first_process_speaks_and_says_if_tensorboard_is_missing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditkit.cli.train.train_recipe", lambda *_, **__: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "emoji", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "go on with" in said.out and said.err.startswith("TensorBoard is not installed")
    monkeypatch.setenv("RANK", "1")
    assert output(capsys, "train", "emoji", "--out", tmp_path) == ""


def test_dry_run_prints_and_trains_nothing(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    text = output(
        capsys, "train", "emoji", "--data", photos, "--steps", "777", "--dry-run", "--out", tmp_path / "run"
    )
    assert "777" in text and "parameters" in text
    assert not (tmp_path / "run").exists()


def test_the_training_sheet_shows_every_class_in_its_row(tmp_path: Path) -> None:
    write_sheet(tmp_path, tiny_model(), 123)
    width, height = Image.open(tmp_path / "000123.png").size
    assert height == pytest.approx(2 * width, rel=0.05)  # 8 classes down, 4 samples across


def test_flags_of_guidance_become_a_guidance(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert Guiding().make() == ClassifierFree(2.0) and Guiding(guidance=1.0).make() == Unguided()
    assert Guiding(3.0, (0.1, 0.5), 2).make() == ClassifierFree(3.0, channels=2, interval=(0.1, 0.5))
    assert isinstance(Guiding(guide=str(model)).make(), Autoguidance)
    tiny_model(depth=1).save(tmp_path / "weak")
    flags = {
        "plain": [],
        "guide": ["--guide", tmp_path / "weak"],
        "late": ["--guidance-interval", "0", "0.4"],
    }
    for name, given in flags.items():
        output(capsys, "generate", model, "--seeds", "0", "--steps", "4", *given, "--out", tmp_path / name)
    pictures = {(tmp_path / name / "animal-bird-0.png").read_bytes() for name in flags}
    assert len(pictures) == 3
    settings = json.loads((tmp_path / "guide" / "generated.json").read_text())["settings"]
    assert settings["guide"] == str(tmp_path / "weak")


def test_receipts_of_every_label_are_kept_once(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate_command.draw

    def marked(network: Model, label: str, *args: object, **options: object) -> Samples:
        drawn = whole(network, label, *args, **options)  # type: ignore[arg-type]
        (receipt,) = drawn.receipts
        receipt.policy = TaylorSeer(interval=2 + CLASSES.index(label) // 3)
        return drawn

    monkeypatch.setattr(generate_command, "draw", marked)
    labels = [word for name in (CLASSES[0], CLASSES[1], CLASSES[3]) for word in ("--label", name)]
    flags = ["--policy", "taylorseer:interval=2", "--seeds", "0", "--steps", "5", "--out", tmp_path]
    text = output(capsys, "generate", model, *labels, *flags)
    kept = [r["policy"] for r in json.loads((tmp_path / "generated.json").read_text())["receipts"]]
    assert kept == [str(TaylorSeer(interval=2)), str(TaylorSeer(interval=3))]
    assert all(f"{policy}, " in text for policy in kept)


def test_a_trial_of_the_folder_leaves_a_users_files_and_takes_its_own_folders_away(tmp_path: Path) -> None:
    (tmp_path / ".ditkit").write_text("mine")
    with writable(tmp_path), writable(tmp_path):
        assert list(tmp_path.iterdir()) == [tmp_path / ".ditkit"]
    assert (tmp_path / ".ditkit").read_text() == "mine"
    for place in ("a/b/c", "a/d"):
        with pytest.raises(KeyboardInterrupt), writable(tmp_path / place):
            if place == "a/b/c":
                (tmp_path / "a" / "kept").mkdir()
            raise KeyboardInterrupt
        assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "kept"]


def test_seeds_are_numbers_and_ranges() -> None:
    assert seeds_of(["0..2", "7"]) == (0, 1, 2, 7)
    assert seeds_of(["5..5"]) == (5,)
    for word in ("1..", "..3", "1...3", "0x1", "1,2", "٣", "-1", "1.5"):
        with pytest.raises(ConfigError, match="whole numbers"):
            seeds_of([word])


def test_policies_leave_exact_out() -> None:
    assert policies_of(["exact"]) == () and len(policies_of(["taylorseer", "exact"])) == 1


def test_a_label_becomes_part_of_a_file_name() -> None:
    assert slug("food fruit/../x") == "food-fruit-..-x"
    assert slug("../..") == "unnamed" and slug("été") == "été"


def test_classes_with_one_slug_keep_their_files_apart() -> None:
    assert file_stems(["a b", "cat", "a/b", "Cat"]) == {
        "a b": "a-b@0",
        "cat": "cat@1",
        "a/b": "a-b@2",
        "Cat": "Cat@3",
    }
    assert file_stems(["a b", "cat"]) == {"a b": "a-b", "cat": "cat"}


def test_a_grid_holds_every_picture_enlarged() -> None:
    pictures = torch.stack([torch.full((1, 48, 48), value) for value in (-1.0, 0.0, 0.5)])
    page = grid(pictures, columns=2)
    assert page.shape == (1, 2 * (2 * 50 + 2), 2 * (2 * 50 + 2))
    assert [page[0, 20, 20].item(), page[0, 20, 150].item(), page[0, 150, 20].item()] == [-1.0, 0.0, 0.5]
    assert page[0, 150, 150].item() == 1.0


def test_a_box_becomes_one_line() -> None:
    box = "╭─ Error ─╮\n│ Error parsing │\n│ --steps: 'x'. │\n│ ─────── │\n│ For help, see │\n╰─────────╯\n"
    assert one_line(box) == "Error parsing --steps: 'x'"
    assert one_line("") == "the arguments are not understood"


def test_a_reader_that_stops_early_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Closed:
        """A pipe whose reader has gone."""

        def __init__(self) -> None:
            self.file = (tmp_path / "gone").open("w")

        def write(self, _: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

        def fileno(self) -> int:
            return self.file.fileno()

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["--version"]) == 0


def test_the_list_of_commands_imports_nothing_heavy_and_says_what_each_is() -> None:
    code = (
        "import sys; from ditkit.cli.main import main; main(['--help']); "
        "print('heavy:', *{'torch', 'tyro', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
    for name in COMMANDS:
        member = ditkit_commands().members[name]()
        assert (
            summary(name)
            == (member.about if isinstance(member, Group) else str(member.__doc__)).splitlines()[0]
        )
