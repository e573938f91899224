"""Claims of a paper tried at the size of one's own machine: the paper's figure, ours, its interval and the verdict.

A system's claims are one file, `benchmarks/results/claims/NN-name.json`, written by `ditkit.bench.claims.write`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ditkit.core.errors import ConfigError, unknown

Verdict = Literal["held", "refuted", "not resolved at this size", "not tried"]
Interval = tuple[float, float]
Bounds = tuple[float | None, float | None]
"""A claimed range without its ends; None where it is open: (None, 0.0) says less than zero."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
HELD, REFUTED, UNRESOLVED, UNTRIED = VERDICTS
FOLDER = "benchmarks/results/claims"
ORIGIN = ("command", "date", "device", "threads", "versions")
"""The keys that a claims file must have about its run."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. `Claim.tried` decides the verdict; nobody writes it by hand.

    Attributes:
        claim: one sentence, as it would be true.
        paper: the paper's figure and its setting, or that it gives none.
        ours: the figure measured here; None if not tried.
        unit: of `ours`, of the interval and of the claimed range; empty for a pure number.
        interval: the 95 % interval of `ours`; both ends equal where the figure is counted, not estimated.
        claimed: the range in which the claim says that the figure lies.
        against: the rivals and controls that it was measured beside.
        verdict: `held`, `refuted`, `not resolved at this size` or `not tried`.
        reason: of not trying it, or a remark.
    """

    claim: str
    paper: str
    verdict: Verdict
    ours: float | None = None
    unit: str = ""
    interval: Interval | None = None
    claimed: Bounds | None = None
    against: str = ""
    reason: str = ""

    @classmethod
    def tried(
        cls,
        claim: str,
        *,
        paper: str,
        ours: float,
        interval: Interval,
        claimed: Bounds,
        unit: str = "",
        against: str = "",
        reason: str = "",
    ) -> Claim:
        """Return a measured claim with the verdict that follows from its interval.

        Raises:
            ConfigError: a figure that is not finite, outside its interval, or a range that is none.
        """
        tried = cls(
            claim=claim,
            paper=paper,
            verdict=judge(interval, claimed),
            ours=float(ours),
            unit=unit,
            interval=(float(interval[0]), float(interval[1])),
            claimed=claimed,
            against=against,
            reason=reason,
        )
        for problem in tried.problems():
            raise ConfigError(f"claim {claim!r}: {problem}")
        return tried

    @classmethod
    def untried(cls, claim: str, *, paper: str, reason: str) -> Claim:
        """Return a claim that is listed and not tried, with the reason.

        Raises:
            ConfigError: no reason is given.
        """
        untried = cls(claim=claim, paper=paper, verdict=UNTRIED, reason=reason)
        for problem in untried.problems():
            raise ConfigError(f"claim {claim!r}: {problem}")
        return untried

    def problems(self) -> Iterator[str]:
        """Yield everything that is wrong with it, one line each."""
        if not self.claim or not self.paper:
            yield "claim and paper must not be empty; say in words where the paper gives no figure"
        if self.verdict not in VERDICTS:
            yield unknown("verdict", self.verdict, VERDICTS)
        elif self.verdict == UNTRIED:
            if not self.reason:
                yield f"verdict is {UNTRIED!r} without its reason"
            if self.ours is not None or self.interval is not None:
                yield f"verdict is {UNTRIED!r} and a figure is given"
        elif self.ours is None or self.interval is None or self.claimed is None:
            missing = [name for name in ("ours", "interval", "claimed") if getattr(self, name) is None]
            yield f"verdict is {self.verdict!r} without its {', '.join(missing)}"
        elif not all(map(math.isfinite, (self.ours, *self.interval))):
            yield f"ours = {self.ours} in {self.interval}, expected finite numbers"
        elif not self.interval[0] <= self.ours <= self.interval[1]:
            yield f"ours = {self.ours} lies outside its interval {self.interval}"
        elif self.verdict != (follows := judge(self.interval, self.claimed)):
            yield f"verdict is {self.verdict!r}, but {follows!r} follows from its interval and claimed range"


def judge(interval: Interval, claimed: Bounds) -> Verdict:
    """Return `held` where all of the interval lies inside the claimed range, `refuted` where all lies outside of it.

    The ends of the range are not part of it and not outside of it: an interval that ends on one resolves nothing.

    Raises:
        ConfigError: a range or an interval whose ends are in the wrong order or not numbers.
    """
    least = -math.inf if claimed[0] is None else claimed[0]
    most = math.inf if claimed[1] is None else claimed[1]
    low, high = interval
    if not least < most:
        raise ConfigError(f"claimed={claimed}, expected (low, high) with low < high, or None for an open end")
    if not low <= high:
        raise ConfigError(f"interval={interval}, expected (low, high) with low <= high")
    if least < low and high < most:
        return HELD
    if high < least or most < low:
        return REFUTED
    return UNRESOLVED


@dataclass(frozen=True, kw_only=True)
class Claims:
    """A claims file.

    Attributes:
        system: the row's stem.
        command, date, device, threads, load, versions: of the run, as every result has them.
        core_seconds: processor time of the run.
        code: digests of the code that was measured: of each component by its import path, of the script by its path.
        claims: what was tried, and what was not.
    """

    system: str
    command: str
    date: str
    device: str
    threads: int
    versions: Mapping[str, str]
    code: Mapping[str, str]
    claims: tuple[Claim, ...]
    load: float = 0.0
    core_seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return asdict(self)

    def problems(self) -> Iterator[str]:
        """Yield everything in it that is not as a claims file should be, one line each."""
        for name in ORIGIN:
            if not getattr(self, name):
                yield f"{name} is empty"
        if all(claim.verdict == UNTRIED for claim in self.claims):
            yield "no claim was tried"
        for claim in self.claims:
            yield from (f"claim {claim.claim!r}: {problem}" for problem in claim.problems())


def read_claims(path: Path) -> Claims:
    """Read a claims file; `Claims.problems` says whether what it holds makes sense.

    Raises:
        ConfigError: the file is missing, is not JSON, or has other keys or types than `Claims`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path.name}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not JSON: {error}") from None
    table = _table(Claims, document, path.name)
    found = table["claims"]
    if not isinstance(found, list):
        raise ConfigError(f"{path.name}: claims should be a list, not a {type(found).__name__}")
    for name in ("code", "versions"):
        if not isinstance(table[name], dict):
            raise ConfigError(f"{path.name}: {name} should be an object, not a {type(table[name]).__name__}")
    claims = tuple(_claim(item, f"{path.name}: claim {n}") for n, item in enumerate(found, start=1))
    return Claims(**{**table, "claims": claims})


def _claim(item: object, source: str) -> Claim:
    table = _table(Claim, item, source)
    for name in ("interval", "claimed"):
        pair = table.get(name)
        if pair is None:
            continue
        numbers = (int, float) if name == "interval" else (int, float, type(None))
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(end) in numbers for end in pair):
            raise ConfigError(f"{source}: {name} = {pair!r}, expected [low, high]")
        table[name] = tuple(pair)
    ours = table.get("ours")
    if ours is not None and type(ours) not in (int, float):
        raise ConfigError(f"{source}: ours = {ours!r}, expected a number or null")
    for name in ("claim", "paper", "verdict", "unit", "against", "reason"):
        if not isinstance(table.get(name, ""), str):
            raise ConfigError(f"{source}: {name} = {table[name]!r}, expected a string")
    return Claim(**table)


def _table(kind: type, value: object, source: str) -> dict[str, Any]:
    """Return a JSON object that has the keys of a dataclass, all that have no default among them."""
    if not isinstance(value, dict):
        raise ConfigError(f"{source} should hold a JSON object, not a {type(value).__name__}")
    names = [field.name for field in fields(kind)]
    for key in sorted(value.keys() - set(names)):
        raise ConfigError(f"{source}: {unknown('key', key, names)}")
    if missing := [f.name for f in fields(kind) if f.default is MISSING and f.name not in value]:
        raise ConfigError(f"{source}: missing key {', '.join(missing)}")
    return dict(value)
