"""Named places of a model, and the object through which it calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ditkit.core.grid import SEQUENCES, Segment

Kind = Literal["time", "tokens", "stack", "block", "branch", "kv", "core", "route", "head"]
Handler = Callable[..., Any]
"""`handler(fn, *args)` returns what `fn(*args)` returns; it may run `fn` or not."""


class Site(NamedTuple):
    """A named place of a model. Policies choose sites by kind, never by matching names.

    Its stream is that of its tokens; of a branch, of what it returns; of a core, of its queries: "image", "text",
    "joint", "axis" where they attend along one axis at a time, or "scaled" where the image's scores have another scale
    than 1 / sqrt(K).
    """

    name: str
    kind: Kind
    stream: str = "image"


def named(sites: Iterable[Site], *kinds: Kind) -> list[str]:
    """Names of the sites of these kinds, in the model's order."""
    return [site.name for site in sites if site.kind in kinds]


def attended(sites: Iterable[Site]) -> dict[str, str]:
    """Streams of the `core` sites whose keys are rows of the image, by their names."""
    return {site.name: site.stream for site in sites if site.kind == "core" and site.stream in SEQUENCES}


@dataclass(frozen=True)
class Call:
    """One model evaluation, known before its first block.

    Args:
        index, total: place of the evaluation in its trajectory; Heun counts two a step.
        t: noise-time; NaN where every token has its own.
        lane: guidance branch. net: expert or guide.
        layout: the token segments the model will see.
    """

    index: int
    total: int
    t: float
    lane: str = "cond"
    net: str = "main"
    layout: tuple[Segment, ...] = ()


class Run:
    """Handlers of one model call by site name; without any, every site just calls its function."""

    __slots__ = ("handlers",)

    def __init__(self, handlers: Mapping[str, Handler] | None = None) -> None:
        self.handlers = handlers or {}

    def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, through the handler of `name` if there is one. Argument 0 holds the tokens."""
        handler = self.handlers.get(name)
        return fn(*args) if handler is None else handler(fn, *args)


DIRECT = Run()
