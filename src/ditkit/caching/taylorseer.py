"""Forecasts from what full evaluations returned (TaylorSeer, arXiv 2503.06923), as weighted sums of it.

Differences exist as coefficients of the kept outputs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import isnan
from typing import ClassVar, Literal, Self

from torch import nn

from ditkit.caching.branch_cache import BranchCache, Cached
from ditkit.core.config import Count, Natural
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid
from ditkit.core.run import Call, Site

Coefficients = tuple[tuple[float, ...], ...]
"""Row i: what each kept output counts in the difference g_i, latest first."""
Axis = Literal["call", "sigma"]
Basis = Literal["taylor", "newton"]


@dataclass(frozen=True)
class TaylorSeer(BranchCache):
    """Compute one evaluation in `interval`, and forecast every branch in the others.

    A full evaluation at s, d after the full one before it, turns a branch's factors f into g_0 = F(s) and
    g_{i+1} = (g_i - f_i) / d. A skipped one, k after s, uses sum_i g_i k^i / i! with i up to `order`. The last of the
    warm-up takes the first difference, of itself and the one before it; those before it leave their values only.

    Args:
        interval: evaluations from one full one to the next; 1 computes all of them.
        order: highest difference kept; 0 is plain reuse (FORA).
        warmup: evaluations at the start that are all full.
        axis: distances in evaluations ("call", the paper's) or in noise-time ("sigma").
        basis: "taylor" is the paper's series. "newton" is not: it extrapolates the polynomial through the
            latest `order + 1` full evaluations.
    """

    interval: Count = 4
    order: Natural = 2
    warmup: Count = 2
    axis: Axis = "call"
    basis: Basis = "taylor"

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(interval=3, order=1)

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Forecaster:
        if self.warmup > total:
            raise ConfigError(f"TaylorSeer: warmup={self.warmup}, expected at most total={total} evaluations")
        return Forecaster(self, sites, total)

    def exact(self) -> TaylorSeer:
        return replace(self, interval=1)

    @property
    def kept(self) -> int:  # type: ignore[override]
        return self.order + 1

    def decide(self, step: int) -> bool:
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0

    def keep(self, step: int) -> int:
        """Two outputs in the warm-up: no published `taylor_utils` takes a difference before its last evaluation."""
        is_whole = self.basis == "newton" or step >= self.warmup
        return self.kept if is_whole else min(self.kept, 2)

    def place(self, call: Call) -> float:
        if self.axis == "call":
            return call.index
        if isnan(call.t):
            raise ConfigError(
                "TaylorSeer: axis='sigma' expected one noise-time a call, got t=nan (one a token)"
            )
        return call.t

    def predict(self, place: float, anchors: Sequence[float]) -> Sequence[float]:
        """sum_i g_i k^i / i!, with the differences g as the full evaluations left them, one after the other."""
        differences: Coefficients = ()
        for age in reversed(range(len(anchors))):
            differences = update_coefficients(differences, self.spans(anchors[age], anchors[age + 1 :]))
        return output_weights(self.weights(place, anchors), differences)

    def spans(self, place: float, anchors: Sequence[float]) -> list[float]:
        """Divisors of the differences taken at `place`, after full evaluations at `anchors`, latest first."""
        nearest = anchors[: self.order]
        return [place - (anchor if self.basis == "newton" else anchors[0]) for anchor in nearest]

    def weights(self, place: float, anchors: Sequence[float]) -> list[float]:
        """Return the weight of each factor in a forecast at `place`; the first always counts 1."""
        weights = [1.0]
        for i in range(1, len(anchors)):
            last, by = (anchors[i - 1], 1) if self.basis == "newton" else (anchors[0], i)
            weights.append(weights[-1] * (place - last) / by)
        return weights


class Forecaster(Cached):
    """Kept outputs of the latest `order + 1` full evaluations."""

    verb: ClassVar[str] = "forecast"

    def fitting(self, need: int, allowed: int) -> str:
        """Name the highest order that fits; each takes as much as the others."""
        factor = need // self.most_kept
        order = allowed // factor - 1
        return f"order={order} would fit" if order >= 0 else f"order=0 would hold {factor:,}"


def update_coefficients(old: Coefficients, spans: Sequence[float]) -> Coefficients:
    """Return the differences one full evaluation later.

    g_0 = F, and g_{i+1} = (g_i - f_i) / span_i for each old f_i.
    """
    rows: list[tuple[float, ...]] = [(1.0,)]
    for f, span in zip(old, spans, strict=False):
        pairs = zip_longest(rows[-1], (0.0, *f), fillvalue=0.0)
        rows.append(tuple((g - earlier) / span for g, earlier in pairs))
    return tuple(rows)


def output_weights(weights: Sequence[float], differences: Coefficients) -> list[float]:
    """Return the weight of each kept output where each difference counts `weights`."""
    counts = [0.0] * len(differences)
    for weight, row in zip(weights, differences, strict=True):
        for place, coefficient in enumerate(row):
            counts[place] += weight * coefficient
    return counts
