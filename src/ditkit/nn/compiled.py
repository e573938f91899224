"""Compiled blocks under policies: handlers stay outside of the graphs, and their branches are compiled instead.

A handler decides in Python, anew in each evaluation; a graph that held it would hold its last decision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from inspect import ismethod
from typing import Any

from ditkit.core.run import DIRECT, Run
from ditkit.nn.modulation import Parts


def is_compiled(block: Any) -> bool:
    """Return whether `block.compile()` was called, as diffusers' `compile_repeated_blocks` does."""
    return getattr(block, "_compiled_call_impl", None) is not None


def run_block(block: Any, run: Run, at: str, *args: Any, **given: Any) -> Any:
    """Run a block.

    A compiled one runs as one graph where nothing acts inside, else as a graph a branch.
    """
    if not is_compiled(block):
        return block(*args, **given, run=run, at=at)
    if not _acts_inside(run, at):
        return block(*args, **given, run=DIRECT, at="")
    return block._call_impl(*args, **given, run=Branches(run, _compiler(block)), at=at)


class Branches(Run):
    """A run that compiles each branch in which nothing acts; the others run as they are.

    A branch that has sites of its own is a partial whose first arguments are this run and their prefix.
    """

    __slots__ = ("compiler", "run")

    def __init__(self, run: Run, compiler: Any) -> None:
        super().__init__(run.handlers)
        self.run, self.compiler = run, compiler

    def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        handler, branch = self.handlers.get(name), self._branch(fn)
        return branch(*args) if handler is None else handler(branch, *args)

    def _branch(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        function, bound = _opened(fn)
        if function is Parts:  # computes nothing yet
            return fn
        place = next((i for i, one in enumerate(bound) if one is self), None)
        if place is not None:
            before, at, after = bound[:place], bound[place + 1], bound[place + 2 :]
            if _acts_inside(self.run, at):
                return partial(function, *before, self.run, at, *after)
            # no name without handlers: blocks share their code, and a graph would hold for one name only
            bound = (*before, DIRECT, "", *after)
        return partial(_compiled(self.compiler, function), *bound)


def _acts_inside(run: Run, at: str) -> bool:
    return any(name.startswith(at + ".") for name in run.handlers)


def _opened(fn: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the plain function of a partial or a method, which blocks share, and what it is bound to."""
    function, bound = (fn.func, fn.args) if isinstance(fn, partial) else (fn, ())
    return (function.__func__, (function.__self__, *bound)) if ismethod(function) else (function, bound)


def _compiler(block: Any) -> Any:
    """Return what compiled `block`, with its backend and options; None where compilation is switched off."""
    call = block._compiled_call_impl
    free = getattr(getattr(call, "__code__", None), "co_freevars", ())
    return call.__closure__[free.index("self")].cell_contents if "self" in free else None


@lru_cache(maxsize=1024)
def _compiled(compiler: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` with `compiler`: the wrapper costs more to make than a skipped branch."""
    compiled: Callable[..., Any] = function if compiler is None else compiler(function)
    return compiled
