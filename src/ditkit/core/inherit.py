"""Weights from a model of another class or size: a student from its teacher, a video model from an image model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.transform import Report


@dataclass(frozen=True)
class Inherit:
    """The source, in another model, of each of a model's tensors.

    A name is taken from the same name, unless one of these says otherwise. In a pattern `*` is one part of a name
    between dots, or, at its end, all that follows.

    Args:
        skip: patterns of the model's tensors that begin as they are: "blocks.*.temporal_attn.*".
        map: pairs of patterns, the model's and the source's, with as many stars: ("blocks.1.*", "blocks.3.*").
    """

    skip: tuple[str, ...] = ()
    map: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for own, other in self.map:
            if own.count("*") != other.count("*"):
                raise ConfigError(f"Inherit: map {own!r} to {other!r}, expected as many stars in both")

    def source(self, name: str) -> str | None:
        """Return a tensor's name in the source; None if it is skipped."""
        if any(_matched(pattern, name) is not None for pattern in self.skip):
            return None
        for own, other in self.map:
            stars = _matched(own, name)
            if stars is not None:
                parts = other.split("*")
                return parts[0] + "".join(star + part for star, part in zip(stars, parts[1:], strict=True))
        return name


def inherit(model: Model, source: Model, rule: Inherit) -> Report:
    """Copy the source's tensors into `model`, in place; what was taken, begun anew and left.

    Raises:
        ConfigError: a tensor that is not skipped has no counterpart, or one of another shape; or a pattern matches
            nothing. The model is unchanged then.
    """
    own, other = model.state_dict(), source.state_dict()
    _check_patterns(rule, own)
    taken: dict[str, str] = {}
    for name, value in own.items():
        was = rule.source(name)
        if was is None:
            continue
        if was not in other:
            kind = type(source).__name__
            raise ConfigError(f"Inherit: {kind} has no tensor {was!r} for {name!r}; map it, or skip it")
        if other[was].shape != value.shape:
            raise ConfigError(
                f"Inherit: {was!r} is {list(other[was].shape)}, expected {list(value.shape)} for {name!r}; map it to "
                "another, or skip it"
            )
        taken[name] = was
    with torch.no_grad():
        for name, was in taken.items():
            own[name].copy_(other[was])
    fresh = [name for name in own if name not in taken]
    return {"taken": len(taken), "fresh": len(fresh), "left": len(set(other) - set(taken.values()))}


def _check_patterns(rule: Inherit, names: Iterable[str]) -> None:
    known = list(names)
    for pattern in (*rule.skip, *(own for own, _ in rule.map)):
        if not any(_matched(pattern, name) is not None for name in known):
            raise ConfigError(f"Inherit: no tensor of the model matches {pattern!r}")


def _matched(pattern: str, name: str) -> tuple[str, ...] | None:
    """Return the text that each star stands for; None if the name does not match."""
    parts = [re.escape(part) for part in pattern.split("*")]
    stars = [r"([^.]+)"] * (len(parts) - 1)
    if pattern.endswith("*"):
        stars[-1] = "(.+)"
    found = re.fullmatch("".join(a + b for a, b in zip(parts, [*stars, ""], strict=True)), name)
    return None if found is None else found.groups()
