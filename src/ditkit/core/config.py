"""Frozen dataclasses from JSON: nothing unknown, nothing missing, every value of the field's own type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from reprlib import repr as short
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ditkit.core.errors import CheckpointError, DitkitError, nearest, unknown

C = TypeVar("C")


def config_of(kind: type[C], given: object, source: object) -> C:
    """A `kind` with the values of a JSON object: numbers, strings, literals, tuples and dataclasses.

    Args:
        source: what the errors name, such as the file that `given` was read from.

    Raises:
        CheckpointError: an unknown or missing key, a value of another type, or one that `kind` refuses.
    """
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: {kind.__name__} should be an object, not {short(given)}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise CheckpointError(f"{source}: " + unknown("config key", key, known))
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise CheckpointError(f"{source}: missing config key {name!r}{nearest(name, given)}")
    values = {name: _value(hints[name], value, f"{source}: {name}") for name, value in given.items()}
    try:
        return kind(**values)
    except (DitkitError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _value(kind: Any, given: Any, where: str) -> Any:
    """`given` as a `kind`: JSON has neither tuples nor dataclasses, and may write 1.0 as 1."""
    if get_origin(kind) is UnionType:  # one number or a tuple of them: JSON tells them apart
        kind = next((k for k in get_args(kind) if (get_origin(k) is tuple) == isinstance(given, list)), kind)
    if is_dataclass(kind):
        return config_of(kind, given, where)  # type: ignore[arg-type]
    if get_origin(kind) is Literal and isinstance(given, str):
        if given in get_args(kind):
            return given
        raise CheckpointError(f"{where}: " + unknown("value", given, get_args(kind)))
    if get_origin(kind) is tuple and isinstance(given, list):
        return _tuple(get_args(kind), given, where)
    if type(given) is kind or (kind is float and type(given) is int):
        return given
    expected = kind.__name__ if isinstance(kind, type) else kind
    raise CheckpointError(f"{where}={short(given)} should be of type {expected}")


def _tuple(kinds: tuple[Any, ...], given: list[Any], where: str) -> tuple[Any, ...]:
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(given)
    if len(kinds) != len(given):
        raise CheckpointError(f"{where}={short(given)} should hold {len(kinds)} values")
    return tuple(
        _value(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, given, strict=True))
    )
