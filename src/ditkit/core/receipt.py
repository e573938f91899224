"""Receipts: the effect of a policy on a trajectory, measured at the sites, not declared by the policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ditkit.core.policy import Policy
from ditkit.core.run import Call, Handler


class PolicyReceipt:
    """For each lane, how many sites ran and how many were replaced in each evaluation, and rows taken out.

    Args:
        verb: what an evaluation is called in which a site's function did not run, or ran on some rows only.
        depths: blocks of each `stack` site, whose function takes `start, stop`: it ran if its last block did.
        tokens: stages of the `tokens` sites, where a policy that owns no site takes rows out of all that follows.
        owned: the sites that the policy owns. If there are any, only they count: what it does at others is part of
            that, and an evaluation in which none of them was met, since an outer policy skipped them, is none of its.
    """

    def __init__(
        self,
        policy: Policy,
        verb: str,
        depths: Mapping[str, int],
        tokens: Mapping[str, int] | None = None,
        owned: Collection[str] = (),
    ) -> None:
        self.policy, self.verb, self.depths, self.owned = policy, verb, depths, frozenset(owned)
        self.tokens = {} if owned or tokens is None else tokens
        self.sites: set[str] = set()
        self.rows: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        self.token_rows: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        """The token rows that went on from `tokens` sites, and all that there were, at each evaluation of a lane."""
        self.remarks: Mapping[str, str | float] = {}
        """Remarks of the policy at the last complete evaluation."""
        self._went: tuple[int, int] = (0, 0)
        self._call: Call | None = None
        self._met: set[str] = set()
        self._ran: set[str] = set()

    def begin(self, call: Call) -> None:
        self._call, self._met, self._ran, self._went = call, set(), set(), (0, 0)

    def watch(self, name: str, handler: Handler) -> Handler:
        """Wrap `handler` to note whether it ran the site's own function."""
        if self.owned and name not in self.owned:
            return handler
        if name in self.tokens:
            handler = self._counting_rows(self.tokens[name], handler)
        met, ran, depth = self._met, self._ran, self.depths.get(name, 0)

        def watched(fn: Handler, *args: Any) -> Any:
            met.add(name)
            reached = 0

            def probe(*inner: Any) -> Any:
                nonlocal reached
                if depth:
                    given = inner[len(args) :]
                    start = given[0] if given else 0
                    stop = given[1] if len(given) > 1 else depth
                    reached = stop if start <= reached else reached
                if reached == depth:
                    ran.add(name)
                return fn(*inner)

            return handler(probe, *args)

        return watched

    def _counting_rows(self, stage: int, handler: Handler) -> Handler:
        def counting(fn: Handler, *args: Any) -> Any:
            rows, values = 0, 1

            def probe(*inner: Any) -> Any:
                nonlocal rows, values
                tokens = fn(*inner)
                rows, values = self._rows(stage, tokens), token_values(tokens)
                return tokens

            out = handler(probe, *args)
            went, whole = self._went
            self._went = (went + rows * token_values(out) // values, whole + rows)
            return out

        return counting

    def _rows(self, stage: int, tokens: Any) -> int:
        """Count the rows of a stage by the call's layout: embedded tokens need not have their rows at axis 1."""
        assert self._call is not None
        rows = sum(segment.length for segment in self._call.layout if segment.stage == stage)
        return rows or sum(leaf.shape[1] for leaf in _features(tokens))

    def end(self, computed: Collection[str] = ()) -> None:
        """Count the call, which is complete; `computed` are sites as good as run."""
        assert self._call is not None
        self._ran |= self._met.intersection(computed)
        self.sites |= self._met
        lane = self._call.lane if self._call.net == "main" else f"{self._call.net}/{self._call.lane}"
        self.rows[lane][self._call.index] = (len(self._ran), len(self._met) - len(self._ran))
        self.token_rows[lane][self._call.index] = self._went

    @property
    def calls(self) -> int:
        return sum(len(lane) for lane in self.rows.values())

    @property
    def saved(self) -> int:
        """Site calls whose function did not run."""
        return sum(replaced for lane in self.rows.values() for _, replaced in lane.values())

    @property
    def rows_saved(self) -> int:
        """Token rows that did not go on from `tokens` sites, over all evaluations."""
        return sum(whole - went for lane in self.token_rows.values() for went, whole in lane.values())

    def met(self, lane: str) -> list[int]:
        """List the evaluations of a lane in which the policy met a site; all, if it never met one."""
        return [i for i, (ran, gone) in self.rows[lane].items() if ran or gone or not self.sites]

    def full(self, lane: str) -> list[int]:
        """List the evaluations of a lane in which every site ran, on all rows."""
        rows, went = self.rows[lane], self.token_rows[lane]
        return [i for i in self.met(lane) if not rows[i][1] and went[i][0] == went[i][1]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: sites touched, and for each lane the evaluations computed and replaced.

        Of a policy that takes out rows also `rows_saved`, their share of all token rows.
        """
        lanes = {}
        for lane in self.rows:
            full, met = self.full(lane), self.met(lane)
            lanes[lane] = {"computed": spans(full), self.verb: spans([i for i in met if i not in full])}
        whole = sum(all_rows for lane in self.token_rows.values() for _, all_rows in lane.values())
        return {
            "policy": str(self.policy),
            **({"inherent": True} if self.policy.inherent else {}),
            "sites": len(self.sites),
            "site_calls_saved": self.saved,
            **({"rows_saved": self.rows_saved / whole} if self.rows_saved else {}),
            **self.remarks,
            "lanes": lanes,
        }

    def __str__(self) -> str:
        parts = [f"{self.policy}: {len(self.sites)} sites", *self.summary_parts()]
        for lane, done in self.as_dict()["lanes"].items():
            parts.append(f"{lane}: " + ", ".join(f"{verb} {steps or 'none'}" for verb, steps in done.items()))
        return "; ".join(parts)

    def summary_parts(self) -> list[str]:
        return [f"{name} {value}" for name, value in self.remarks.items()]


def token_values(tokens: Any) -> int:
    """Numbers in what a `tokens` site returns, of all its streams; a whole number of them a row."""
    return sum(leaf.numel() for leaf in _features(tokens))


def _features(tokens: Any) -> list[Tensor]:
    return [t for t in tree_leaves(getattr(tokens, "x", tokens)) if isinstance(t, Tensor) and t.ndim > 1]


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5, 7, 8] as '0-2 5 7-8'."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
