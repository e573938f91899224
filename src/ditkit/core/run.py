"""Named places of a model, and the object through which it calls them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.core.grid import SEQUENCES, Segment

Kind = Literal[
    "time",
    "timestep",
    "tokens",
    "stack",
    "block",
    "branch",
    "modulation",
    "inner",
    "kv",
    "core",
    "choice",
    "route",
    "head",
]
AttentionKind = Literal["full", "axial", "windowed", "scaled"]
"""Over all rows of its sequence; along one axis at a time; inside of windows; or with another scale of the image's
scores than 1 / sqrt(K)."""
PARTIAL = ("axial", "windowed")
"""Attention whose keys are some of the rows of its sequence, folded into the batch."""
Axis = Literal["", "time", "space"]
Handler = Callable[..., Any]
"""`handler(fn, *args)` returns what `fn(*args)` returns; it may run `fn` or not."""


class Site(NamedTuple):
    """A named place of a model. Policies choose sites by kind, never by matching names.

    Its stream is that of its tokens: "image", "text", "joint" or "proxy"; of a branch, of what it returns; of a core,
    of its queries. A `modulation` site gives shifts, scales and gates from c, an `inner` site the values between the
    two layers of an MLP. A `timestep` site gives the embedding of the time alone, [B, D], which the `time` site around
    it joins with the rest of c. A `choice` site, asked with a branch's tokens before its norm and its two layers, gives
    what of the branch is computed; None is all.
    """

    name: str
    kind: Kind
    stream: str = "image"
    width: int = 0
    """Channels of what it returns: of a `kv` and a `core`, of all heads together; of a `modulation`, of one of its
    parts. 0 where it has none, or does not say."""
    heads: int = 0
    """The number of attention heads, of a `kv`, a `core` and the `choice` of an attention."""
    stage: int = 0
    """The resolution, in a network with several, of the segments whose rows it holds."""
    attention: AttentionKind = "full"
    """The kind of attention, of a `core`."""
    ordered: bool = False
    """Its function reads its rows as a grid (convolution, scan, windows): none may be moved or taken out around it."""
    over: tuple[str, ...] = ()
    """Streams that the keys of a `core` come from; none: those of its own stream's sequence."""
    axis: Axis = ""
    """The axis that the keys of an axial `core` lie along."""


def named(sites: Iterable[Site], *kinds: Kind) -> list[str]:
    """Names of the sites of these kinds, in the model's order."""
    return [site.name for site in sites if site.kind in kinds]


def attended(sites: Iterable[Site]) -> dict[str, str]:
    """Streams of the `core` sites whose keys are all rows of their stream's sequence, by their names."""
    return {
        site.name: site.stream
        for site in sites
        if site.kind == "core"
        and site.stream in SEQUENCES
        and site.attention not in PARTIAL
        and not site.over
    }


def moving(sites: Sequence[Site], names: Collection[str], who: str) -> list[Site]:
    """List the sites of the one stage of the cores `names`, if a policy may move its rows or take some out.

    Raises:
        ConfigError: the cores lie in several stages; or in theirs a function reads its rows as a grid, attention runs
            along axes or to keys from elsewhere, or there is nothing to move rows between. `who` is the policy.
    """
    stages = sorted({site.stage for site in sites if site.name in names})
    if len(stages) > 1:
        raise ConfigError(f"{who}: attention works in stages {stages}, expected one")
    inside = [site for site in sites if site.stage in stages]
    if fixed := [site.name for site in inside if site.ordered]:
        raise ConfigError(f"{who}: {fixed[0]!r} reads its rows as a grid, expected rows that may be moved")
    whole, reads = (
        attended(inside),
        [s for s in inside if s.kind == "core" and "image" in (s.over or ("image",))],
    )
    if fixed := [site.name for site in reads if site.name not in whole]:
        raise ConfigError(
            f"{who}: {fixed[0]!r} does not attend to just the rows of its sequence, expected that"
        )
    for kind in ("tokens", "head"):
        if named(sites, kind) and not named(inside, kind):
            raise ConfigError(f"{who}: stage {stages[0]} has no {kind!r} site to move rows at")
    return inside


@dataclass(frozen=True)
class Call:
    """One model evaluation, known before its first block.

    Args:
        index, total: place of the evaluation in its trajectory; Heun counts two a step.
        t: noise-time; NaN where samples or tokens have their own.
        lane: guidance branch. net: expert or guide.
        layout: the token segments the model will see.
        times: noise-time in [0, 1] of each row of the call, [B] or [B, T], on the model's device; by default `t` for
            all, [1].
        step: of the optimiser in training, from 0; None elsewhere.
    """

    index: int
    total: int
    t: float
    lane: str = "cond"
    net: str = "main"
    layout: tuple[Segment, ...] = ()
    times: Tensor = field(default=None, compare=False)  # type: ignore[assignment]
    step: int | None = None

    def __post_init__(self) -> None:
        if self.times is None:
            object.__setattr__(self, "times", torch.tensor([self.t]))


Watch = Callable[[str, Callable[..., Any], Handler | None, tuple[Any, ...]], Any]
"""`watch(name, fn, handler, args)` returns what the site `name` returns."""


class Run:
    """Handlers of one model call by site name; without any, every site just calls its function."""

    __slots__ = ("handlers",)
    watch: ClassVar[Watch | None] = None
    """The watch of all runs, while `watching`."""

    def __init__(self, handlers: Mapping[str, Handler] | None = None) -> None:
        self.handlers = handlers or {}

    def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, through the handler of `name` if there is one. Argument 0 holds the tokens."""
        handler = self.handlers.get(name)
        # a compiled graph is never watched: it would be one for each watch
        if torch.compiler.is_compiling() or Run.watch is None:
            return fn(*args) if handler is None else handler(fn, *args)
        return Run.watch(name, fn, handler, args)

    @property
    def named(self) -> bool:
        """Return whether anybody asks for the names of sites."""
        return bool(self.handlers) or Run.watch is not None


DIRECT = Run()


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Call every site of every model through `watch` while the block runs, as a profiler does.

    Raises:
        ConfigError: another block does.
    """
    if Run.watch is not None:
        raise ConfigError("sites are being watched already, expected one profile at a time")
    Run.watch = staticmethod(watch)
    try:
        yield
    finally:
        Run.watch = None
