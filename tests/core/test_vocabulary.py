"""The words of the code: openings that a docstring may not have, and identifiers that only their author could read.

Ruff holds the rest (D205, D400, D401 in pyproject.toml): a first line that is a sentence, in the imperative for
a function.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ditkit

PACKAGE = Path(ditkit.__file__).parent
OPENINGS = re.compile(r"(What|Which|Where|How|Those|Of)\b")
# Each was the name of something that the field has a word for; CONTRIBUTING.md says what to take instead
BANNED = frozenset(
    [
        "asked",
        "chance",
        "climbed",
        "heard",
        "lacks",
        "made",
        "passage",
        "said",
        "seat",
        "seated",
        "seen",
        "told",
        "took",
        "way",
        "ways",
        "wish",
        "worth",
        "wound",
    ]
)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each docstring of `tree`, those below fields and constants included."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(ast.Constant(str(text))):
                yield node.lineno, text.strip()


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and name of all that `tree` defines: classes, functions, arguments, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def faults(text: str) -> list[str]:
    """List the lines of `text` that open a docstring with a banned word, or define a banned name."""
    tree = ast.parse(text)
    opened = [f"{line}: {words.splitlines()[0]}" for line, words in docstrings(tree) if OPENINGS.match(words)]
    return opened + [
        f"{line}: {name}" for line, name in identifiers(tree) if name.strip("_").lower() in BANNED
    ]


def test_the_words_are_those_of_the_field() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{fault}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for fault in faults(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        '"""What a module holds."""',
        'def f():\n    """Those of the model."""',
        'class A:\n    x: int = 0\n    """Of a site."""',
        "class Wish:\n    pass",
        "def f(told):\n    pass",
        "self._seen = 1",
        "for way in range(2):\n    pass",
    ],
)
def test_banned_words_are_found(text: str) -> None:
    assert len(faults(text)) == 1


@pytest.mark.parametrize("text", ['"""Whatever a module holds."""', "unseen = waypoints = 1", "x = 'told'"])
def test_other_words_are_not(text: str) -> None:
    assert faults(text) == []
