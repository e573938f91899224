"""Components as text: `taylorseer:interval=4,order=2` is `TaylorSeer(interval=4, order=2)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ditkit.core.catalog import every, find
from ditkit.core.errors import ConfigError, unknown

T = TypeVar("T")

SCALARS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text], "true or false"),
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "a text"),
    NoneType: (lambda text: {"none": None}[text], "none"),
}
"""How a field of each type is read, and what an error says was expected."""


def component(base: type[T], spec: str) -> T:
    """The component that `spec` describes: a subclass of `base` by its name in any case, then its fields.

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
        given[key] = _read(get_type_hints(kind)[key], text, f"{spec!r}: {key}")
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
    """The text from which `component` makes an equal component; fields that have their default are left out.

    Raises:
        ConfigError: a field holds something that has no such text.
    """
    kind = type(value)
    held = {f.name: getattr(value, f.name) for f in _fields(kind) if getattr(value, f.name) != _default(f)}
    text = ",".join(f"{name}={_written(kind, name, given)}" for name, given in held.items())
    return kind.__name__.lower() + (f":{text}" if text else "")


def _fields(kind: type) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.init]


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _read(kind: Any, text: str, where: str) -> Any:
    """`text` as a value of the annotation `kind`: a scalar, a literal, a union of these, or a tuple as `12+20`."""
    if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
        return tuple(_read(get_args(kind)[0], part, where) for part in text.split("+") if text)
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text not in choices:
            raise ConfigError(f"{where}: " + unknown("value", text, choices))
        return choices[text]
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    readers = [SCALARS[option] for option in options if option in SCALARS]
    if len(readers) < len(options):
        raise ConfigError(
            f"{where}={text!r}: a field of type {kind} cannot be given as text; set it in Python"
        )
    for read, _ in readers:
        try:
            return read(text)
        except (ValueError, KeyError):
            continue
    raise ConfigError(f"{where}={text!r}, expected " + " or ".join(expected for _, expected in readers))


def _written(kind: type, name: str, given: Any) -> str:
    text = "+".join(map(as_text, given)) if isinstance(given, tuple) else as_text(given)
    if "," in text or _read(get_type_hints(kind)[name], text, f"{kind.__name__}: {name}") != given:
        raise ConfigError(f"{kind.__name__}: {name}={given!r} has no text that reads back as the same")
    return text


def as_text(given: Any) -> str:
    """A scalar as `SCALARS` reads it."""
    return str(given).lower() if isinstance(given, bool | None) else str(given)
