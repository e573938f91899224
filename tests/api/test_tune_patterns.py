"""`ditkit tune` on attention patterns: settings that skip are rows, and those that are switched off are said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_tune import QUICK, Capture

from ditkit.api.tune import Target, error_db, tune
from ditkit.cli.main import main
from ditkit.core.errors import NoEffectError
from models_support import save_tiny, tiny_model

OFF = "off 16 keys, dense attention is faster below 256"


def test_settings_that_skip_are_rows_and_the_others_are_named() -> None:
    """The wider of two bands is nearer to the exact run and computes more; "auto" leaves 16 tokens alone."""
    given = "band:block=8,kernel=cpu|auto,keep=0.1|0.6"
    found = tune(tiny_model(), [given], Target(at_least_db=5), seeds=[0, 1], **QUICK)
    narrow, wide = found.settings
    names = [f"band:block=8,kernel=cpu,keep={keep}" for keep in (0.1, 0.6)]
    assert [found.specs[row.name] for row in (narrow, wide)] == names
    assert error_db(narrow) + 3 < error_db(wide) and not wide.identical
    assert 0.9 < narrow.macs_ratio < wide.macs_ratio <= 1
    left_out = found.report.settings["left_out"]
    assert all(
        OFF in line and f"keep={keep}" in line for line, keep in zip(left_out, (0.1, 0.6), strict=True)
    )


def test_nothing_but_switched_off_settings_is_refused() -> None:
    with pytest.raises(NoEffectError, match=OFF):
        tune(tiny_model(), ["band:block=8,keep=0.1|0.6"], Target(at_least_db=5), **QUICK)


def test_the_command(tmp_path: Path, capsys: Capture) -> None:
    model, out = save_tiny(tmp_path / "model"), tmp_path / "tune"
    flags = ["--at-most", "0.5", "--steps", "4", "--converged-steps", "5", "--rounds", "1", "--seeds", "0"]
    words = ["tune", str(model), *flags, "--out", str(out), "--policy"]
    assert main([*words, "grouped:block=8,kernel=cpu,group=2+4,reach=0|-1"]) == 2
    streams = capsys.readouterr()
    assert "reach=-1 should be at least 0" in streams.err and len(streams.err.splitlines()) == 1
    assert not out.exists()
    assert main([*words, "grouped:block=8,kernel=cpu|auto,group=2+4,reach=0"]) == 0
    (left_out,) = (saved := json.loads((out / "tune.json").read_text()))["settings"]["left_out"]
    assert left_out.endswith(OFF) and f"No row: {left_out}" in " ".join(capsys.readouterr().out.split())
    assert [row["name"] for row in saved["rows"]] == [
        "exact",
        "Grouped block=8 kernel=cpu reach=0 group=(2, 4)",
    ]
