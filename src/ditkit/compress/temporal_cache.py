"""Temporal features cached, maintained, or whichever is nearer (Temporal Feature Matters, arXiv 2407.19547).

On a schedule a temporal feature takes finitely many values. Each is computed in full precision and kept in few bits
with scales of its own, so that weights of 4 bits never touch it; where the maintained layers of TFMQ-DM come nearer,
they stay. The network is then reconstructed with the features that it will get.

R rows of time and condition, S steps, F features, N values, C chunks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.compress.calibration import Calibration
from ditkit.compress.quantised import (
    Fitting,
    Quantised,
    network_of,
    put,
    tensors_of_network,
)
from ditkit.compress.ranges import fit, span
from ditkit.compress.reconstruction import features, learn_features
from ditkit.compress.rounding import Rounded, Rounding
from ditkit.core.errors import ConfigError
from ditkit.core.transform import Transform
from ditkit.nn.quantised import FLOAT, QuantisedLinear, Schedule
from ditkit.nn.temporal_table import Absent, Conditions, TemporalTable, conditions_of
from ditkit.nn.time_path import TimePath, binder
from ditkit.ops.int8_linear import dequantise, quantise

Strategy = Literal["tib", "cache"]


@dataclass(frozen=True)
class TemporalFeatures(Quantised):
    """Quantise linear layers, and give blocks the temporal features that are nearest to those of full precision.

    A feature depends on the time, and on a class or a prompt's pooled text where the network adds one; it is known of
    the conditions that the calibration has.

    Args:
        strategies: "tib" maintains the layers as TFMQ-DM does; "cache" looks features up. With both, D = 1 - cosine to
            full precision decides; on a tie the cache.
        granularity: of the choice: for each "pair" of a step and a layer, each "layer", or all ("global").
        cache_bits: of what is looked up; 32 are floats.
        nearest: allow times that are none of the schedule, with the features of the nearest one.
        cached, kept, conditions, reads: found, and left to be found: the features of which some step is looked up,
            those of which some is computed, and the conditions that are known, of which arguments.
        weights, activations, ranges and the others: as of `Quantised`; all steps have ranges, whatever the interval.
    """

    keeps = (*QuantisedLinear.keeps, *TemporalTable.keeps)

    strategies: tuple[Strategy, ...] = ("tib", "cache")
    granularity: Literal["pair", "layer", "global"] = "pair"
    cache_bits: Literal[2, 4, 8, 32] = 8
    nearest: bool = False
    cached: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return bool(self.strategies) or super().fits

    @property
    def traces(self) -> bool:
        return bool(self.strategies) or super().traces

    def ranged(self, calibration: Calibration) -> Calibration:
        return calibration

    def resolved(self, model: Any, calibration: Any = None) -> Self:
        found = super().resolved(model, calibration)
        path: TimePath | None = vars(found).get("_found")
        if path is None or not self.strategies:
            return found
        selection = Selection.of(found, model, path, calibration)
        looked_up = selection.looked_up
        settled = replace(
            found,
            cached=tuple(name for name, own in zip(found.features, looked_up, strict=True) if own.any()),
            kept=tuple(name for name, own in zip(found.features, looked_up, strict=True) if not own.all()),
            conditions=tuple(selection.known),
            reads=path.reads[1:],
        )
        object.__setattr__(settled, "_selection", selection)
        return self._carrying(settled, path)

    def schedule(self) -> Schedule:
        return Conditions(self.times, bool(self.cached) and not self.nearest, self.conditions, self.reads)

    def place(self, name: str) -> str:
        if self.weights == FLOAT or (
            self.cached and name in (*self.features, *self.shared) and not self.kept
        ):
            return ""
        if name in self.features and name not in self.kept and self.cached:
            return ""
        return f"{name}.layer" if name in self.cached else name

    def shape(self, model: Any) -> Any:
        schedule = self.schedule()
        if self.times:
            network = network_of(model, self.network)
            schedule.attach(network, binder(network))
        for name in dict.fromkeys((*self.layers, *self.cached)):
            put(model, name, self._table(model, name, schedule))
        if self.cached and not self.kept:
            for name in self.shared:
                put(model, name, Absent(model.get_submodule(name).out_features))
        return model

    def _table(self, model: Any, name: str, schedule: Any) -> nn.Module:
        """Return what takes the place of a layer: a table, a layer of whole numbers, or the one before the other."""
        old = model.get_submodule(name)
        whole = old if self.weights == FLOAT or name not in self.layers else self.layer(model, name, schedule)
        if name not in self.cached:
            return whole
        inputs, outputs = old.in_features, old.out_features
        return TemporalTable(
            whole if name in self.kept else None,
            inputs,
            outputs,
            steps=len(self.times),
            conditions=len(self.conditions),
            chunks=chunks_of(inputs, outputs),
            bits=self.cache_bits,
            schedule=schedule,
            device=old.weight.device,
        )

    def round_time_path(self, fitting: Fitting) -> None:
        selection: Selection | None = vars(self).get("_selection")
        if selection is None:
            return
        fitting.left |= {*self.features, *self.shared}
        for name, layer in fitting.time_path.items():
            if name in selection.rounded:
                with torch.no_grad():
                    layer.alpha.copy_(selection.rounded[name].alpha)
                layer.mode = "hard"
        for name, given, own in zip(self.features, selection.inputs, selection.chosen, strict=True):
            linear = fitting.rounded[name].linear if name in fitting.rounded else None
            if linear is not None:
                fitting.beside[name] = Provided(linear, given, own)
                put(fitting.model, name, fitting.beside[name])
        fitting.report |= selection.report

    def finish(self, model: Any) -> None:
        selection: Selection | None = vars(self).pop("_selection", None)
        if selection is not None:
            selection.fill(model, self)

    def fixed(self, model: Any) -> list[str]:
        gone = (QuantisedLinear, TemporalTable, Absent)
        return [name for name, m in model.named_modules() if isinstance(m, gone)]

    def origin(self, name: str) -> str:
        for at in self.cached:
            if name.startswith(f"{at}.layer."):
                return at + name.removeprefix(f"{at}.layer")
        return name

    def exact(self) -> Self:
        return replace(super().exact(), strategies=())

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        inside = tuple(stack.path + "." for stack in model.stacks().values())
        found = tuple(n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(inside))
        return (cls(rounding="nearest", ranges="rows", strategies=(), layers=found),)


class Provided(nn.Module):
    """A layer that gives, for each row it is given, the feature that was chosen for it.

    Args:
        inputs: [R, K] of all rows that there are. chosen: their features [R, N].
    """

    def __init__(self, linear: nn.Linear, inputs: Tensor, chosen: Tensor) -> None:
        super().__init__()
        self.linear, self.inputs, self.chosen = linear, inputs, chosen
        self.in_features, self.out_features, self.mode = linear.in_features, linear.out_features, "hard"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "full":
            full: Tensor = self.linear(x)
            return full
        rows = torch.cdist(x.detach().reshape(-1, self.in_features), self.inputs).argmin(1)
        return self.chosen[rows].view(*x.shape[:-1], self.out_features)


@dataclass
class Selection:
    """The features of all rows by each strategy, their errors, and the choice.

    Attributes:
        steps: [R], the step of each row. places: [R], its condition among `known`.
        errors: [F, S] by strategy, mean over conditions of 1 - cosine. looked_up: bool [F, S].
        inputs, full, chosen: [R, K], [R, N] and [R, N] of each feature: inputs of the layers as they will be, the
            feature in full precision, and what blocks will get.
    """

    steps: list[int]
    places: list[int]
    known: list[str]
    errors: dict[str, Tensor]
    looked_up: Tensor
    rounded: dict[str, Rounded]
    inputs: list[Tensor]
    full: list[Tensor]
    chosen: list[Tensor]
    tables: list[list[tuple[Tensor, Tensor, Tensor]]]
    report: dict[str, Any]

    @classmethod
    def of(cls, setting: TemporalFeatures, model: Any, path: TimePath, calibration: Calibration) -> Selection:
        """Compute both strategies and choose.

        Raises:
            ConfigError: a step lacks a condition that others have.
        """
        network = network_of(model, setting.network)
        weights, rows = tensors_of_network(network), calibration.rows(path.reads)
        steps = [setting.times.index(t) for t in rows[path.reads[0]].double().tolist()]
        digests = conditions_of(rows, path.reads[1:])
        known = list(dict.fromkeys(digests))
        places = [known.index(digest) for digest in digests]
        if len(set(zip(steps, places, strict=True))) < len(setting.times) * len(known):
            raise ConfigError(
                f"TemporalFeatures: calibration has {len(steps)} of {len(setting.times)} x {len(known)} steps and "
                "conditions, expected every condition at every step"
            )
        full, report = features(path, rows, weights), dict[str, Any]()
        own: dict[str, list[Tensor]] = {}
        rounded: dict[str, Rounded] = {}
        inputs = features(path, rows, weights, inputs=True)
        if "tib" in setting.strategies and setting.weights != FLOAT:
            rounded, seconds = _maintained(setting, network, path, rows, weights)
            report["maintenance_seconds"] = seconds
            hard = {**weights, **{f"{n}.weight": layer.weights() for n, layer in rounded.items()}}
            inputs = features(path, rows, hard, inputs=True)
            own["tib"] = [
                _computed(setting, x, hard[f"{n}.weight"], weights.get(f"{n}.bias"), steps)
                for n, x in zip(path.features, inputs, strict=True)
            ]
        began = time.perf_counter()
        tables = [
            [_kept(setting, row, x.shape[1]) for row in one] for one, x in zip(full, inputs, strict=True)
        ]
        if "cache" in setting.strategies:
            own["cache"] = [torch.stack([_back(*row) for row in one]) for one in tables]
            report["cache_seconds"] = round(time.perf_counter() - began, 4)
        errors = {name: _errors(found, full, steps, len(setting.times)) for name, found in own.items()}
        looked_up = _choose(setting, errors)
        taken = [
            torch.where(
                looked_up[i][torch.tensor(steps)][:, None], own.get("cache", full)[i], own.get("tib", full)[i]
            )
            for i in range(len(full))
        ]
        report["looked_up"] = looked_up.sum(1).tolist()
        report["errors"] = {
            name: [float(f"{v:.3e}") for v in one.mean(1).tolist()] for name, one in errors.items()
        }
        return cls(steps, places, known, errors, looked_up, rounded, inputs, full, taken, tables, report)

    def fill(self, model: Any, setting: TemporalFeatures) -> None:
        """Fill the tables of `model`."""
        for i, name in enumerate(setting.features):
            if name not in setting.cached:
                continue
            table: Any = model.get_submodule(name)
            table.looked_up.copy_(self.looked_up[i])
            for step, place, row in zip(self.steps, self.places, self.tables[i], strict=True):
                table.hold(step, place, *row)


def _maintained(
    setting: TemporalFeatures,
    network: nn.Module,
    path: TimePath,
    rows: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> tuple[dict[str, Rounded], float]:
    """Round the time path as TFMQ-DM does, on the side; by name in the network, and the seconds it took."""
    began = time.perf_counter()
    prefix = setting.network + "." if setting.network else ""
    chosen = [name for name in path.layers if prefix + name in setting.layers]
    rounded: dict[str, Rounded] = {}
    for name in chosen:
        linear: Any = network.get_submodule(name)
        rounded[name] = Rounded(linear, setting.weights)
    if setting.rounding == "learned":
        settings = Rounding(setting.iterations, setting.rate, setting.batch)
        learn_features(path, rows, weights, rounded, settings, setting.seed)
    for layer in rounded.values():
        layer.mode = "hard" if setting.rounding == "learned" else "nearest"
    return rounded, round(time.perf_counter() - began, 4)


@torch.no_grad()
def _computed(
    setting: TemporalFeatures, x: Tensor, weight: Tensor, bias: Tensor | None, steps: Sequence[int]
) -> Tensor:
    """Compute a feature from inputs [R, K] that are rounded by the ranges that the layers will have."""
    if setting.activations != FLOAT and setting.ranges == "rows":
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-8) / (2 ** (setting.activations - 1) - 1)
        x = (x / scale).round() * scale
    elif setting.activations != FLOAT:
        index, x = torch.tensor(steps if setting.ranges == "steps" else [0] * len(x)), x.clone()
        for step in set(index.tolist()):
            own = index == step
            scale, zero = span(x[own].reshape(1, -1), setting.activations)
            x[own] = dequantise(quantise(x[own], scale, zero, setting.activations), scale, zero)
    return F.linear(x, weight, bias)


def chunks_of(inputs: int, outputs: int) -> int:
    """Return how many parts a feature has: shifts, scales and gates as wide as its input."""
    return outputs // inputs if outputs % inputs == 0 else 1


def _kept(setting: TemporalFeatures, row: Tensor, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a feature [N] in chunks: whole numbers [N], scale and zero point [C]; floats stay."""
    if setting.cache_bits == FLOAT:
        return row.float(), torch.ones(1), torch.zeros(1)
    parts = row.float().view(chunks_of(inputs, len(row)), -1)
    low, high = parts.amin(1), parts.amax(1)
    known = fit(low.clamp(max=0), high.clamp(min=0), setting.cache_bits)
    return quantise(parts, known.scale[:, None], known.zero[:, None], setting.cache_bits).flatten(), *known


def _back(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return dequantise(q.view(len(scale), -1), scale[:, None], zero[:, None]).flatten()


def _errors(own: Sequence[Tensor], full: Sequence[Tensor], steps: Sequence[int], count: int) -> Tensor:
    """Return 1 - cosine of each feature at each step, mean over conditions, [F, S]."""
    index, found = torch.tensor(steps), []
    for a, b in zip(own, full, strict=True):
        apart = 1 - F.cosine_similarity(a.double(), b.double(), -1)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, apart)
        found.append(sums / torch.bincount(index, minlength=count))
    return torch.stack(found)


def _choose(setting: TemporalFeatures, errors: Mapping[str, Tensor]) -> Tensor:
    """Return which features are looked up at which steps, bool [F, S]."""
    one = next(iter(errors.values()))
    if len(errors) == 1:
        return torch.full(one.shape, "cache" in errors)
    cache, tib = errors["cache"], errors["tib"]
    if setting.granularity == "pair":
        return cache <= tib
    if setting.granularity == "layer":
        return (cache.sum(1) <= tib.sum(1))[:, None].expand(one.shape)
    return (cache.sum() <= tib.sum()).expand(one.shape)
