"""Frozen dataclasses that declare their constraints: checked when one is made, read from JSON, shown by `--help`.

A field says in its annotation what it may hold: `Annotated[int, Ge(1)]`, `Literal["call", "sigma"]`, `Share`, or
tuples and unions of these; the bounds are those of the package annotated-types. `__post_init__` keeps what joins
several fields.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from inspect import get_annotations
from numbers import Integral, Real
from reprlib import repr as short
from types import MappingProxyType, NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    SupportsIndex,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MaxLen, MinLen

from ditkit.core.condition import Condition
from ditkit.core.errors import CheckpointError, ConfigError, DitkitError, ShapeError, nearest, unknown

C = TypeVar("C")

LARGEST = 2**31 - 1
"""The largest whole number of a field that does not say less: what counts steps, samples or bytes beyond is a slip."""
WIDEST = 2**63 - 1
"""The largest whole number that a tensor holds."""
Count = Annotated[int, Interval(ge=1, le=LARGEST)]
Natural = Annotated[int, Interval(ge=0, le=WIDEST)]
MOST_STEPS = 1_000_000
"""Steps of one trajectory, each of which has its place in tables that are made before the first."""
MOST_SAMPLES = 1_000_000
"""Samples that one call draws, each of which has its seed in a list."""
Share = Annotated[float, Interval(ge=0, lt=1)]
"""A part of a whole that leaves something, such as a dropout."""
Fraction = Annotated[float, Interval(ge=0, le=1)]
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
DEEPEST = 1000
Depth = Annotated[int, Interval(ge=1, le=DEEPEST)]
"""Blocks are built one by one before any weights are read: a damaged config must not keep a machine busy."""

FROM_DATA: Mapping[str, Any] = MappingProxyType({"from_data": True})
"""Metadata of a config's field that the data decide: `field(default=4, metadata=FROM_DATA)`. It has no flag."""

SCALARS: Mapping[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    NoneType: "none",
}
"""Types of fields that are checked, and read from text, with an error's words for them."""
SEVERAL = {int: "integers", float: "numbers", str: "texts", bool: "of true and false"}


class Checked:
    """Base of dataclasses whose fields hold what their annotations declare.

    Raises:
        ConfigError: when one is made whose field is of another type or out of its bounds.
    """

    def __post_init__(self) -> None:
        check_fields(self)


class ModelConfig(Checked, ABC):
    """Base of the configs of networks.

    A field that the data decide is marked with FROM_DATA; every other one that text can say is a flag of `ditkit
    train`, with its line of `Args:` for help.
    """

    task: ClassVar[str]
    """The task that the network is for: a folder of `ditkit.tasks`."""

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """List by name the conditions of the network, fields of `Cond` and streams; given content is apart.

        By default what `classes`, `text_width` and `label_dropout` say.
        """
        dropout, found = getattr(self, "label_dropout", 0.0), {}
        if getattr(self, "classes", 0):
            found["label"] = Condition((), dropout)
        if width := getattr(self, "text_width", 0):
            found["text"] = Condition((None, width), dropout)
        return found

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """Return the config of a network that a test runs in milliseconds and that has all its kinds of parts."""


def network(config: object) -> str:
    """Return the name of the network that a config is of; of anything else, that of its class."""
    return type(config).__name__.removesuffix("Config")


def check_fields(config: Any, name: str = "") -> None:
    """Check every field of a dataclass against its annotation; NumPy's numbers become Python's.

    Args:
        name: what an error calls the dataclass; its class if empty.

    Raises:
        ConfigError: a field holds something else than its annotation declares.
    """
    name = name or network(config)
    cls: Any = type(config)
    for field_name, kind in _declared(cls):
        given = getattr(config, field_name)
        check_value(f"{name}: {field_name}", given, kind)
        if (plain := _plain(given)) is not given:
            object.__setattr__(config, field_name, plain)


def check_value(where: str, given: object, kind: Any) -> None:
    """Check one value against an annotation; types that are not in `SCALARS` are taken as they are.

    Raises:
        ConfigError: it is of another type, or out of bounds; in one line, what was given and what was expected.
    """
    options = _options(kind)
    fitting = [option for option in options if _is_of(given, option)]
    broken = [_broken(given, option) for option in fitting]
    if fitting and not all(broken):
        return
    if fitting:
        raise ConfigError(f"{where}={short(given)} should {broken[0]}")
    if isinstance(given, str) and len(options) == 1 and get_origin(_bare(kind)) is Literal:
        owner, _, name = where.rpartition(": ")
        raise ConfigError((f"{owner}: " if owner else "") + unknown(name, given, get_args(_bare(kind))))
    raise ConfigError(f"{where}={short(given)} should be " + " or ".join(map(described, options)))


def integer(name: str, given: object, least: int, most: int = WIDEST) -> int:
    """`given` as an int; NumPy's and torch's integers count, booleans and whole floats do not.

    Raises:
        ConfigError: it is no integer, or lies outside [least, most].
    """
    if isinstance(given, bool) or not isinstance(given, SupportsIndex):
        raise ConfigError(f"{name}={given!r} should be an integer")
    try:
        value = operator.index(given)
    except TypeError as error:  # a torch tensor has __index__, and refuses when it holds something else
        raise ConfigError(f"{name}={given!r} should be an integer") from error
    if value < least:
        raise ConfigError(f"{name}={value} should be at least {least}")
    if value > most:
        raise ConfigError(f"{name}={short(value)} should be at most {most}")
    return value


def divides_into_heads(config: Any) -> None:
    """Raise ShapeError unless the width divides into the heads."""
    if config.width % config.heads:
        raise ShapeError(f"{network(config)}: width={config.width} does not divide into heads={config.heads}")


def divides_for_sincos(config: Any) -> None:
    """Raise ShapeError unless the width divides into sines and cosines of rows and of columns."""
    if config.width % 4:
        raise ShapeError(f"{network(config)}: width={config.width} should divide by 4 for the sin-cos table")


def names_every_class(config: Any) -> None:
    """Raise ConfigError unless there is a name for each class, or none at all."""
    if config.class_names and len(config.class_names) != config.classes:
        raise ConfigError(
            f"{network(config)}: {len(config.class_names)} class names for {config.classes} classes"
        )


# --- annotations -------------------------------------------------------------------------------------------


def described(kind: Any) -> str:
    """Put into words what an annotation expects: "an integer of at least 1", "a tuple of numbers"."""
    bare, limits = _bare(kind), limits_of(kind)
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(map(str, get_args(bare)))
    if get_origin(bare) in (tuple, Sequence):
        members = get_args(bare)
        member = _bare(members[0])
        count = "" if members[-1] is ... or len(members) == 1 else f"{len(members)} "
        return f"a tuple of {count}" + _joined(SEVERAL.get(member, "values"), limits_of(members[0]))
    words = SCALARS.get(bare, getattr(bare, "__name__", str(bare)))
    return _joined(words, limits)


def limits_of(kind: Any) -> str:
    """Put into words the bounds that an annotation declares: "at least 1", "in [0, 1)"; empty for none."""
    low, high = _bounds(kind)
    if _bare(kind) is int and high and _bound(high) in (LARGEST, WIDEST):
        high = None  # goes without saying
    if low and high and (_bound(low), _bound(high)) == (-math.inf, math.inf):
        return "finite"
    if get_origin(_bare(kind)) is tuple:
        return limits_of(get_args(_bare(kind))[0])
    if low and high and math.isfinite(_bound(high)):
        return f"from {_bound(low)} to {_bound(high)}" if _bare(kind) is int else f"in {_interval(low, high)}"
    return " and ".join(_one_bound(bound) for bound in (low, high) if bound)


def union_members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


@cache
def _declared(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a dataclass with their annotations.

    One that cannot be read here, of a class inside a function, allows anything.
    """
    return tuple((f.name, _annotation(kind, f.name)) for f in fields(kind))


def _annotation(kind: type, name: str) -> Any:
    """Evaluate the annotation of one field in the module of the class that declares it."""
    owner = next(base for base in kind.__mro__ if name in get_annotations(base))
    alone = type(owner.__name__, (), {"__annotations__": {name: get_annotations(owner)[name]}})
    alone.__module__ = owner.__module__
    try:
        return get_type_hints(alone, include_extras=True)[name]
    except NameError:
        return Any


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _constraints(kind: Any) -> Iterator[Any]:
    for constraint in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
        yield from constraint if isinstance(constraint, GroupedMetadata) else (constraint,)


def _options(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself; a union has no bounds of its own."""
    return union_members(_bare(kind)) if union_members(_bare(kind)) != (_bare(kind),) else (kind,)


def _is_of(given: Any, kind: Any) -> bool:
    """Return whether a value is of the type of an annotation, whatever its bounds."""
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return any(type(choice) is type(given) and choice == given for choice in get_args(bare))
    if get_origin(bare) is tuple:
        members = _member_kinds(bare, len(given)) if isinstance(given, tuple) else None
        return (
            members is not None
            and len(members) == len(given)
            and all(
                any(_is_of(value, option) for option in _options(member))
                for value, member in zip(given, members, strict=True)
            )
        )
    if bare is int:
        return isinstance(given, Integral) and not isinstance(given, bool)
    if bare is float:
        return isinstance(given, Real) and not isinstance(given, bool)
    return isinstance(given, bare) if bare in SCALARS else True


def _broken(given: Any, kind: Any) -> str:
    """Say what would bring a value of the right type within the bounds of its annotation; empty if it is."""
    if get_origin(_bare(kind)) is tuple:
        return _members_broken(given, _bare(kind)) or _length_broken(given, kind)
    low, high = _bounds(kind)
    failing = [bound for bound in (low, high) if bound and not _holds(given, bound)]
    if not failing:
        return ""
    if _bare(kind) is int:
        return f"be {_one_bound(failing[0])}"
    limits = limits_of(kind)
    if limits == "finite":
        return "be a finite number"
    return f"lie {limits}" if limits.startswith("in ") else f"be {limits}"


def _members_broken(given: tuple[Any, ...], kind: Any) -> str:
    for value, member in zip(given, _member_kinds(kind, len(given)), strict=True):
        broken = [_broken(value, option) for option in _options(member) if _is_of(value, option)]
        if all(broken):
            return broken[0]
    return ""


def _length_broken(given: tuple[Any, ...], kind: Any) -> str:
    for constraint in _constraints(kind):
        if isinstance(constraint, MinLen) and len(given) < constraint.min_length:
            return f"hold at least {constraint.min_length}"
        if isinstance(constraint, MaxLen) and len(given) > constraint.max_length:
            return f"hold at most {constraint.max_length}"
    return ""


def _member_kinds(kind: Any, count: int) -> tuple[Any, ...]:
    """Annotations of the members of a tuple of `count`."""
    members = get_args(kind)
    return members[:1] * count if members[-1] is ... else members


def _bounds(kind: Any) -> tuple[Ge | Gt | None, Le | Lt | None]:
    low = next((c for c in _constraints(kind) if isinstance(c, Ge | Gt)), None)
    return low, next((c for c in _constraints(kind) if isinstance(c, Le | Lt)), None)


def _bound(bound: Ge | Gt | Le | Lt) -> Any:
    return getattr(bound, type(bound).__name__.lower())


def _holds(given: Any, bound: Ge | Gt | Le | Lt) -> bool:
    """NaN is within no bounds."""
    compare = getattr(operator, type(bound).__name__.lower())
    return bool(compare(given, _bound(bound)))


def _one_bound(bound: Ge | Gt | Le | Lt) -> str:
    limit = _bound(bound)
    if isinstance(bound, Lt) and limit == math.inf:
        return "finite"
    if isinstance(bound, Gt) and limit == 0:
        return "positive"
    return {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}[type(bound)] + f" {limit}"


def _interval(low: Ge | Gt, high: Le | Lt) -> str:
    left, right = "[" if isinstance(low, Ge) else "(", "]" if isinstance(high, Le) else ")"
    return f"{left}{_bound(low):g}, {_bound(high):g}{right}"


def _joined(words: str, limits: str) -> str:
    """Join a noun and its bounds: "a number of at least 1", "a number in [0, 1)", "a finite number"."""
    if limits and not any(map(str.isdigit, limits)):
        article, _, noun = words.rpartition(" ")
        return f"{article} {limits} {noun}".strip()
    return f"{words} {'of ' if limits.startswith('at ') else ''}{limits}".rstrip()


def _plain(given: Any) -> Any:
    """NumPy's numbers as Python's, also within a tuple."""
    if type(given) is tuple:
        plain = tuple(map(_plain, given))
        return given if all(map(operator.is_, plain, given)) else plain
    if isinstance(given, Integral) and type(given) not in (int, bool):
        return int(given)
    return float(given) if isinstance(given, Real) and not isinstance(given, int | float) else given


# --- JSON --------------------------------------------------------------------------------------------------


def config_of(kind: type[C], given: object, source: object) -> C:
    """Build a `kind` from the values of a JSON object: numbers, strings, literals, tuples and dataclasses.

    Args:
        source: what the errors name, such as the file that `given` was read from.

    Raises:
        CheckpointError: an unknown or missing key, a value of another type, or one that `kind` refuses.
    """
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: {kind.__name__} should be an object, not {short(given)}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise CheckpointError(f"{source}: " + unknown("config key", key, known))
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise CheckpointError(f"{source}: missing config key {name!r}{nearest(name, given)}")
    cls: Any = kind
    hints = dict(_declared(cls))
    values = {name: _from_json(hints[name], value, f"{source}: {name}") for name, value in given.items()}
    try:
        for name, value in values.items():
            check_value(name, value, hints[name])
        return kind(**values)
    except (DitkitError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _from_json(kind: Any, given: Any, where: str) -> Any:
    """`given` with tuples and dataclasses where the annotation has them: JSON has neither."""
    options = [_bare(option) for option in _options(kind)]
    if is_dataclass(options[0]):
        return config_of(options[0], given, where)  # type: ignore[arg-type]
    tuples = [option for option in options if get_origin(option) is tuple]
    if not tuples or not isinstance(given, list):
        return given
    kinds = _member_kinds(tuples[0], len(given))
    if len(kinds) != len(given):
        return tuple(given)  # of another length: an error, which the check says
    return tuple(_from_json(member, value, where) for member, value in zip(kinds, given, strict=True))
