"""The flags --device and --dtype, the same for every command that loads a model."""

from __future__ import annotations

import functools
import inspect
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from ditkit.cli.parsing import Command
from ditkit.core.devices import placed

Device = Annotated[str, tyro.conf.arg(metavar="DEVICE")]
Dtype = Literal["float32", "bfloat16", "float16"]
DEVICE, DTYPE = "auto", "float32"
HELP = {
    "device": "cpu, cuda, cuda:1, mps, or auto, the best that this machine has.",
    "dtype": "Type of weights and samples.",
}


def on_device(command: Command) -> Command:
    """Give a command the flags --device and --dtype: inside, models are loaded there and so."""

    @functools.wraps(command)
    def with_placement(*args: Any, device: str = DEVICE, dtype: str = DTYPE, **kwargs: Any) -> None:
        with placed(device, dtype):
            command(*args, **kwargs)

    hints = {**get_type_hints(command, include_extras=True), "device": Device, "dtype": Dtype}
    defaults = {"device": DEVICE, "dtype": DTYPE}
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
    ]
    known = [*inspect.signature(command).parameters.values(), *flags]
    described: Any = with_placement
    described.__signature__ = inspect.Signature([p.replace(annotation=hints[p.name]) for p in known])
    described.__annotations__ = hints
    described.__doc__ = _with_flags(inspect.getdoc(command) or "")
    del described.__wrapped__  # tyro would read the flags of the bare command
    return with_placement


def _with_flags(doc: str) -> str:
    """Add the flags to the arguments of a docstring."""
    lines = [f"    {name}: {text}" for name, text in HELP.items()]
    head, args, after = doc.partition("\n\nArgs:\n")
    own, gap, rest = after.partition("\n\n")
    return "\n".join([f"{head}\n\nArgs:", *([own.rstrip()] if args else []), *lines]) + gap + rest
