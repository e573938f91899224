"""Queries, keys and values of a trained clip model along a trajectory, and attention under masks of pairs.

B batch, N heads, L tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.attention.pattern import Pattern
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid
from ditkit.core.model import Denoiser
from ditkit.core.run import Run
from ditkit.sample.noise import SampleNoise


class State(NamedTuple):
    """What one attention saw: q, k and v, each [B, N, L, K]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def scores(self) -> Tensor:
        """Scaled products of queries and keys, [B, N, L, L]."""
        return self.q @ self.k.mT * self.q.shape[-1] ** -0.5

    @property
    def weights(self) -> Tensor:
        """The softmax over all keys, [B, N, L, L]."""
        return self.scores.softmax(-1)


class Noting(Run):
    """A run that changes nothing and notes the arguments of each attention."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[State] = []

    def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """Call `fn`, and note its tensors where it is an attention's core."""
        if name.endswith(".core"):
            self.states.append(State(*args[:3]))
        return fn(*args)


@torch.no_grad()
def states_along(model: Denoiser, count: int, steps: int, noted: Collection[int]) -> dict[int, list[State]]:
    """Draw `count` clips by Euler without guidance, and return the attentions of the evaluations in `noted`.

    The model predicts data on the linear path; labels are spread over its classes.
    """
    convention = model.config.convention
    if (convention.path, convention.prediction) != ("linear", "data"):
        raise ValueError(f"{convention}, expected a prediction of data on the linear path")
    cond = Cond(label=torch.arange(count) * model.config.classes // count)
    x = SampleNoise(range(count), model.sample_shape).draw(torch.device("cpu"))
    found: dict[int, list[State]] = {}
    for i in range(max(noted) + 1):
        t, run = 1 - i / steps, Noting()
        data = model(x, torch.full((count,), t), cond, run)
        if i in noted:
            found[i] = run.states
        x = x - (x - data) / (t * steps)
    return found


def of_tokens(pattern: Pattern, grid: Grid) -> Tensor:
    """Which tokens a pattern lets see which, bool [L, L], in the model's order."""
    plan = pattern.plan(grid, 0)
    (pairs,) = plan.mask().flatten(0, 1)
    inverse = plan.inverse[: grid.length]
    return pairs[inverse][:, inverse]


def masked(weights: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return what attention gives under a mask [L, L], and the share of each row's softmax that it keeps [B, N, L]."""
    seen = weights * mask
    kept = seen.sum(-1)
    return seen @ v / kept[..., None], kept


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """Squared distance over the exact output's square, for each clip [B]."""
    return (found - exact).square().flatten(1).sum(1) / exact.square().flatten(1).sum(1)


def interpolated(density: float, densities: Sequence[float], errors: Sequence[Tensor]) -> Tensor:
    """Errors at a density between those of a family of masks, linear in the density.

    Raises:
        ValueError: the density lies outside of the family's.
    """
    pairs = sorted(zip(densities, errors, strict=True), key=lambda pair: pair[0])
    for (low, before), (high, after) in pairwise(pairs):
        if low <= density <= high:
            share = (density - low) / (high - low) if high > low else 0.0
            return before + share * (after - before)
    raise ValueError(f"density {density:.3g} lies outside of {pairs[0][0]:.3g} to {pairs[-1][0]:.3g}")


def balls(grid: Grid) -> Iterator[Tensor]:
    """Yield masks of the tokens within each radius, in tokens of any axis, from the smallest: bool [L, L]."""
    at = grid.coordinates().float()
    apart = (at[:, None] - at).square().sum(-1)
    for square in apart.unique().tolist():
        yield apart <= square


def trained_for(model: Denoiser) -> str:
    """How long the model was trained, by its card."""
    steps = [entry.get("steps") for entry in getattr(model, "history", ()) if "trained" in entry]
    return f"after {'+'.join(map(str, steps))} steps" if steps else "with weights of unknown training"
