"""Flags from a config: a field of its own type each, with its line of `Args:` and its bounds for help."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, make_dataclass, replace
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from ditkit.core.config import limits_of, union_members

C = TypeVar("C")


def flags_of(config: Any) -> Any:
    """Make a dataclass of the fields of `config` that have flags, with its values: a default of tyro's arguments.

    A field has none where the data decide it, and where it is a dataclass of its own, such as a convention.
    """
    kind, hints = type(config), get_type_hints(type(config), include_extras=True)
    helps = _helps(kind)
    names = [
        f.name for f in fields(kind) if not f.metadata.get("from_data") and not is_dataclass(hints[f.name])
    ]
    flags = make_dataclass(
        kind.__name__,
        [(name, Annotated[hints[name], tyro.conf.arg(help=_help(helps, name, hints))]) for name in names],
        frozen=True,
    )
    return flags(**{name: getattr(config, name) for name in names})


def with_flags(config: C, flags: Any, **others: Any) -> C:
    """`config` with the values of `flags`, which `flags_of` one of its kind made, and of `others`."""
    return replace(config, **{**vars(flags), **others})  # type: ignore[type-var]


def _helps(kind: type) -> dict[str, str]:
    """Read the lines of `Args:` of a docstring by field, of bases too; one line may be for several."""
    docs = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in reversed(kind.__mro__)]
    params = [param for doc in docs for param in docstring_parser.parse(doc).params]
    return {
        name: " ".join((param.description or "").split())
        for param in params
        for name in param.arg_name.split(", ")
    }


def _help(helps: dict[str, str], name: str, hints: dict[str, Any]) -> str:
    """Return the docstring's help of a field, and its bounds, as sentences."""
    texts = helps.get(name, "").rstrip("."), limits_of(union_members(hints[name])[0])
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in texts if text)
