"""Bad input on the command line: one line on stderr, exit code 2, nothing written, no earlier file lost."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_support import Capture, complaint
from ditkit.cli.main import main
from models_support import save_tiny, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


GENERATE = [
    (["--stpes", "5"], ["'--stpes'", "did you mean '--steps'?"]),
    (["--policies", "exact"], ["'--policies'", "did you mean '--policy'?"]),
    (["extra"], ["'extra'", "no further argument"]),
    (["--steps", "many"], ["--steps", "'many'"]),
    (["--steps"], ["--steps"]),
    (["--steps", "0"], ["steps=0", "at least 1"]),
    (["--batch-size", "0"], ["batch_size=0", "at least 1"]),
    (["--guidance", "strong"], ["--guidance", "'strong'"]),
    (["--label", "animal-mamal"], ["'animal-mamal'", "did you mean 'animal-mammal'?"]),
    (["--solver", "eulr"], ["'eulr'", "did you mean 'euler'?"]),
    (["--solver", "ancestral"], ["Ancestral", "discrete path"]),
    (["--policy", "taylorser"], ["'taylorser'", "did you mean 'taylorseer'?"]),
    (["--policy", "taylorseer:intervall=4"], ["'intervall'", "did you mean 'interval'?"]),
    (["--policy", "taylorseer:interval=x"], ["interval='x'", "expected an integer"]),
    (["--policy", "taylorseer:interval=0"], ["interval=0", "at least 1"]),
    (["--policy", "taylorseer:order=-1"], ["order=-1", "at least 0"]),
    (["--policy", "taylorseer:warmup=9", "--steps", "5"], ["warmup=9", "at most total=5 evaluations"]),
    (["--policy", "taylorseer", "--policy", "taylorseer:order=1"], ["both own"]),
    (["--policy", "taylorseer:warmup=5", "--steps", "5"], ["saved nothing"]),
    (["--policy", "taylorseer", "--max-bytes", "10"], ["max_bytes=10"]),
    (["--seeds", "1", "2", "1"], ["seed 1 is given twice"]),
    (["--seeds", "0..3", "2"], ["seed 2 is given twice"]),
    (["--seeds", "3..1"], ["'3..1'", "0..15"]),
    (["--seeds", "-1"], ["-1"]),
    (["--seeds", "one"], ["'one'", "whole numbers"]),
    (["--seeds"], ["seeds is empty"]),
    (["--label", "food-fruit", "--label", "food-fruit"], ["'food-fruit'", "given twice"]),
    (["--guidance-interval", "0.9", "0.1"], ["interval=(0.9, 0.1)"]),
    (["--guidance-channels", "9"], ["channels=9", "predicts 3"]),
    (["--guide", "emoji", "--guidance-interval", "0", "0.5"], ["--guide emoji", "--guidance-interval 0 0.5"]),
    (["--guide", "emoji", "--guidance-channels", "2"], ["--guide emoji", "--guidance-channels 2"]),
    (["--guide", "emojy"], ["unknown model 'emojy'"]),
    (["--guidance", "1", "--guide", "emoji"], ["--guidance=1", "--guide emoji"]),
    (["--guidance", "1", "--guidance-channels", "2"], ["--guidance=1", "--guidance-channels 2"]),
]


@pytest.mark.parametrize(("words", "quoted"), GENERATE, ids=[" ".join(words) for words, _ in GENERATE])
def test_generate_refuses(
    words: list[str], quoted: list[str], model: Path, out: Path, capsys: Capture
) -> None:
    line = complaint(capsys, "generate", model, "--out", out, *words)
    assert [part for part in quoted if part not in line] == []
    assert not out.exists()


ELSEWHERE = [
    (["generat"], ["'generat'", "did you mean 'generate'?"]),
    (["--verion"], ["'--verion'"]),
    (["generate"], ["MODEL"]),
    (["generate", "emojy"], ["unknown model 'emojy'"]),
    (["generate", "no/such/folder"], ["'no/such/folder'", "no folder of that name"]),
    (["train", "emojy"], ["'emojy'", "did you mean 'emoji'?"]),
    (["train", "--out", "x"], ["'--out'", "choose from"]),
    (["train", "emoji", "--stpes", "5"], ["'--stpes'", "did you mean '--steps'?"]),
    (["train", "emoji", "--steps", "5"], ["warmup=", "longer than steps=5"]),
    (["train", "emoji", "--width", "30"], ["width=30", "heads=4"]),
    (["train", "emoji", "--precision", "fp8"], ["'fp8'", "bf16"]),
    (["systems", "--chekc"], ["'--chekc'", "did you mean '--check'?"]),
    (["systems", "--json", "--check"], ["--json", "--check"]),
]


@pytest.mark.parametrize(("words", "quoted"), ELSEWHERE, ids=[" ".join(words) for words, _ in ELSEWHERE])
def test_other_commands_refuse(
    words: list[str], quoted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *words)
    assert [part for part in quoted if part not in line] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        ([], ["no --policy", "--demo"]),
        (["--policy", "exact", "--demo"], ["--policy exact", "--demo"]),
        (["--policy", "taylorseer", "--policy", "taylorseer"], ["given twice"]),
        (["--policy", "taylorseer", "--seeds", "1", "1"], ["seed 1 is given twice"]),
        (["--policy", "taylorseer", "--rounds", "0"], ["rounds=0"]),
        (["--policy", "taylorseer", "--label", "animal-birb"], ["'animal-birb'", "did you mean"]),
        (["--policy", "taylorseer", "--converged-steps", "5", "--steps", "9"], ["converged_steps=5"]),
        (["--policy", "taylorseer", "--data", "emojy"], ["'emojy'", "did you mean 'emoji'?"]),
    ],
)
def test_compare_refuses(
    words: list[str], quoted: list[str], model: Path, out: Path, capsys: Capture
) -> None:
    line = complaint(capsys, "compare", model, "--out", out, *words)
    assert [part for part in quoted if part not in line] == []
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--count", "2"], ["count=2", "at least 4"]),
        (["--neighbours", "0"], ["neighbours=0", "at least 1"]),
        (["--max-bad", "3", "--data", "emoji"], ["--max-bad 3 with --data emoji", "a folder"]),
        (["--data", "emojy"], ["'emojy'", "did you mean 'emoji'?"]),
    ],
)
def test_evaluate_refuses(
    words: list[str], quoted: list[str], model: Path, out: Path, capsys: Capture
) -> None:
    words = words if "--data" in words else ["--data", "emoji", *words]
    line = complaint(capsys, "evaluate", model, "--out", out, *words)
    assert [part for part in quoted if part not in line] == []
    assert not out.exists()


def rewritten(weights: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(weights)
    change(state)
    save_file(state, weights)


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_another_size(folder: Path) -> None:
    tiny_model(width=24).save(folder.parent / "other")
    (folder.parent / "other" / "model.safetensors").replace(folder / "model.safetensors")


def without_a_tensor(folder: Path) -> None:
    rewritten(folder / "model.safetensors", lambda state: state.pop("head.out.bias"))


def with_one_more(folder: Path) -> None:
    rewritten(folder / "model.safetensors", lambda state: state.update(spare=torch.zeros(1)))


def with_nan(folder: Path) -> None:
    rewritten(folder / "model.safetensors", lambda state: state["head.out.bias"].fill_(float("nan")))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"head.out.bias": 1}))


def configured(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    described = json.loads(path.read_text())
    described["config"] |= changes
    path.write_text(json.dumps(described))


def of_another_class(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"DiT"', '"DiTT"'))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_an_unknown_key(folder: Path) -> None:
    configured(folder, dept=2)


def with_heads_that_do_not_divide(folder: Path) -> None:
    configured(folder, heads=3)


@pytest.mark.parametrize(
    ("damage", "quoted"),
    [
        (truncated, ["model.safetensors", "complete safetensors file"]),
        (of_another_size, ["[", "expected ["]),
        (without_a_tensor, ["missing tensor 'head.out.bias'"]),
        (with_one_more, ["unexpected tensor 'spare'"]),
        (with_nan, ["'head.out.bias'", "NaN"]),
        (pickled, ["model.safetensors", "complete safetensors file"]),
        (of_another_class, ["'DiTT'", "did you mean"]),
        (without_config, ["config.json", "No such file"]),
        (without_weights, ["no weights at", "model.safetensors"]),
        (with_an_unknown_key, ["'dept'", "did you mean 'depth'?"]),
        (with_heads_that_do_not_divide, ["width=16", "heads=3"]),
    ],
)
def test_a_damaged_model_folder_is_refused(
    damage: Callable[[Path], None], quoted: list[str], tmp_path: Path, out: Path, capsys: Capture
) -> None:
    folder = save_tiny(tmp_path / "damaged")
    damage(folder)
    line = complaint(capsys, "generate", folder, "--out", out)
    assert [part for part in quoted if part not in line] == []
    assert not out.exists()


@pytest.mark.parametrize(
    "command", [["generate"], ["compare", "--policy", "taylorseer"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("place", ["file", "below a file", "not a real folder"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(
    command: list[str],
    place: str,
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "ditkit.sample.sampler.GuidedDenoiser", lambda *_, **__: pytest.fail("work has started")
    )
    taken = tmp_path / "taken"
    taken.write_text("earlier")
    folder = {"file": taken, "below a file": taken / "out", "not a real folder": Path("/proc/ditkit")}[place]
    line = complaint(capsys, command[0], model, *command[1:], "--out", folder)
    assert "cannot write" in line and str(folder) in line
    assert taken.read_text() == "earlier"


def test_train_refuses_a_folder_without_pictures(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    line = complaint(capsys, "train", "emoji", "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert str(tmp_path / "empty") in line
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_train_gives_up_at_the_limit_of_damaged_files(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "bad.png").write_bytes(b"no image")
    words = ["train", "emoji", "--data", tmp_path / "set", "--out", tmp_path / "new" / "run"]
    line = complaint(capsys, *words, "--max-bad", "0")
    assert "max_bad=0" in line and "bad.png" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_earlier_results_survive_a_failure(model: Path, out: Path, capsys: Capture) -> None:
    assert main(["generate", str(model), "--steps", "2", "--seeds", "0", "--out", str(out)]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in files(out)}
    complaint(capsys, "generate", model, "--steps", "2", "--policy", "taylorseer:warmup=9", "--out", out)
    assert {path: path.read_bytes() for path in files(out)} == before and before


def test_an_interrupt_is_one_line(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ditkit.cli.generate.load_generator", interrupted)
    assert main(["generate", str(model)]) == 130
    assert capsys.readouterr().err == "ditkit: interrupted\n"


def test_an_interrupt_that_says_what_is_saved_names_the_command(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("the state of step 7 is saved in x y")

    monkeypatch.setattr("ditkit.cli.train.train_recipe", interrupted)
    words = ["train", "emoji", "--out", str(tmp_path / "x y")]
    said = f"the state of step 7 is saved in x y; go on with: ditkit train emoji --out '{tmp_path / 'x y'}'"
    for given in (words, [*words, "--resume"]):
        assert main(given) == 130
        assert capsys.readouterr().err == f"ditkit: interrupted; {said} --resume\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_keeps_its_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ditkit.cli.generate.load_generator", broken)
    with pytest.raises(ZeroDivisionError):
        main(["generate", str(model)])


@pytest.mark.parametrize(
    "words", [["--steps", "x"], ["--policy", "taylorseer:order=-1"]], ids=["of tyro's", "of ours"]
)
def test_a_process_of_its_own_ends_with_one_line_and_code_2(words: list[str], model: Path, out: Path) -> None:
    command = [sys.executable, "-m", "ditkit", "generate", str(model), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ditkit: error: ")
    assert not out.exists()
