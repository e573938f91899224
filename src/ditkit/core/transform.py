"""Transforms: changes of the tensors of a model, applied once, then replayed whenever the model is rebuilt."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from ditkit.core.catalog import find
from ditkit.core.config import config_of
from ditkit.core.errors import CheckpointError, ConfigError, DitkitError

Report = Mapping[str, Any]
"""The report of applying a transform, as JSON."""


class Stacked(NamedTuple):
    """A list of blocks that a transform may name.

    Args:
        path: of the ModuleList in the model. field: of the config, that says how many there are.
        shared: blocks that others read, which stay (diffusers' DiT: the head is conditioned by block 0's embedding);
            -1 is the last.
        indexed: fields of the config that list numbers of these blocks.
    """

    path: str
    field: str
    shared: tuple[int, ...] = ()
    indexed: tuple[str, ...] = ()


class Draws(NamedTuple):
    """Trajectories of a model from which a transform is fitted: its steps, and how many samples from which seed on."""

    steps: int
    samples: int
    seed: int = 0


class Fed(NamedTuple):
    """A block that is trained by itself from a teacher's states, and what it stands for.

    Args:
        block: the name of its site. first, last, source: sites of the teacher: the blocks that it stands for, from the
            first to the last, and the one that it began as.
        role: of its text (`ditkit.nn.narrow.Role`). group: sites of the blocks from whose first to whose last it is not
            computed. linear: whether linear layers stand in the place of its MLPs. depth: blocks of the teacher's stack.
    """

    block: str
    first: str
    last: str
    source: str
    role: str = "own"
    group: tuple[str, ...] = ()
    linear: bool = False
    depth: int = 0

    @property
    def is_student(self) -> bool:
        """Return whether it stands for several blocks."""
        return self.first != self.last

    @property
    def reads_text(self) -> bool:
        """Return whether it reads a text that another block computed."""
        return self.role in ("read", "resumed")


class Transform(ABC):
    """A frozen dataclass of JSON fields: numbers, texts, tuples, dataclasses.

    `Model.transform` alone calls `apply`, once; `Model.shaped` alone calls `shape`, whenever the model is rebuilt.
    """

    homes: ClassVar[tuple[str, ...]] = ("ditkit.compress", "ditkit.adapt")
    undoes: ClassVar[tuple[type[Transform], ...]] = ()
    """Transforms that it takes away again: neither they nor it stay listed."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Endings of tensors that are saved in their own type, whatever type the others are saved in."""

    def check(self, model: Any) -> None:  # noqa: B027
        """Refuse a model that it does not fit, changing nothing.

        Raises:
            ConfigError: names the field, what was given and what would fit. ConflictError: it cannot follow what was
                applied before.
        """

    def draws(self) -> Draws | None:
        """Return which trajectories a verb should draw as calibration where none is given; None if it needs none."""
        return None

    @property
    def is_open(self) -> bool:
        """True if `resolved` decides more than values, so that a run which must be resumed has to name it."""
        return self.draws() is not None

    def resolved(self, model: Any, calibration: Any = None) -> Self:
        """Return the setting with what it leaves open decided for this model, before anything is changed.

        That is the one that is applied and listed: `shape` follows from its fields alone.

        Raises:
            ConfigError, ShapeError: calibration is missing, too little or of another shape.
        """
        return self

    @abstractmethod
    def shape(self, model: Any) -> Any:
        """Change the structure alone, in place; on the meta device, too.

        It follows from the fields, draws nothing from the global generator, makes only tensors that are saved, and
        sees no parameters of policies. Weights that are not trained stay trainable: a run's groups decide.
        """

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Report]:
        """`shape` with values, in place. calibration: samples, where the values follow from what is seen."""
        return self.shape(model), {}

    def origin(self, name: str) -> str:
        """Return the name that a site, or tensor, of the result had before."""
        return name

    def trains(self, model: Any) -> list[str]:
        """Names of the tensors that it added to be trained."""
        return []

    def fed(self, model: Any) -> list[Fed]:
        """List the blocks of the result that learn from the states of the model before, each by itself."""
        return []

    def fixed(self, model: Any) -> list[str]:
        """Names of the layers that it leaves without weights that could be trained."""
        return []

    def plain(self, model: Any) -> Mapping[str, Any] | None:
        """Fields of the config with which diffusers' own class builds the result; None if it cannot."""
        return None

    def ready(self, model: Any) -> None:  # noqa: B027
        """Refuse to save the model as it is now.

        Raises:
            ConfigError: its tensors are not those that `shape` would be filled with.
        """

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        """Return settings that, in order, do something on a small model, this class's last."""
        return (cls(),)

    @abstractmethod
    def exact(self) -> Self:
        """Return the neutral setting: neither applied nor recorded."""


def described(transform: Transform) -> dict[str, Any]:
    """Return a transform as config.json has it."""
    fields: Any = transform
    return {"name": type(transform).__name__, "fields": dataclasses.asdict(fields)}


def transforms_of(given: object, source: object) -> list[Transform]:
    """Build the transforms that a config.json lists.

    Raises:
        CheckpointError: one is unknown, or has a field that this version does not know.
    """
    entries = [] if given is None else given
    if not isinstance(entries, list):
        raise CheckpointError(f"{source}: 'transforms' should be a list, not {entries!r:.80}")
    return [transform_of(one, source) for one in entries]


def transform_of(given: object, source: object) -> Transform:
    """One of them."""
    if not isinstance(given, Mapping) or set(given) != {"name", "fields"}:
        raise CheckpointError(f"{source}: a transform should have a name and fields, not {given!r:.80}")
    try:
        kind = find(Transform, str(given["name"]))  # type: ignore[type-abstract]
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}; is it of a newer ditkit?") from error
    return config_of(kind, given["fields"], f"{source}: {given['name']}")


def check_named(transform: Transform) -> None:
    """Refuse a transform that config.json cannot name.

    Raises:
        ConfigError: what would be read back is not equal.
    """
    try:
        again = transform_of(_as_json(described(transform)), "config.json")
    except DitkitError as error:
        raise ConfigError(f"{transform} could not be loaded with the model: {error}") from error
    if again != transform:
        expected = f"{type(again).__module__}.{type(again).__name__}"
        raise ConfigError(f"{transform} is of {type(transform).__module__}, its name is that of {expected}")


def origin_of(transforms: Iterable[Transform], name: str) -> str:
    """Return the name that a site or tensor had before all of `transforms`."""
    for transform in reversed(list(transforms)):
        name = transform.origin(name)
    return name


def standing(transforms: Iterable[Transform]) -> tuple[Transform, ...]:
    """List the `transforms` to replay, in order: without what a later one took away, and without that."""
    left: list[Transform] = []
    for transform in transforms:
        if transform.undoes:
            left = [earlier for earlier in left if not isinstance(earlier, transform.undoes)]
        else:
            left.append(transform)
    return tuple(left)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value
