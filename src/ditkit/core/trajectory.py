"""Policies at work on one trajectory: who owns what, the handlers of each call, and the receipt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError, nearest, unknown
from ditkit.core.policy import RESOURCES, Claim, Policy, Session
from ditkit.core.receipt import PolicyReceipt
from ditkit.core.run import DIRECT, Call, Handler, Run, Site, named
from ditkit.core.spec import brief, components

DEPTH: dict[Claim, int] = {"own": 0, "wrap": 1, "see": 2}


class Trajectory:
    """All sessions of one sampling trajectory (or rollout); dies with it, so there is nothing to reset.

    Args:
        sites: the model's sites.
        policies: applied together; chained at a site with the owner innermost and watchers outermost.
        total: model evaluations a lane.
        max_bytes: memory that all policies may hold together.
        learned: parameters that policies were trained with, by class name; by default those that they begin with.

    Raises:
        ConflictError: two policies own the same site or resource.
        NoEffectError: a policy has no site it can use.
        ConfigError: what is given is no policy, claims a site that does not exist, or does not fit `total`;
            or `max_bytes` is no positive integer.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        policies: Policy | str | Sequence[Policy | str],
        total: int,
        max_bytes: int | None = None,
        learned: nn.ModuleDict | None = None,
    ) -> None:
        self.policies = components("policies", Policy, policies)  # type: ignore[type-abstract]
        self.total = total
        self.claims = claim(sites, self.policies)
        known = {} if learned is None else dict(learned.items())
        self.sessions = [
            policy.start(sites, total, known.get(type(policy).__name__)) for policy in self.policies
        ]
        depths = _depths(sites)
        tokens = named(sites, "tokens")
        stages = {site.name: site.stage for site in sites if site.kind == "tokens"}
        self.receipts = [
            PolicyReceipt(policy, session.verb, depths, stages, _owned(claims))
            for policy, session, claims in zip(self.policies, self.sessions, self.claims, strict=True)
        ]
        self.tokens = tokens
        self.max_bytes = None if max_bytes is None else integer("max_bytes", max_bytes, least=1)
        self.peak_bytes = 0

    def run(self, call: Call) -> Run:
        """Chain the handlers of all policies for this call."""
        if not self.sessions:
            return DIRECT
        chains: dict[str, list[tuple[int, Handler]]] = {}
        if self.max_bytes is not None:
            chains = {name: [(DEPTH["own"], partial(self._foresee, call))] for name in self.tokens}
        for claims, session, receipt in zip(self.claims, self.sessions, self.receipts, strict=True):
            session.staged.clear()  # what an interrupted call left
            session.computed.clear()
            receipt.begin(call)
            for name, handler in session.enter(call).items():
                if name not in claims:
                    kind = type(receipt.policy).__name__
                    raise ConfigError(
                        f"{kind} acts on {name!r}, which it did not claim{nearest(name, claims)}"
                    )
                watched = receipt.watch(name, handler)
                chains.setdefault(name, []).append((DEPTH[claims[name]], watched))
        return Run({name: _chain(handlers) for name, handlers in chains.items()})

    def rows(self, call: Call) -> Mapping[str, Tensor]:
        """By name of an attention, where the model's rows stand in its output; none where they are as they were."""
        return {name: rows for session in self.sessions for name, rows in session.rows(call).items()}

    def leave(self, call: Call, out: Any) -> Any:
        """Complete the call: outputs pass through the sessions, then all staged state is committed at once.

        Raises:
            ConfigError: the policies hold, or will hold, more than `max_bytes`.
        """
        for session in self.sessions:
            out = session.leave(call, out)
        for session, receipt in zip(self.sessions, self.receipts, strict=True):
            session.commit()
            receipt.end(session.computed)
            receipt.remarks = session.remarks
        self.peak_bytes = max(self.peak_bytes, sum(s.bytes() for s in self.sessions))
        self._keep_budget()
        return out

    def guided(self, call: Call, v: Tensor) -> Tensor:
        """Return the guided prediction for the solver, possibly replaced.

        Raises:
            ConfigError: the policies will hold more than `max_bytes`; some keep what guidance gave.
        """
        for session in self.sessions:
            v = session.guided(call, v)
        self._keep_budget()
        return v

    def finish(self) -> list[PolicyReceipt]:
        """End the trajectory and return the receipts.

        Raises:
            NoEffectError: a policy whose setting is not the neutral one was met at none of its sites, or owns
                sites or rows and computed them all.
        """
        for policy, claims, receipt in zip(self.policies, self.claims, self.receipts, strict=True):
            if policy == policy.exact():
                continue
            if not receipt.sites:
                line = f"{brief(policy)} met none of its sites in {receipt.calls} evaluations"
                raise NoEffectError("; ".join([line, *receipt.summary_parts()]))
            if policy.inherent:
                continue  # the model was trained so: it is no saving that could fail
            owns = any(how == "own" for name, how in claims.items() if name not in ("schedule", "solver"))
            if owns and not receipt.saved and not receipt.rows_saved:
                raise NoEffectError(
                    f"{brief(policy)} saved nothing: all {receipt.calls} evaluations were full"
                )
        return self.receipts

    def _foresee(self, call: Call, fn: Handler, *args: Any) -> Any:
        """Handle the embedded tokens, and refuse before the first block."""
        tokens = fn(*args)
        self._keep_budget(lambda session: session.foreseen_bytes(call, tokens))
        return tokens

    def _keep_budget(
        self, needs: Callable[[Session], int] = lambda session: session.projected_bytes()
    ) -> None:
        if self.max_bytes is None:
            return
        held = {session: needs(session) for session in self.sessions}
        spare = self.max_bytes - sum(held.values())
        if spare < 0:
            names = ", ".join(str(policy) for policy in self.policies)
            line = f"max_bytes={self.max_bytes:,}: {names} would hold {sum(held.values()):,} bytes"
            hints = [session.fitting(need, need + spare) for session, need in held.items() if need]
            raise ConfigError("; ".join([line, *filter(None, hints)]))


def claim(sites: Sequence[Site], policies: Sequence[Policy]) -> list[Mapping[str, Claim]]:
    """Return each policy's claims, checked against the model's sites and against each other."""
    names = {site.name for site in sites} | set(RESOURCES)
    owners: dict[str, str] = {}
    claims = [policy.claims(sites) for policy in policies]
    for policy, wanted in zip(policies, claims, strict=True):
        kind = type(policy).__name__
        if not set(wanted) - set(RESOURCES):
            raise NoEffectError(f"{kind}: this model has no site that it can use")
        for name, how in wanted.items():
            if name not in names:
                raise ConfigError(f"{kind}: " + unknown("site", name, names))
            if how == "own" and name in owners:
                raise ConflictError(f"{owners[name]} and {kind} both own {name!r}; use one of them")
            if how == "own":
                owners[name] = kind
    return claims


def is_idle(policy: Policy, evaluations: int) -> bool:
    """Return whether the setting alone says that all of so many evaluations are computed, though it is not neutral."""
    if policy.inherent or policy == policy.exact():
        return False
    return 0 < evaluations <= len(policy.full_steps(evaluations))


def refuse_idle(policies: Sequence[Policy], evaluations: int) -> None:
    """Refuse, before the first evaluation, policies whose setting alone says that all of so many are computed.

    Raises:
        NoEffectError: there is one.
    """
    for policy in policies:
        if is_idle(policy, evaluations):
            raise NoEffectError(
                f"{brief(policy)} would have saved nothing: all {evaluations} evaluations would be full; expected more "
                "of them, or another setting"
            )


def _depths(sites: Sequence[Site]) -> dict[str, int]:
    """Blocks of each stack: those from it to the next stack."""
    depths: dict[str, int] = {}
    for site in sites:
        if site.kind == "stack":
            depths[stack := site.name] = 0
        elif site.kind == "block" and depths:
            depths[stack] += 1
    return depths


def _owned(claims: Mapping[str, Claim]) -> list[str]:
    """List the sites among what a policy owns."""
    return [name for name, how in claims.items() if how == "own" and name not in RESOURCES]


def _chain(handlers: list[tuple[int, Handler]]) -> Handler:
    """One handler of several: the owner innermost, wrappers around it, watchers outermost."""
    ordered = [handler for _, handler in sorted(handlers, key=lambda pair: pair[0])]
    chained = ordered[0]
    for outer in ordered[1:]:
        chained = _around(outer, chained)
    return chained


def _around(outer: Handler, inner: Handler) -> Handler:
    return lambda fn, *args: outer(lambda *a: inner(fn, *a), *args)
