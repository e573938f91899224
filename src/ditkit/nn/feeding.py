"""Blocks that are given a teacher's states, and blocks that are not computed: handlers of their sites (PPCL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ditkit.core.run import Handler
from ditkit.core.transform import Fed


def needed(one: Fed) -> tuple[str, ...]:
    """Return the taps of a teacher from which a block's state is made."""
    handed = (one.group[0], one.group[0] + ".attn.text") if one.reads_text else ()
    return (one.first + ":in", *handed)


def before(one: Fed, taught: Mapping[str, Any]) -> Any:
    """Return the teacher's state that a block is given; with a text that it only reads, state and rows side by side."""
    state = taught[one.first + ":in"]
    if not one.reads_text:
        return state
    handed, rows = taught[one.group[0]].text, taught[one.group[0] + ".attn.text"]
    return state._replace(text=torch.cat([handed, rows], -1))


def given(state: Any, fn: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Compute a block of another state than the one that came."""
    return fn(state, *args)


def passed(fn: Handler, x: Any, *args: Any) -> Any:
    """Stand for a block that is not computed."""
    return x


def nothing(fn: Handler, x: Any, *args: Any) -> Any:
    """Stand for a branch that adds nothing."""
    return tree_map(torch.zeros_like, x)


def stream_of(state: Any, stream: str) -> Tensor:
    """Return the features of a stream; a state without streams is the image's."""
    found: Tensor = state if isinstance(state, Tensor) else getattr(state, stream)
    return found
