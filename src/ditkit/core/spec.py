"""Values and components as text: `taylorseer:interval=4,order=2` is `TaylorSeer(interval=4, order=2)`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from ditkit.core.catalog import every, find
from ditkit.core.config import SCALARS, union_members
from ditkit.core.errors import ConfigError, unknown

T = TypeVar("T")

READERS: Mapping[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text],
    int: int,
    float: float,
    str: str,
    NoneType: lambda text: {"none": None}[text],
}
"""The reader of a scalar of each type; `SCALARS` has an error's words for it."""
PLUS = re.compile(r"(?<!\d[eE])\+")
"""The separator of a tuple's members, which is no exponent's sign."""


def component(base: type[T], spec: str) -> T:
    """Build the component that `spec` describes: a subclass of `base` by its name in any case, then its fields.

    Raises:
        ConfigError: an unknown name or field, a field given twice, a value of another type, or one that the
            component refuses.
    """
    name, _, rest = spec.partition(":")
    kind = find(base, name)
    known = {f.name: f for f in _fields(kind)}
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if not equals:
            raise ConfigError(f"{spec!r}: got {part!r}, expected field=value")
        if key not in known:
            raise ConfigError(f"{spec!r}: " + unknown(f"field of {kind.__name__}", key, known))
        if key in given:
            raise ConfigError(f"{spec!r}: {key} is given twice, expected once")
        given[key] = read_value(get_type_hints(kind)[key], text, f"{spec!r}: {key}={text!r}")
    missing = [key for key, f in known.items() if key not in given and _default(f) is MISSING]
    if missing:
        raise ConfigError(f"{spec!r}: {kind.__name__} needs {missing[0]}=..., which has no default")
    return kind(**given)


def components(name: str, base: type[T], given: T | str | Iterable[T | str]) -> tuple[T, ...]:
    """One component or several, each itself or as its text.

    Args:
        name: of the setting, for errors.

    Raises:
        ConfigError: something else, or a text that describes no component of `base`.
    """
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    found = [component(base, one) if isinstance(one, str) else one for one in several]
    for one in found:
        if not isinstance(one, base):
            raise ConfigError(f"{name}: got {one!r}, expected a {base.__name__} or its text")
    return tuple(found)


def named_alone(base: type[T]) -> list[str]:
    """Names of the components of `base` whose fields all have defaults, in lower case."""
    kinds = every(base)
    return [k.__name__.lower() for k in kinds if all(_default(f) is not MISSING for f in _fields(k))]


def spec(value: Any) -> str:
    """Return the text from which `component` makes an equal component; fields that have their default are left out.

    Raises:
        ConfigError: a field holds something that has no such text.
    """
    kind = type(value)
    held = {f.name: getattr(value, f.name) for f in _fields(kind) if getattr(value, f.name) != _default(f)}
    text = ",".join(f"{name}={_written(kind, name, given)}" for name, given in held.items())
    return kind.__name__.lower() + (f":{text}" if text else "")


def brief(value: Any) -> str:
    """Write a component for a reader, without the fields that have their default: `ClassifierFree(scale=2.0)`."""
    if not is_dataclass(value):
        return str(value)
    known = [f for f in fields(value) if f.repr and f.init]
    held = {f.name: getattr(value, f.name) for f in known if getattr(value, f.name) != _default(f)}
    inner = ", ".join(f"{name}={brief(x) if is_dataclass(x) else repr(x)}" for name, x in held.items())
    return type(value).__name__ + (f"({inner})" if inner else "")


def read_value(kind: Any, text: str, where: str, commas: bool = False) -> Any:
    """`text` as a value of the annotation `kind`: a scalar, a literal, a tuple as `12+20`, a union, or a component.

    A component inside another is given one field at most, since commas part the outer one's.

    Args:
        where: what an error quotes.
        commas: members of a tuple may stand between commas as well: `12,20`. Where there is one, a plus is a
            character: `a+b,` is one member.

    Raises:
        ConfigError: it is no such value, or no text can say one.
    """
    if _is_component(kind):
        return component(kind, text)
    members = union_members(kind)
    several = [member for member in members if get_origin(member) in (tuple, Sequence)]
    single = [member for member in members if member not in several]
    by_comma = commas and "," in text
    parts = text.removesuffix(",").split(",") if by_comma else PLUS.split(text)
    if several and (by_comma or len(parts) > 1 or not single or (single == [NoneType] and text != "none")):
        return _read_tuple(several[0], parts if text else [], where)
    if len(single) == 1 and get_origin(single[0]) is Literal:
        choices = {str(choice): choice for choice in get_args(single[0])}
        if text not in choices:
            raise ConfigError(f"{where}: " + unknown("value", text, choices))
        return choices[text]
    readable = [member for member in single if member in READERS]
    if not readable:
        raise ConfigError(f"{where}: a field of type {single[0]} cannot be given as text; set it in Python")
    for member in readable:
        try:
            return READERS[member](text)
        except (ValueError, KeyError):
            continue
    raise ConfigError(f"{where}, expected " + " or ".join(SCALARS[member] for member in readable))


def as_text(given: Any) -> str:
    """Write a scalar, or the members of a tuple, as `read_value` reads it."""
    if isinstance(given, tuple):
        return "+".join(map(as_text, given))
    return str(given).lower() if isinstance(given, bool | None) else str(given)


def _read_tuple(kind: Any, parts: Sequence[str], where: str) -> tuple[Any, ...]:
    """Read the members of a tuple; of one of fixed length, as many as it has."""
    kinds = get_args(kind)
    if len(kinds) == 1 or kinds[-1] is ...:
        kinds = kinds[:1] * len(parts)
    if len(kinds) != len(parts):
        raise ConfigError(f"{where}, expected {len(kinds)} values with + between them")
    return tuple(read_value(member, part, where) for member, part in zip(kinds, parts, strict=True))


def _is_component(kind: Any) -> bool:
    """Return whether a field holds a component, whose fields are text as well; a model is none."""
    return isinstance(kind, type) and hasattr(kind, "homes") and not issubclass(kind, nn.Module)


def _fields(kind: type) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.init]


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _written(kind: type, name: str, given: Any) -> str:
    annotation, where = get_type_hints(kind)[name], f"{kind.__name__}: {name}={given!r}"
    text = spec(given) if _is_component(annotation) else as_text(given)
    if "," in text or read_value(annotation, text, where) != given:
        raise ConfigError(f"{where} has no text that reads back as the same")
    return text
