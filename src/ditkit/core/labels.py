"""Labels: the class of each sample, by name or index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model


def resolve_labels(
    model: Model, labels: int | str | Sequence[int | str] | None, count: int
) -> tuple[int, ...] | None:
    """One class index a sample, from indices and names; one label serves all, None spreads over the classes.

    Returns:
        None for a model that has no classes.

    Raises:
        ConfigError: a number of labels that is neither 1 nor `count`, an unknown name, an index out of range,
            or labels for a model that has no classes.
    """
    if labels is not None and (isinstance(labels, str) or not isinstance(labels, Iterable)):
        labels = (labels,)
    classes: int | None = getattr(model.config, "classes", None)
    if not classes:
        if labels is not None:
            raise ConfigError(f"label={list(labels)!r}: a {type(model).__name__} takes no class labels")
        return None
    if labels is None:
        return tuple(i * classes // count for i in range(count))
    if len(labels) not in (1, count):
        raise ConfigError(f"{len(labels)} labels for {count} seeds; expected one, or one a seed")
    found = tuple(class_index(model, label) for label in labels)
    return found * count if len(found) == 1 else found


def class_index(model: Model, label: int | str) -> int:
    """Return the index of a class, given by its index or its name (see `class_names`).

    Raises:
        ConfigError: the model has no such class.
    """
    names = class_names(model)
    if not names:
        raise ConfigError(f"label={label!r}: a {type(model).__name__} takes no class labels")
    if isinstance(label, str):
        if label not in names:
            raise ConfigError(unknown("class", label, names))
        return names.index(label)
    index = integer("class", label, least=0)
    if index >= len(names):
        raise ConfigError(f"class {index} should lie between 0 and {len(names) - 1}")
    return index


def class_names(model: Model) -> tuple[str, ...]:
    """Return the model's classes; those of a model that was saved without their names are "0", "1" ..."""
    named: tuple[str, ...] = getattr(model.config, "class_names", ())
    return named or tuple(str(i) for i in range(getattr(model.config, "classes", 0)))
