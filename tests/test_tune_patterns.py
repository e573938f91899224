"""`ditkit tune` on attention patterns: settings that skip are rows, and those that do not are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import ditkit
from ditkit.cli.main import main
from ditkit.core.errors import ConfigError
from ditkit.evaluate.rows import Row
from ditkit.tasks.tune import Wish, error_db, tune
from models_for_tests import save_tiny, tiny_model
from test_tune import QUICK

NARROW, WIDE = (f"band:block=8,kernel=cpu,keep={keep}" for keep in (0.1, 0.6))
OFF = "Band(block=8, keep=0.1) met none of its sites .*; off 16 keys, dense attention is faster below 256"


def test_settings_of_a_pattern_are_compared() -> None:
    """The rows are those of `compare`; the wider of two bands is nearer to the exact run and computes more."""
    found = tune(tiny_model(), ["band:block=8,kernel=cpu,keep=0.1|0.6"], [0, 1], Wish(at_least_db=5), **QUICK)
    assert list(found.specs.values()) == [NARROW, WIDE]
    report = ditkit.compare(tiny_model(), [NARROW, WIDE], seeds=[0, 1], memory=False, **QUICK)
    exact: list[Row] = list(report.rows)
    assert [row.psnr_db for row in found.report.rows] == [row.psnr_db for row in exact]
    assert [row.macs for row in found.report.rows] == [row.macs for row in exact]
    narrow, wide = found.settings
    assert 0 < error_db(narrow) < error_db(wide) < 200
