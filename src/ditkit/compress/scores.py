"""Blocks to keep by scores and by rule: the baselines that a learned choice is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ditkit.compress.kept import Kept
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.core.run import Handler, Run

Compare = Callable[[Tensor, Tensor], Tensor]


def block_influence(model: Model, *inputs: Any, stack: str = "blocks", **named: Any) -> Tensor:
    """Mean cosine over tokens of what each block is given and returns, [depth]; near 1 where a block does little.

    ShortGPT (arXiv 2403.03853), as TinyFusion uses it. Its script gives the network clean data, at the first quarter of
    the noise-times; what is given here is the caller's.

    Args:
        inputs, named: of the model's call.
    """
    return _compared(model, stack, lambda x, y: F.cosine_similarity(x, y, -1).mean(), inputs, named)


def block_change(model: Model, *inputs: Any, stack: str = "blocks", **named: Any) -> Tensor:
    """Mean squared difference of what each block is given and returns, [depth] (Flux-Lite)."""
    return _compared(model, stack, lambda x, y: (x - y).square().mean(), inputs, named)


@torch.no_grad()
def sensitivity(model: Model, loss: Callable[[Model], float], stack: str = "blocks") -> Tensor:
    """By how much `loss` rises without each block, [depth]; infinite where the model cannot do without."""
    depth, shared = _stack(model, stack)
    whole = loss(model)
    rises = []
    for block in range(depth):
        if block in shared:
            rises.append(torch.inf)
            continue
        copy = model.with_weights(model.state_dict(), "copy")
        copy.transform(Kept(tuple(n for n in range(depth) if n != block), stack))
        rises.append(loss(copy) - whole)
    return torch.tensor(rises)


def least_needed(
    scores: Sequence[float] | Tensor, count: int, stack: str = "blocks", spare: Sequence[int] = (-1,)
) -> Kept:
    """All blocks but the `count` of the highest scores.

    Args:
        scores: of how little a block does: `block_influence`, or a negative `sensitivity` or `block_change`.
        spare: blocks that stay whatever their score, -1 the last, as ShortGPT does.

    Raises:
        ConfigError: fewer blocks may go than `count`, or none would stay.
    """
    given = torch.as_tensor(scores, dtype=torch.float64)
    depth, staying = len(given), {n % len(given) for n in spare}
    ranked = [n for n in given.argsort(descending=True, stable=True).tolist() if n not in staying]
    if not 0 <= count <= min(len(ranked), depth - 1):
        raise ConfigError(
            f"least_needed: count={count}, expected 0 to {min(len(ranked), depth - 1)} of {depth} blocks"
        )
    dropped = set(ranked[:count])
    return Kept(tuple(n for n in range(depth) if n not in dropped), stack)


def alternate(depth: int, stack: str = "blocks") -> Kept:
    """Every second block, with the first and the last: TinyFusion's oracle list after BK-SDM (arXiv 2305.15798).

    Of 28 it is 0, 2, ... 12, 15, 17, ... 27. Other depths follow its rule: even blocks of the first half, odd ones of
    the second.

    Raises:
        ConfigError: the depth does not divide by 4.
    """
    if depth % 4 or depth < 4:
        raise ConfigError(f"alternate: depth={depth}, expected a multiple of 4")
    return Kept(tuple(n for n in range(depth) if n % 2 == (n >= depth // 2)), stack)


@torch.no_grad()
def _compared(
    model: Model, stack: str, compare: Compare, inputs: Sequence[Any], named: dict[str, Any]
) -> Tensor:
    """Compute a number for each block, the mean over streams by their elements."""
    depth, _ = _stack(model, stack)
    names = [f"{stack}.{n}" for n in range(depth)]
    found: dict[str, Tensor] = {}
    model(*inputs, run=Run({name: partial(_noting, found, name, compare) for name in names}), **named)
    return torch.stack([found[name] for name in names])


def _noting(found: dict[str, Tensor], name: str, compare: Compare, fn: Handler, x: Any, *args: Any) -> Any:
    out = fn(x, *args)
    before, after = (tree_leaves(value) for value in (x, out))
    wide = [
        tuple(v.to(torch.promote_types(v.dtype, torch.float32)) for v in pair)
        for pair in zip(before, after, strict=True)
    ]
    rows = torch.tensor([float(a.numel()) for a, _ in wide])
    values = torch.stack([compare(*pair) for pair in wide])
    found[name] = (values * (rows / rows.sum()).to(values)).sum()
    return out


def _stack(model: Model, name: str) -> tuple[int, set[int]]:
    """How many blocks a stack has, and which others read."""
    stacks = model.stacks()
    if name not in stacks:
        raise ConfigError(unknown("stack", name, stacks))
    depth = len(model.get_submodule(stacks[name].path))  # type: ignore[arg-type]
    return depth, {n % depth for n in stacks[name].shared}
