"""`ditkit`: finds the command, runs it, and turns what a user can cause into one line on stderr."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from ditkit.cli.parsing import Command, Group
from ditkit.core.errors import ConfigError, DitkitError

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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""The errors of a stream that takes no more."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (by default the process's arguments) ask for; the exit code."""
    words = sys.argv[1:] if words is None else words
    silence_libraries()
    show_what_can_be_shown()
    try:
        check_words(words)
        if list(words) == ["--version"]:
            import ditkit

            print(f"ditkit {ditkit.__version__}")
        else:
            ditkit_commands().resolve(words)()
        sys.stdout.flush()  # or a reader that has gone, or a full disk, is met when nobody listens
    except DitkitError as error:
        return complain(str(error))
    except KeyboardInterrupt as stop:
        print("ditkit: interrupted" + resumable(stop, words), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        drop_output()
        return 0
    except (OSError, MemoryError) as error:
        return complain(refusal(error))
    except SystemExit as stop:
        gone = isinstance(stop.__context__, BrokenPipeError)  # rich leaves with 1 where a reader has gone
        return stop.code if isinstance(stop.code, int) and not gone else 0
    return 0


def complain(message: str) -> int:
    """Print one line on stderr; the exit code."""
    print("ditkit: error: " + " ".join(message.splitlines()), file=sys.stderr)
    return BAD_INPUT


def refusal(error: OSError | MemoryError) -> str:
    """Say what the system refused, where no command said it better."""
    if isinstance(error, MemoryError):
        return " ".join(["more memory is needed than there is", str(error)]).strip()
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"cannot use {error.filename}: {reason}"
    if error.errno not in FULL:
        return f"the system refuses: {reason}"
    drop_output()
    return f"cannot use the output: {reason}"


def check_words(words: Sequence[str]) -> None:
    """Refuse words whose bytes are no text: a report, which quotes them, could not be written at the end.

    Raises:
        ConfigError: there is one, or --out is given nothing.
    """
    for place, word in enumerate(words):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"got {word!a}, which is no text in UTF-8; expected another name") from None
        if word == "--out=" or (word == "--out" and list(words[place + 1 : place + 2]) == [""]):
            raise ConfigError("--out '', expected a place to write to; the current folder is .")


def show_what_can_be_shown() -> None:
    """Print with replacements what the terminal has no letters for, such as an accented class on an ASCII one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Lead what is still to be printed into nothing: nobody reads it, or there is no room for it."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
