"""A new backbone or cache is one file: the contract tests and the command line find it where it is put."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ditkit.core.errors import ConfigError
from ditkit.models import VDTConfig
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.settings import Settings

TESTS = Path(__file__).parents[1]
COMMAND = """
import sys, toys
toys.pytest_configure()
from ditkit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *words],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("contract", "toy"),
    [("models/test_backbone_contract.py", "ToyMixer"), ("core/test_policy_contract.py", "EveryOther")],
)
def test_the_contract_tests_find_a_file_and_it_passes(contract: str, toy: str) -> None:
    ran = run("-m", "pytest", "-p", "toys", f"tests/{contract}", "-k", toy, "-p", "no:cacheprovider", "-v")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) > 20


def test_the_fields_of_a_config_are_flags_of_its_recipe(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / kind / "0.png")
    train = ("-c", COMMAND, "train", "toy-mixer", "--data", str(tmp_path))
    ran = run(*train, "--dry-run", "--width", "32", "--depth", "2")
    assert ran.returncode == 0, ran.stderr
    shown = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if line.startswith("model."))
    assert (shown["model.width"], shown["model.depth"], shown["model.classes"]) == ("32", "2", "2")
    helps = " ".join(run(*train, "--help").stdout.replace("│", " ").split())
    assert "Side of a token. At least 1. (default: 4)" in helps
    assert "--classes" not in helps and "--channels" not in helps
    refused = run(*train, "--dry-run", "--width", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "ditkit: error: ToyMixer: width=0 should be at least 1\n"


def test_a_recipe_takes_any_config_of_its_task() -> None:
    with pytest.raises(
        ConfigError,
        match="model=VDTConfig is of task 'video', expected 'image': DiCo, DiMR, DiT, DiTDH, LaMamba, PTDiT, Small",
    ):
        ClassImageRecipe(data="emoji", model=VDTConfig.tiny(), settings=Settings())
