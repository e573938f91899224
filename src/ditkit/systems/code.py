"""Digests of code: by which a result notices that it was measured on other code than is there now."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from ditkit.core.errors import ConfigError


def component_digests(components: Sequence[str]) -> dict[str, str]:
    """Return, for each `ditkit.module:Name`, the digest of the module that defines it.

    Raises:
        ConfigError: a module that does not exist, or is not Python.
    """
    return {component: file_digest(_source(component)) for component in components}


def file_digest(path: Path) -> str:
    """Return the digest of a Python file, the first 16 hexadecimal digits of SHA-256.

    It is taken of the syntax tree without docstrings and imports: comments, layout, prose and a move of this or
    another module leave it as it is, a change of any other statement does not. It is the same on every version of
    Python that reads the file.

    Raises:
        ConfigError: the file cannot be read, or is not Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"cannot take the digest of {path.name}: {error}") from None
    return hashlib.sha256("\n".join(_lines(tree)).encode()).hexdigest()[:16]


def _source(component: str) -> Path:
    module = component.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"component {component!r} does not import: {error}") from None
    if spec is None or spec.origin is None:
        raise ConfigError(f"component {component!r} does not import: no module {module}")
    return Path(spec.origin)


def _lines(node: object, depth: int = 0) -> Iterator[str]:
    """Yield the lines of a tree, without its empty fields: those differ between versions of Python."""
    indent = " " * depth
    if isinstance(node, ast.Constant):
        yield f"{indent}{type(node.value).__name__} {node.value!r}"
    elif isinstance(node, ast.AST):
        yield f"{indent}{type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if value is None or value == []:
                continue
            yield f"{indent} .{name}"
            yield from _lines(_statements(value) if name == "body" else value, depth + 2)
    elif isinstance(node, list):
        for item in node:
            yield from _lines(item, depth)
    else:
        yield f"{indent}{node!r}"


def _statements(body: object) -> object:
    """Return a body without imports and without strings that stand alone, docstrings first of all."""
    if not isinstance(body, list):
        return body  # of a lambda or a conditional expression
    return [statement for statement in body if not _is_prose(statement)]


def _is_prose(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return True
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
