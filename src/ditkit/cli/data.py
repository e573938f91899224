"""`ditkit data`: the named data sets, and what each needs on this machine."""

from __future__ import annotations

import importlib
import inspect
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data import loading

SetName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


def data(name: SetName = "") -> None:
    """List the named data sets; or show one: its options, and whether it is on this machine.

    --data also takes your own: a folder of pictures, videos or GeoTIFFs, or a .csv, .nc or .parquet file.

    Examples:
        ditkit data
        ditkit data emoji

    Args:
        name: One set: show its options and size, or the command that fetches it.
    """
    if name:
        if name not in loading.names():
            raise ConfigError(unknown("data set", name, loading.names()))
        shown(name)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("set", style="bold", no_wrap=True)
    table.add_column("holds", no_wrap=True)
    table.add_column("from")
    for kind in sorted(set(loading.KINDS.values())):
        for one in loading.names_of(kind):
            table.add_row(one, kind, escape(_about(one).partition("\n")[0]))
    Console(highlight=False).print(table)
    print("\nditkit data NAME shows the options of one, and the command that fetches it")


def shown(name: str) -> None:
    """Print what a set is, its options, and its size or the command that fetches it."""
    console = Console(highlight=False)
    console.print(escape(_about(name)))
    load = importlib.import_module(f"{loading.SETS}.{name.replace('-', '_')}").load
    for option, parameter in inspect.signature(load).parameters.items():
        if option != "size":
            default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"
            print(f"  --option {option}{default}")
    try:
        held = loading.load(name)
    except (DataError, ConfigError) as missing:
        print(f"not on this machine: {missing}")
        return
    print(f"on this machine: {len(held)} samples")


def _about(name: str) -> str:
    module = importlib.import_module(f"{loading.SETS}.{name.replace('-', '_')}")
    return inspect.getdoc(module) or ""
