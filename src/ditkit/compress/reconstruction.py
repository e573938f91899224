"""Reconstruction: the rounding of one block after another is learned from what the block gives (BRECQ).

Inputs of a block are those of the network whose earlier blocks are rounded already; targets are those of the network
as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

from ditkit.compress.calibration import some_rows
from ditkit.compress.rounding import Rounded, Rounding, learn, squared
from ditkit.core.run import Handler, Run
from ditkit.nn.time_path import SAMPLES, Bound, TimePath, name_of

ROWS = 64
"""Samples that are computed at once where nothing is learned."""


class _Reached(Exception):
    """A call has reached the place that was waited for."""


class Units:
    """The parts of a network whose rounding is learned one after another: blocks, and single layers beside them.

    Args:
        model: with its sites. calls: of its calibration. layers: being rounded, by name.
    """

    def __init__(self, model: Any, calls: Sequence[Bound], layers: Mapping[str, Any]) -> None:
        self.model, self.calls, self.layers = model, calls, layers
        self.blocks = {
            f"{stack}.{n}": f"{stacked.path}.{n}."
            for stack, stacked in model.stacks().items()
            for n in range(len(model.get_submodule(stacked.path)))
        }
        self.functions: dict[str, Handler] = {}
        self.by_sample: dict[str, list[bool]] = {}
        """The tensors of a block's arguments that have a row of each sample, in the order of their leaves."""
        self.follows: set[str] = set()
        self._follow()
        self.full: Any = None
        self.rounded: Any = None

    @torch.no_grad()
    def learn(self, chosen: Sequence[str], settings: Rounding, seed: int) -> int:
        """Learn the rounding of the layers `chosen`, by block; return the iterations."""
        done = 0
        inside = {name: [n for n in chosen if n.startswith(path)] for name, path in self.blocks.items()}
        for name in chosen:
            if not any(name in names for names in inside.values()):
                done += self._learn_layer(name, settings, seed)
        for block, names in inside.items():
            done += self._learn_block(block, names, settings, seed)
        return done

    def _learn_block(self, block: str, names: Sequence[str], settings: Rounding, seed: int) -> int:
        fn, by_sample = self.functions[block], self.by_sample[block]
        if block not in self.follows:
            with full(self.layers):
                self.full = joined([self._reach(block, call) for call in self.calls], by_sample)
            self.rounded = joined([self._reach(block, call) for call in self.calls], by_sample)
        with full(self.layers):
            target = in_parts(fn, self.full, by_sample)
        done = 0
        if names:
            given, own = self.rounded, [self.layers[n] for n in names]

            def loss(index: Tensor) -> Tensor:
                return apart(fn(*taken(given, index, by_sample)), taken(target, index))

            done = learn(own, loss, rows_of(target), settings, seed)
        self.full = (target, *self.full[1:])
        self.rounded = (in_parts(fn, self.rounded, by_sample), *self.rounded[1:])
        return done

    def _learn_layer(self, name: str, settings: Rounding, seed: int) -> int:
        layer = self.layers[name]
        given = torch.cat([rows_as_batch(self._input(layer, call)) for call in self.calls])
        with full(self.layers):
            target = layer(torch.cat([rows_as_batch(self._input(layer, call)) for call in self.calls]))
        return learn(
            [layer], lambda index: squared(layer(given[index]), target[index]), len(target), settings, seed
        )

    def _follow(self) -> None:
        """Find which blocks take what the block before them gave, and all else as it did."""
        before: list[Any] = [None, None, ()]
        count = len(self.calls[0][name_of(SAMPLES, self.calls[0])])
        count -= count > 1  # another number than the other calls', so that no length is a batch by accident

        def through(name: str, fn: Handler, *args: Any) -> Any:
            self.functions[name] = fn
            leaves = tree_leaves(args)
            self.by_sample[name] = [isinstance(v, Tensor) and v.ndim > 0 and len(v) == count for v in leaves]
            same = len(args[1:]) == len(before[2]) and all(map(_is, args[1:], before[2]))
            if before[0] is not None and args[0] is before[1] and same:
                self.follows.add(name)
            before[:] = [name, fn(*args), args[1:]]
            return before[1]

        with torch.no_grad():
            run = Run({name: partial(through, name) for name in self.blocks})
            self.model(**some_rows(self.calls[0], 0, count), run=run)

    def _reach(self, block: str, call: Bound) -> tuple[Any, ...]:
        found: list[tuple[Any, ...]] = []

        def stop(_: Handler, *args: Any) -> Any:
            found.append(args)
            raise _Reached

        with suppress(_Reached):
            self.model(**call, run=Run({block: stop}))
        return found[0]

    def _input(self, layer: Rounded, call: Bound) -> Tensor:
        found: list[Tensor] = []

        def stop(_: Any, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Reached

        hook = layer.register_forward_pre_hook(stop)
        try:
            self.model(**call)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]


def learn_features(
    path: TimePath,
    rows: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    layers: Mapping[str, Rounded],
    settings: Rounding,
    seed: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> int:
    """Learn the rounding of the time path alone (TIAR): sum_i |g_i(h(t)) - g^_i(h^(t))|^2, from times and labels only.

    Args:
        rows: of times, and what else the features read. weights: of the network, by name.
        layers: of the time path, being rounded, by name.
    """
    count = len(next(iter(rows.values())))
    target = features(path, rows, weights)

    def loss(index: Tensor) -> Tensor:
        given = {**weights, **{f"{name}.weight": layer.weights() for name, layer in layers.items()}}
        found = path.compute(padded({k: v[index] for k, v in rows.items()}, path.rows), given)
        pairs = zip(found, target, strict=True)
        return torch.stack([squared(own[: len(index)], full[index]) for own, full in pairs]).sum()

    batch = min(settings.batch, path.rows)
    return learn([*layers.values()], loss, count, replace(settings, batch=batch), seed, watch)


@torch.no_grad()
def features(
    path: TimePath, rows: Mapping[str, Tensor], weights: Mapping[str, Tensor], inputs: bool = False
) -> list[Tensor]:
    """Compute all temporal features of `rows`, [R, N] each, or the inputs of their layers, [R, K]."""
    count = len(next(iter(rows.values())))
    parts = []
    for first in range(0, count, path.rows):
        some = {name: v[first : first + path.rows] for name, v in rows.items()}
        size = len(next(iter(some.values())))
        parts.append([one[:size] for one in path.compute(padded(some, path.rows), weights, inputs)])
    return [torch.cat(one) for one in zip(*parts, strict=True)]


def padded(rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Repeat the last row until there are `count`."""
    return {
        name: torch.cat([v, v[-1:].expand(count - len(v), *v.shape[1:])]) if len(v) < count else v
        for name, v in rows.items()
    }


@contextmanager
def full(layers: Mapping[str, Any]) -> Iterator[None]:
    """Inside, layers have the weights that they had."""
    modes = {name: layer.mode for name, layer in layers.items()}
    for layer in layers.values():
        layer.mode = "full"
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.mode = modes[name]


def joined(parts: Sequence[tuple[Any, ...]], by_sample: Sequence[bool]) -> Any:
    """Put the arguments of several calls after one another; those without a row of each sample are the first's."""
    leaves = zip(*(tree_leaves(part) for part in parts), strict=True)
    one = [torch.cat(v) if rows else v[0] for v, rows in zip(leaves, by_sample, strict=True)]
    return tree_unflatten(one, tree_structure(parts[0]))


def taken(tree: Any, index: Tensor, by_sample: Sequence[bool] = ()) -> Any:
    """Take some rows of the tensors that have a row of each sample, by default of all."""
    leaves, structure = tree_flatten(tree)
    chosen = by_sample or [True] * len(leaves)
    return tree_unflatten(
        [v[index] if rows else v for v, rows in zip(leaves, chosen, strict=True)], structure
    )


def rows_of(tree: Any) -> int:
    """Return how many rows the first tensor has."""
    return len(next(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)))


@torch.no_grad()
def in_parts(fn: Handler, args: Any, by_sample: Sequence[bool]) -> Any:
    """Compute `fn(*args)` some rows at a time."""
    index = torch.arange(rows_of(args))
    return joined_rows([fn(*taken(args, part, by_sample)) for part in index.split(ROWS)])


def joined_rows(parts: Sequence[Any]) -> Any:
    return tree_map(lambda *values: torch.cat(values), *parts)


def rows_as_batch(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2)


def apart(found: Any, expected: Any) -> Tensor:
    """Return the squared error of all that a block gives, summed over channels and averaged over the rest."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return torch.stack([squared(own.flatten(0, -2), full.flatten(0, -2)) for own, full in pairs]).sum()


def _is(one: Any, other: Any) -> bool:
    return one is other
