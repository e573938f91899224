"""HarmoniCa (arXiv 2410.01723): a trained table says which branches are computed at which step; the others are reused.

T evaluations of a trajectory, M branches of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ditkit.caching.branch_cache import feature_bytes, geometry_of
from ditkit.core.checkpoint import digest, read_json, write_json
from ditkit.core.codec import fingerprint
from ditkit.core.config import Checked, config_of
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.grid import Grid
from ditkit.core.policy import Claim, Policy, Session, detached
from ditkit.core.run import Call, Handler, Site, named

KIND = "cache table"
SAME_TIME = 1e-4
"""Distance in noise-time up to which two schedules visit the same time."""
COMPUTED, REUSED = "1", "0"


@dataclass(frozen=True)
class CacheTable(Checked):
    """The result of a training for one model and one schedule.

    Args:
        model: its class. sites: digest of its branches.
        sampler: the solver or scheduler. times: noise-times of the evaluations, from noise to data.
        rows: a word an evaluation, a letter a branch: 1 is computed, 0 reused.
        rates: r of each evaluation and branch, of which those above `threshold` are computed.
        threshold: the paper's tau.
        weights: SHA-256 of the tensors that it was trained on; empty where they were not known.
        training: what the training was asked for: guidance, trajectories, the weight of a computed branch.
    """

    model: str
    sites: str
    sampler: str
    times: tuple[float, ...]
    rows: tuple[str, ...]
    rates: tuple[tuple[float, ...], ...] = ()
    threshold: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    weights: str = ""
    training: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows("CacheTable", self.rows)
        if len(self.rows) != len(self.times):
            raise ConfigError(
                f"CacheTable: {len(self.rows)} rows for {len(self.times)} evaluations, expected one each"
            )

    @property
    def reused(self) -> float:
        """The paper's cache utilisation ratio: the share of (evaluation, branch) pairs that are reused."""
        letters = "".join(self.rows)
        return letters.count(REUSED) / len(letters)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table.

        Raises:
            CheckpointError: there is none, or the file is something else.
        """
        given = read_json(Path(path))
        if given.pop("kind", None) != KIND:
            raise CheckpointError(f"{path}: expected a cache table, such as `ditkit harmonise` writes")
        return config_of(cls, given, path)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON, atomically.

        Raises:
            ConfigError: it cannot be written.
        """
        path = Path(path)
        write_json(path, {"kind": KIND, **asdict(self)})
        return path


@dataclass(frozen=True)
class HarmoniCa(Policy):
    """A branch is computed at an evaluation, or its output of the latest one before the gate is taken again.

    Gates, modulations, embeddings and the head are always computed. The first evaluation computes all.

    Args:
        table: file of a training (`ditkit harmonise`), which refuses another model, sampler, schedule or number of
            evaluations.
        rows: in place of a file, a word an evaluation, a letter a branch: `11+01`, 1 computed and 0 reused. The words
            are repeated to the end; one letter stands for all branches.
        weights: "same" refuses a table of other weights, where they are known (not in a pipeline); "any" takes it.
    """

    table: str = ""
    rows: tuple[str, ...] = ()
    weights: Literal["same", "any"] = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.table) == bool(self.rows):
            given = f"table={self.table} with rows={'+'.join(self.rows)}" if self.table else "neither"
            raise ConfigError(f"HarmoniCa: got {given}, expected one of table=FILE and rows=111+001")
        if self.rows:
            check_rows("HarmoniCa", self.rows)

    @classmethod
    def small(cls, grid: Grid) -> HarmoniCa:
        return cls(rows=("1", "0"))

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return {"schedule": "own", **dict.fromkeys(named(sites, "branch"), "own")}

    def check_model(self, model: Any) -> None:
        if self.table and self.weights == "same":
            table = CacheTable.load(self.table)
            if table.weights and table.weights != (found := fingerprint(model.state_dict())):
                raise ConfigError(
                    f"HarmoniCa: {self.table} was trained on weights {table.weights[:12]}, got {found[:12]}; train "
                    "again, or say weights=any"
                )

    def check_schedule(self, times: Sequence[float], sampler: str) -> None:
        if not self.table:
            return
        table = CacheTable.load(self.table)
        if sampler != table.sampler:
            raise ConfigError(
                f"HarmoniCa: {self.table} was trained for {table.sampler}, got {sampler}; train again"
            )
        if len(times) != len(table.times):
            raise ConfigError(
                f"HarmoniCa: {self.table} is of {len(table.times)} evaluations, got {len(times)}; train again"
            )
        for i, (given, own) in enumerate(zip(times, table.times, strict=True)):
            if abs(given - own) > SAME_TIME:
                raise ConfigError(
                    f"HarmoniCa: {self.table} has evaluation {i} at t={own:.4f}, got {given:.4f}; train again"
                )

    def computed(self, sites: Sequence[Site], total: int) -> list[str]:
        """Return a word of a letter a branch for each of `total` evaluations.

        Raises:
            ConfigError: the table is of another model, or of another number of evaluations or branches.
        """
        branches = named(sites, "branch")
        rows = self.rows
        if self.table:
            table = CacheTable.load(self.table)
            if table.sites != branch_digest(sites):
                raise ConfigError(
                    f"HarmoniCa: {self.table} is of {table.model} with {len(table.rows[0])} branches, got others: "
                    f"{len(branches)}; train again"
                )
            if len(table.rows) != total:
                raise ConfigError(
                    f"HarmoniCa: {self.table} is of {len(table.rows)} evaluations, got {total}; train again"
                )
            rows = table.rows
        words = [rows[i % len(rows)] for i in range(total)]
        words = [word * len(branches) if len(word) == 1 else word for word in words]
        if wrong := [word for word in words if len(word) != len(branches)]:
            raise ConfigError(
                f"HarmoniCa: rows={wrong[0]} has {len(wrong[0])} letters, the model {len(branches)} branches"
            )
        return words

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        return Reused(named(sites, "branch"), self.computed(sites, total), sites)

    def exact(self) -> HarmoniCa:
        return replace(self, table="", rows=(COMPUTED,))


class Reused(Session):
    """The latest output of each branch of a lane that a later evaluation takes again."""

    verb: ClassVar[str] = "reused"

    def __init__(self, branches: Sequence[str], rows: Sequence[str], sites: Sequence[Site] = ()) -> None:
        super().__init__()
        self.branches, self.words, self.sites = list(branches), list(rows), sites
        self._most = max((row.count(REUSED) for row in rows[1:]), default=0)
        self._each = 0  # bytes of the largest output in every lane

    def enter(self, call: Call) -> Mapping[str, Handler]:
        lane, index = (call.net, call.lane), call.index
        before: Any = self.state.get(lane)
        # a lane that is new, away or of another shape has nothing to take again
        is_next = before is not None and before[0] == index - 1 and before[1] == geometry_of(call)
        row = self.words[index] if is_next else COMPUTED * len(self.branches)
        after = self.words[index + 1] if index + 1 < len(self.words) else COMPUTED * len(self.branches)
        shapes: list[Any] = []
        self.put(lane, (index, geometry_of(call), shapes))
        expected = before[2] if is_next else None
        handlers: dict[str, Handler] = {}
        for j, name in enumerate(self.branches):
            key = (*lane, name)
            known = None if row[j] == COMPUTED else self.state.get(key)
            handlers[name] = partial(self._branch, key, known, after[j] == REUSED, shapes, expected)
        return handlers

    def _branch(
        self,
        key: tuple[str, ...],
        known: Any,
        keeps: bool,
        shapes: list[Any],
        expected: list[Any] | None,
        fn: Handler,
        x: Any,
        *args: Any,
    ) -> Any:
        if not shapes:
            shapes.extend(leaf.shape for leaf in tree_leaves(x))
        out = fn(x, *args) if known is None or shapes != expected else known
        self.put(key, detached(out) if keeps else None)
        return out

    def commit(self) -> None:
        super().commit()
        lanes = {key[:2] for key in self.state}
        largest = [
            max(
                (
                    t.nbytes
                    for key, v in self.state.items()
                    if key[:2] == lane and len(key) > 2
                    for t in tree_leaves(v)
                    if isinstance(t, Tensor)
                ),
                default=0,
            )
            for lane in lanes
        ]
        self._each = max(self._each, sum(largest))

    def projected_bytes(self) -> int:
        """With all that the row with the most kept branches keeps, for the lanes so far."""
        return max(self.bytes(), self._each * self._most)

    def foreseen_bytes(self, call: Call, tokens: Any) -> int:
        """Before anything is kept: a branch returns as much as the tokens of its stream."""
        if self.state:
            return self.projected_bytes()
        branches = [site for site in self.sites if site.kind == "branch"]
        return feature_bytes(branches, tokens, call.layout) * self._most // max(len(branches), 1)


class Mixed(Session):
    """Training's soft session: r a + (1 - r) c of a fresh output a and a kept one c.

    The mixture, cut from autograd, is kept where r is above the threshold; an evaluation without a row computes all.

    Args:
        rates: by evaluation, r [M] or None for r = 1.
    """

    def __init__(self, branches: Sequence[str], rates: Sequence[Tensor | None], threshold: float) -> None:
        super().__init__()
        self.branches, self.rates, self.threshold = list(branches), list(rates), threshold

    def enter(self, call: Call) -> Mapping[str, Handler]:
        row, lane = self.rates[call.index], (call.net, call.lane)
        each = [None] * len(self.branches) if row is None else row.unbind()
        return {
            name: partial(self._branch, (*lane, name), rate, self.state.get((*lane, name)))
            for name, rate in zip(self.branches, each, strict=True)
        }

    def _branch(self, key: tuple[str, ...], rate: Tensor | None, kept: Any, fn: Handler, *args: Any) -> Any:
        fresh = fn(*args)
        if rate is None or kept is None:
            self.put(key, detached(fresh))
            return fresh
        r = rate
        mixed = tree_map(lambda a, c: r.to(a.dtype) * a + (1 - r.to(a.dtype)) * c, fresh, kept)
        if rate.item() > self.threshold:
            self.put(key, detached(mixed))
        return mixed


def check_rows(owner: str, rows: Sequence[str]) -> None:
    """Raise ConfigError, in the name of `owner`, unless rows are words of 0 and 1 of one length, or one letter."""
    for word in rows:
        if not word or set(word) - {COMPUTED, REUSED}:
            raise ConfigError(f"{owner}: rows has {word!r}, expected letters of 1 (computed) and 0 (reused)")
    if not rows or len({len(word) for word in rows} - {1}) > 1:
        raise ConfigError(f"{owner}: rows={'+'.join(rows)}, expected words of one length")


def branch_digest(sites: Sequence[Site]) -> str:
    """Return a digest of a model's branches: their names, streams and widths."""
    return digest([list(site[:4]) for site in sites if site.kind == "branch"])


def uniform(steps: int, every: int = 2) -> tuple[str, ...]:
    """Return rows that compute all branches at one evaluation in `every`, and none at the others."""
    return tuple(COMPUTED if i % every == 0 else REUSED for i in range(steps))


def chosen(rates: Tensor, count: int) -> tuple[str, ...]:
    """Return the rows that compute the `count` branches of the highest rates [T, M], among them all of the first row.

    Raises:
        ConfigError: `count` leaves no room for the first row, or is more than all.
    """
    T, M = rates.shape
    if not M <= count <= T * M:
        raise ConfigError(f"chosen: count={count} of {T} x {M} branches, expected {M} to {T * M}")
    ranked = rates.detach().clone()
    ranked[0] = torch.inf
    picked = torch.zeros(T * M, dtype=torch.bool)
    picked[ranked.flatten().argsort(descending=True, stable=True)[:count]] = True
    return tuple("".join(COMPUTED if on else REUSED for on in row) for row in picked.view(T, M).tolist())
