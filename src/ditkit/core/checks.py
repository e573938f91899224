"""What configs of networks owe alike; an error names the network, the field, and what was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ShapeError

DEEPEST = 1000
"""Blocks are built one by one before any weights are read: a damaged config must not keep a machine busy."""


def network(config: Any) -> str:
    """The name of the network that a config is of."""
    return type(config).__name__.removesuffix("Config")


def at_least(least: int, config: Any, *names: str) -> None:
    """Raise ConfigError unless each of these fields, or each number of one that is a tuple, is `least` or more."""
    for name in names:
        given = getattr(config, name)
        if min(given if isinstance(given, tuple) else (given,)) < least:
            raise ConfigError(f"{network(config)}: {name}={given} should be at least {least}")


def not_too_deep(config: Any) -> None:
    """Raise ConfigError for more than DEEPEST blocks."""
    if config.depth > DEEPEST:
        raise ConfigError(f"{network(config)}: depth={config.depth} should be at most {DEEPEST}")


def divides_into_heads(config: Any) -> None:
    """Raise ShapeError unless the width divides into the heads."""
    if config.width % config.heads:
        raise ShapeError(f"{network(config)}: width={config.width} does not divide into heads={config.heads}")


def divides_for_sincos(config: Any) -> None:
    """Raise ShapeError unless the width divides into sines and cosines of rows and of columns."""
    if config.width % 4:
        raise ShapeError(f"{network(config)}: width={config.width} should divide by 4 for the sin-cos table")


def shares(config: Any, *names: str) -> None:
    """Raise ConfigError unless each of these fields lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{network(config)}: {name}={getattr(config, name)} should lie in [0, 1)")


def names_every_class(config: Any) -> None:
    """Raise ConfigError unless there is a name for each class, or none at all."""
    if config.class_names and len(config.class_names) != config.classes:
        raise ConfigError(
            f"{network(config)}: {len(config.class_names)} class names for {config.classes} classes"
        )


def label_of(config: Any, cond: Cond) -> Tensor:
    """The label of each sample, [B]; without one raise ConfigError."""
    if cond.label is None:
        raise ConfigError(f"{network(config)}: a class label is needed; Cond.label is None")
    return cond.label
