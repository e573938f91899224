"""The command line on what people type and where they print (found.md, cases 9, 10, 26, 28, 31 to 34)."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.markup import MarkupError

import ditkit
from cli_support import Capture, complaint, exit_code, output
from ditkit.api.compare import shown
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli.main import COMMANDS
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.terminal import Table, progress
from ditkit.data.progress import tracked
from ditkit.models.dit import DiT
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig
from ditkit.report.report import Report
from ditkit.train.ema import Constant, Power
from ditkit.train.record import check_start
from ditkit.train.settings import Settings
from models_support import save_tiny, tiny_model

MARKUP = "[/x] [bold]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_found_9_a_table_prints_itself() -> None:
    table = Table(title="rows")
    table.add_column("method")
    table.add_row("exact")
    assert "rows" in str(table) and "exact" in str(table) and "object at" not in str(table)


@pytest.fixture(scope="module")
def compared() -> tuple[Report, str]:
    """A comparison in Python, and what a terminal showed meanwhile."""
    terminal = Terminal()
    settings: dict[str, Any] = {"steps": 6, "guidance": 1.0, "seeds": [0], "memory": False, "control": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        report = ditkit.compare(
            tiny_model().eval(),
            policies=[TaylorSeer(interval=3, order=1)],
            rounds=1,
            converged_steps=7,
            **settings,
        )
    return report, terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_found_9_the_last_snippet_of_the_readme_prints_a_table(compared: tuple[Report, str]) -> None:
    report, _ = compared
    assert "exact" in str(report.table()) and "TaylorSeer" in str(report.table())
    assert str(report) == str(report.table())


def test_found_26_a_comparison_in_python_shows_a_bar_on_a_terminal(compared: tuple[Report, str]) -> None:
    assert "timing" in compared[1] or "counting" in compared[1]
    with shown(False) as nobody:
        assert nobody is None


def test_found_26_the_list_of_commands_makes_none_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"the list imported {name}")

    monkeypatch.setattr("ditkit.cli.main.import_module", refuse)
    assert all(name in output(capsys, "--help") for name in COMMANDS)


def test_found_34_a_report_is_replaced_whole_or_not_at_all(
    compared: tuple[Report, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the last of its files."""
    report, _ = compared
    old = {path.name: path.read_bytes() for path in report.save(tmp_path)}
    times = []

    def full(path: Path) -> None:
        times.append(path)
        if len(times) == len(old):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditkit.report.report.to_disk", full)
    changed = replace(report, settings={**report.settings, "rounds": 99})
    with pytest.raises(ConfigError, match="No space left on device"):
        changed.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_found_10_the_record_of_what_was_drawn_is_whole(model: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("--policy", "taylorseer", "--steps", 6, "--seeds", 0, "--guidance", 1)
    output(capsys, "generate", model, *words, "--out", tmp_path)
    record = json.loads((tmp_path / "generated.json").read_text())
    assert record["settings"]["policies"] == ["taylorseer"]
    (fields,) = record["settings"]["policy_fields"]
    assert fields == {
        "class": "TaylorSeer",
        "interval": 4,
        "order": 2,
        "warmup": 2,
        "axis": "call",
        "basis": "taylor",
    }
    assert {"date", "device", "versions", "command"} <= record["origin"].keys()
    assert record["origin"]["versions"]["ditkit"] == ditkit.__version__


NOT_UTF8 = "caf\udce9"


@pytest.mark.parametrize("flag", ["--out", "--data"])
def test_found_31_a_name_that_no_report_can_hold_is_refused_at_the_start(flag: str, capsys: Capture) -> None:
    line = complaint(capsys, "compare", "emoji", "--policy", "taylorseer", flag, NOT_UTF8)
    assert r"got 'caf\udce9', which is no text in UTF-8" in line


def test_found_31_an_accent_is_shown_with_a_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = replace(
        tiny_model().config, class_names=("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "b", "c"), classes=3
    )
    DiT(named).save(tmp_path)
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert exit_code("generate", tmp_path, "--list-labels") == 0
    assert written.getvalue().decode().splitlines()[0] == "caf?"


LARGE = "9" * 5000
TOO_LARGE = [
    (["generate", "{m}", "--steps", "99999999999999999999"], "steps="),
    (["generate", "{m}", "--steps", "10000000000"], "steps=10000000000 should be at most 1000000"),
    (["generate", "{m}", "--steps", LARGE], "--steps"),
    (["generate", "{m}", "--batch-size", "9" * 20], "batch_size="),
    (["generate", "{m}", "--seeds", "0..99999999999"], "expected at most 1,000,000 of them"),
    (["generate", "{m}", "--seeds", LARGE], "expected whole numbers up to"),
    (["compare", "{m}", "--policy", "taylorseer", "--converged-steps", "9" * 20], "converged_steps="),
    (["plan", "--policy", "grouped", "--grid", "100000x100000"], "expected at most 4,194,304"),
    (["plan", "--policy", "grouped", "--grid", f"4x{LARGE}"], "expected positive sides"),
    (["plan", "--policy", "grouped", "--grid", "8x8", "--text", "9" * 20], "--text="),
    (["evaluate", "{m}", "--data", "fashion", "--count", "9" * 20], "count="),
    (["video", "{m}", "--count", "9" * 20], ""),
    (["train", "fashion-dit", "--steps", "9" * 20, "--dry-run"], "steps="),
    (["train", "fashion-dit", "--steps", "10000000000", "--dry-run"], "steps=10000000000 should be at most"),
]


@pytest.mark.parametrize(("words", "message"), TOO_LARGE, ids=lambda given: str(given)[:40])
def test_found_32_numbers_too_large_are_refused_in_a_line(
    words: list[str], message: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    line = complaint(capsys, *(word.format(m=model) for word in words), "--out", tmp_path / "out.png")
    assert message in line and len(line) < 600
    assert not list(tmp_path.iterdir())


def test_found_33_markup_in_peoples_texts_is_no_markup() -> None:
    """rich itself reads it, and fails."""
    shown = Console(file=io.StringIO(), width=80)
    with pytest.raises(MarkupError):
        shown.print(MARKUP)
    table = Table(MARKUP, title=MARKUP, caption=MARKUP)
    table.add_column(MARKUP)
    table.add_row(MARKUP, MARKUP)
    shown.print(table)
    assert str(table).count(MARKUP) == 6
    assert list(tracked([1, 2], MARKUP)) == [1, 2]
    with progress() as advance:
        advance(MARKUP, 1, 2)


def test_found_33_markup_among_the_words_of_a_command(model: Path, capsys: Capture) -> None:
    for words in (["--steps", "[/x]"], ["--label", "[/x]"], ["[/x]"], ["--policy", "[/x]"]):
        assert "[/x]" in complaint(capsys, "generate", model, *words)


def test_found_33_bars_on_a_terminal_take_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress() as advance:
        advance(MARKUP, 1, 2)
    assert list(tracked([1, 2], MARKUP)) == [1, 2]
    assert MARKUP in terminal.getvalue()


class Gone(io.StringIO):
    """A stream whose reader has gone, or whose disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("command", ["systems", "recipes"])
def test_found_34_a_reader_that_has_seen_enough_is_no_error(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", Gone(BrokenPipeError(32, "Broken pipe")))
    assert exit_code(command) == 0


def test_found_34_a_full_disk_under_the_output_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.stdout", Gone(OSError(28, "No space left on device")))
    assert exit_code("--version") == 2
    assert capsys.readouterr().err == "ditkit: error: cannot use the output: No space left on device\n"


def test_found_34_an_interrupt_of_the_imports_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from ditkit.__main__ import main

    class Stopped:
        def find_spec(self, name: str, *args: Any) -> None:
            if name == "ditkit.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ditkit.cli.main")
    monkeypatch.setattr("sys.meta_path", [Stopped(), *sys.meta_path])
    assert main() == 130 and capsys.readouterr().err == "ditkit: interrupted\n"


@pytest.mark.parametrize("words", [("--out", ""), ("--out=",)])
def test_found_34_an_empty_place_is_refused(words: tuple[str, ...], capsys: Capture) -> None:
    assert "--out '', expected a place to write to" in complaint(capsys, "generate", "emoji", *words)


def test_found_34_snapshots_without_a_power_average_are_refused() -> None:
    with pytest.raises(ConfigError, match="snapshot_every=5 keeps power-function averages"):
        Settings(snapshot_every=5, averages=(Constant(),))
    assert Settings(snapshot_every=5, averages=(Constant(), Power(0.1))).snapshot_every == 5


def test_found_34_a_fresh_run_replaces_no_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    with pytest.raises(ConfigError, match="already holds a model, which the run would replace"):
        check_start(tmp_path)


def test_found_34_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    from ditkit.core.checkpoint import write_json

    old, fresh, own = (tmp_path / f".a.json.{name}" for name in ("abcd_123", "abcd_124", "mybackup"))
    for path, mode in ((old, 0o600), (fresh, 0o600), (own, 0o644)):
        path.touch()
        path.chmod(mode)
    for path in (old, own):
        os.utime(path, (0, 0))
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", fresh.name, own.name}


def test_found_34_what_conditions_a_model_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"Cond\.label: got ndarray, expected a torch\.Tensor"):
        Cond(label=torch.zeros(1).numpy())
    with pytest.raises(ConfigError, match=r"Cond\.streams\.audio: got list"):
        Cond(streams={"audio": [1]})  # type: ignore[dict-item]
    model = tiny_model().eval()
    for shape in ((3, 8.5, 8), (3, "8", 8), 8, (3, -8, 8)):
        with pytest.raises(DitkitError, match="shape"):
            ditkit.generate(model, shape=shape)  # type: ignore[arg-type]


def test_found_28_a_config_of_a_million_classes_costs_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The letters of their names follow from the config, and are spelled when they are read."""
    config = SmallFluxConfig.tiny()
    SmallFlux(config).save(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())

    def refuse(*args: Any) -> Any:
        raise AssertionError("a loaded config spelled its classes")

    monkeypatch.setattr("ditkit.nn.toy_text_encoder.encode_letters", refuse)
    for name, value, quoted in (
        ("classes", 10**6, "another config"),
        ("letters", 10**7, "letters=10000000 should be at most 10000"),
        ("single_depth", 3000, "single_depth=3000 should be at most 1000"),
    ):
        changed = {**record, "config": {**record["config"], name: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(DitkitError, match=quoted):
            ditkit.load(tmp_path)
