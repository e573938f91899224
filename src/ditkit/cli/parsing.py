"""From words to a call: tyro reads a function's signature, and what it refuses becomes one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ditkit.core.errors import ConfigError, nearest, unknown

Command = Callable[..., None]
HELP = ("-h", "--help")
WIDEST = 100
FRAME = re.compile(r"^[╭╰][^\n]*$|[│]", re.MULTILINE)
RULE = re.compile(r"^\s*─+\s*$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z0-9][\w.-]*")


@dataclass(frozen=True)
class Group:
    """Commands by name, each made when it is asked for.

    Args:
        prog: what is typed before a command's name. about: what the commands are.
        what: what a member is called in the list and in errors.
        summary: first sentence of a member by its name, for the list; by default members are made and asked.
        other: makes a command for a word that is no member's name, or nothing.
    """

    prog: str
    about: str
    members: Mapping[str, Callable[[], Command | Group]]
    what: str = "command"
    summary: Callable[[str], str] | None = None
    other: Callable[[str], Command | None] | None = None

    def resolve(self, words: Sequence[str]) -> Callable[[], None]:
        """Return the call that `words` ask for; help is a call as well.

        Raises:
            ConfigError: an unknown command or flag, a missing or malformed value.
        """
        if not words or words[0] in HELP:
            return self.help
        name, rest = words[0], words[1:]
        if name not in self.members:
            if self.other is not None and (command := self.other(name)) is not None:
                return parse(command, f"{self.prog} {name}", rest)
            raise ConfigError(f"{unknown(self.what, name, self.members)}; see {self.prog} --help")
        member = self.members[name]()
        if isinstance(member, Group):
            return member.resolve(rest)
        return parse(member, f"{self.prog} {name}", rest)

    def help(self) -> None:
        """Print the members with the first line of what each says of itself."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, make in self.members.items():
            table.add_row(f"  {name}", _summary(make) if self.summary is None else self.summary(name))
        console = Console(highlight=False)
        one = f"{self.prog} {self.what.upper()}"
        console.print(f"usage: {one} ...\n\n{self.about}\n\n{self.what}s:", markup=False)
        console.print(table)
        console.print(f"\n{one} --help explains one of them.", markup=False)


def parse(command: Command, prog: str, words: Sequence[str]) -> Callable[[], None]:
    """`command` bound to the arguments in `words`, not yet called; with `--help`, prints it and exits.

    Raises:
        ConfigError: in one line, what tyro says in a box.
    """

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    import tyro  # the list of commands does without

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            call, left = tyro.cli(
                bound,
                prog=prog,
                description=_description(command),
                args=list(words),
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{one_line(stderr.getvalue())}; see {prog} --help") from None
    if left:
        raise ConfigError(f"{_not_understood(left[0], command, prog)}; see {prog} --help")
    return call


def _summary(make: Callable[[], Command | Group]) -> str:
    member = make()
    about = member.about if isinstance(member, Group) else inspect.getdoc(member) or ""
    return about.partition("\n")[0]


def one_line(box: str) -> str:
    """Return the text of tyro's error box, up to its first rule."""
    text = RULE.split(FRAME.sub("", box))[0]
    return " ".join(text.split()).rstrip(".") or "the arguments are not understood"


def _description(command: Command) -> str:
    """Return the docstring without its arguments, which tyro shows at their flags.

    tyro joins a paragraph's lines and does not wrap them, but leaves those that start with a space.
    """
    paragraphs = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0].split("\n\n")
    width = min(shutil.get_terminal_size().columns, WIDEST)
    wrapped = [p if "\n " in p else textwrap.fill(p, width, subsequent_indent="  ") for p in paragraphs]
    return "\n\n".join(wrapped)


def _not_understood(word: str, command: Command, prog: str) -> str:
    if not word.startswith("-"):
        return f"got {word!r}, expected no further argument"
    return f"unknown flag {word!r}{nearest(word, _flags(command, prog))}"


def _flags(command: Command, prog: str) -> list[str]:
    """Every flag that the help of `command` names."""
    import tyro

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(command, prog=prog, description="", args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    return sorted(set(FLAG.findall(shown.getvalue())))
