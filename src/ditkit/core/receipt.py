"""What a policy really did in a trajectory: measured at the sites, not declared by the policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ditkit.core.policy import Policy
from ditkit.core.run import Call, Handler


class PolicyReceipt:
    """For each lane, how many owned sites ran and how many were replaced in each evaluation.

    Args:
        verb: what a site is called whose function did not run.
        depths: blocks of each `stack` site, whose function takes `start, stop`: it ran if its last block did.
    """

    def __init__(self, policy: Policy, verb: str, depths: Mapping[str, int]) -> None:
        self.policy, self.verb, self.depths = policy, verb, depths
        self.sites: set[str] = set()
        self.rows: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._call: Call | None = None
        self._met: set[str] = set()
        self._ran: set[str] = set()

    def begin(self, call: Call) -> None:
        self._call, self._met, self._ran = call, set(), set()

    def watch(self, name: str, handler: Handler) -> Handler:
        """`handler`, noting whether it ran the site's own function."""
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

    def end(self) -> None:
        """The call is complete: only complete calls are counted."""
        assert self._call is not None
        self.sites |= self._met
        lane = self._call.lane if self._call.net == "main" else f"{self._call.net}/{self._call.lane}"
        self.rows[lane][self._call.index] = (len(self._ran), len(self._met) - len(self._ran))

    @property
    def calls(self) -> int:
        return sum(len(lane) for lane in self.rows.values())

    @property
    def saved(self) -> int:
        """Site calls whose function did not run."""
        return sum(replaced for lane in self.rows.values() for _, replaced in lane.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: sites touched, and for each lane the evaluations computed and replaced."""
        lanes = {
            lane: {
                "computed": spans([i for i, (_, replaced) in calls.items() if not replaced]),
                self.verb: spans([i for i, (_, replaced) in calls.items() if replaced]),
            }
            for lane, calls in self.rows.items()
        }
        return {
            "policy": str(self.policy),
            "sites": len(self.sites),
            "site_calls_saved": self.saved,
            "lanes": lanes,
        }

    def __str__(self) -> str:
        parts = [f"{self.policy}: {len(self.sites)} sites"]
        for lane, done in self.as_dict()["lanes"].items():
            parts.append(f"{lane}: " + ", ".join(f"{verb} {steps or 'none'}" for verb, steps in done.items()))
        return "; ".join(parts)


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5, 7, 8] as '0-2 5 7-8'."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
