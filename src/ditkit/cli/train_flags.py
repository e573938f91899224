"""Flags that both kinds of training share, how they are read: groups of weights, terms, and inherited weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

import tyro

from ditkit.core.errors import ConfigError, unknown
from ditkit.core.inherit import Inherit
from ditkit.core.spec import read_value
from ditkit.train.settings import Group

Transforms = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TRANSFORM")]
Groups = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PART:FIELD=VALUE")]
Terms = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TERM")]
Rules = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="RULE")]
SAME, SKIP = "same", "skip"
KINDS: dict[str, Any] = {"rate": float, "decay": float | None}
assert set(KINDS) == {f.name for f in fields(Group)} - {"part"}


def groups_of(words: Sequence[str], default: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return the groups of `--group PART:rate=10,decay=0.1`; `default` where there is none.

    Raises:
        ConfigError: a part without a field, an unknown field, one given twice, or a value that is no number or out of
            range.
    """
    return tuple(_group(word) for word in words) if words else default


def _group(word: str) -> Group:
    part, _, rest = word.partition(":")
    if not part or not rest:
        raise ConfigError(f"--group {word}: expected a part and its rate or decay, such as lora:rate=10")
    given: dict[str, Any] = {}
    for text in rest.split(","):
        name, _, value = text.partition("=")
        if name not in KINDS:
            raise ConfigError(f"--group {word}: " + unknown("field of a group", name, KINDS))
        if name in given:
            raise ConfigError(f"--group {word}: {name} is given twice, expected once")
        given[name] = read_value(KINDS[name], value, f"--group {word}: {name}={value!r}")
    return Group(part, **given)


def inherit_of(words: Sequence[str]) -> Inherit | None:
    """Return the rule of `--inherit same`, `skip=PATTERN` and `OWN=OTHER`; None where there is none.

    Raises:
        ConfigError: a word is none of these, or its patterns have stars of different number.
    """
    skip, pairs = [], []
    for word in words:
        own, equals, other = word.partition("=")
        if word == SAME:
            continue
        if not own or not equals or not other:
            raise ConfigError(
                f"--inherit {word}: expected {SAME}, {SKIP}=PATTERN of tensors that begin anew, or OWN=OTHER of those "
                "taken from others"
            )
        if own == SKIP:
            skip.append(other)
        else:
            pairs.append((own, other))
    return Inherit(tuple(skip), tuple(pairs)) if words else None
