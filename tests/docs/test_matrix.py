"""The README's table of families and methods says what the code does."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flux_support
import hosts_support
from ditkit.core.catalog import find
from ditkit.core.errors import DitkitError
from ditkit.core.policy import Policy
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.view import restore, view


def module_of(family: str) -> Any:
    return importlib.import_module(f"ditkit.hosts.{family.replace('-', '_')}")


def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "result_tables.py"
    spec = importlib.util.spec_from_file_location("result_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = tool()


def transformer(family: str) -> Any:
    if family == "flux":
        return flux_support.transformer()
    return hosts_support.EVERY[family].transformer()


@pytest.mark.parametrize("family", TABLES.FAMILIES)
def test_a_cell_says_whether_a_method_acts_on_the_family(family: str) -> None:
    viewed = view(transformer(family))
    sites = module_of(family).sites(viewed)
    for name in (name for group in TABLES.METHODS.values() for name in group):
        try:
            Trajectory(sites, [find(Policy, name)()], 10)  # type: ignore[type-abstract]
            acts = True
        except DitkitError:
            acts = False
        assert acts != ((family, name) in TABLES.REFUSED), name
    restore(viewed)


def test_every_family_has_a_row() -> None:
    kinds = {family.host for family in hosts_support.FAMILIES.values()}
    assert kinds == {hosts_support.EVERY[name].host for name in TABLES.FAMILIES}
