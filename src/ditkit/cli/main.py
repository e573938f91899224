"""`ditkit`: finds the command, runs it, and turns what a user can cause into one line on stderr."""

from __future__ import annotations

import ast
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from ditkit.cli.parsing import Command, Group
from ditkit.core.errors import DitkitError

COMMANDS = (
    "generate",
    "train",
    "compress",
    "evaluate",
    "compare",
    "tune",
    "plan",
    "profile",
    "search",
    "harmonise",
    "experts",
    "video",
    "forecast",
    "satellite",
    "policies",
    "recipes",
    "data",
    "systems",
)
BAD_INPUT, INTERRUPTED = 2, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (by default the process's arguments) ask for; the exit code."""
    words = sys.argv[1:] if words is None else words
    silence_libraries()
    try:
        if list(words) == ["--version"]:
            import ditkit

            print(f"ditkit {ditkit.__version__}")
        else:
            ditkit_commands().resolve(words)()
    except DitkitError as error:
        print("ditkit: error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print("ditkit: interrupted" + resumable(stop, words), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def silence_libraries() -> None:
    """Keep to errors what other libraries log, such as missing kernels at import; a variable that is set wins."""
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def resumable(stop: KeyboardInterrupt, words: Sequence[str]) -> str:
    """Say what is saved and the command that goes on from it; nothing unless the interrupt says what is saved."""
    if not stop.args:
        return ""
    again = words if "--resume" in words else [*words, "--resume"]
    return f"; {stop}; go on with: {shlex.join(['ditkit', *again])}"


def ditkit_commands() -> Group:
    """Each command is the function of its own name in a module of its own name."""
    return Group(
        prog="ditkit",
        about="Diffusion transformers: faster, smaller or better, and what it cost.",
        members={name: partial(_command, name) for name in COMMANDS},
        summary=summary,
    )


def summary(name: str) -> str:
    """Read the first sentence about a command from its source: importing all of them takes seconds."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.keyword) and node.arg == "about" and isinstance(node.value, ast.Constant):
            return str(node.value.value).partition("\n")[0]
    return ""


def _command(name: str) -> Command | Group:
    found: Command | Group = getattr(import_module(f"ditkit.cli.{name}"), name)
    return found
