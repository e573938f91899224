"""Cost of an accelerated call, and its replay with the exact sampler, which gives the error."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditkit.bench.macs import MacCount, MacCounter
from ditkit.bench.rows import Row, decibels, distance, megabytes, titles
from ditkit.bench.timing import alternated, medians
from ditkit.core.config import MOST_STEPS, integer
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.core.receipt import PolicyReceipt
from ditkit.metrics.error import clip_errors, errors, picture_errors, pooled_psnr_db

EXACT = "exact"
ERRORS = {4: picture_errors, 5: clip_errors}
"""By the number of axes: nothing else of a pipeline's output says whether it is of pictures or of clips."""


@dataclass(frozen=True)
class Cost:
    """Cost of a call: wall clock, evaluations of the transformers, peak bytes held by policies, and receipts."""

    seconds: float
    forwards: int
    policy_bytes: int
    receipts: tuple[PolicyReceipt, ...]

    @property
    def evaluations(self) -> int:
        """Evaluations of the guided model, whatever the number of branches and networks in each."""
        first = self.receipts[0].policy if self.receipts else None
        return sum(len(_evaluated(r)) for r in self.receipts if r.policy == first)

    @property
    def full(self) -> int:
        """Evaluations in which the policy that replaced the most computed every owned site on all tokens."""
        counts: Counter[str] = Counter()
        for receipt in self.receipts:
            if receipt.policy.inherent:
                continue  # the exact run is under it, too
            partial = {i for lane, calls in receipt.rows.items() for i in calls.keys() - receipt.full(lane)}
            counts[str(receipt.policy)] += len(_evaluated(receipt) - partial)
        return min(counts.values(), default=self.evaluations)


@dataclass(frozen=True)
class PipelineReport:
    """The cost of the last call; with `rows`, its error too.

    Args:
        rows: the exact sampler and the accelerated one (`ditkit.bench.rows.DEFINITIONS` says what each number
            is), over the whole call: text encoders and decoder included. Empty where no error was measured.
        compared: what the errors are of: "pictures", or "latents", whose PSNR has no picture's range.
    """

    cost: Cost
    rows: tuple[Row, ...] = ()
    compared: str = ""

    def __str__(self) -> str:
        cost = self.cost
        lines = [f"kept at most {megabytes(cost.policy_bytes)} MB", *map(str, cost.receipts)]
        if not self.rows:
            head = "error not measured; report(exact=True) draws the same again to measure it"
            return "\n".join([head, f"{cost.seconds:.2f} s", *lines])
        exact, fast = self.rows
        times = f"{fast.seconds:.2f} s against {exact.seconds:.2f} s ({fast.speedup:.2f}x)"
        error = f"{distance(fast)}, of {self.compared}"
        head = f"{fast.name}: {times}, {fast.macs_ratio:.1%} of the MACs, {error}"
        return "\n".join([head, *_control(fast), *lines])


class CallSnapshot:
    """The arguments of a pipeline's call, and the state of all randomness and of torch's modes when it was made."""

    def __init__(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bound = inspect.signature(pipe.__call__).bind(*args, **kwargs)
        self.bound.apply_defaults()
        self._random = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        given = self.bound.arguments.get("generator")
        self._order = [id(g) for g in _listed(given)]
        self._generators = {id(g): (g.device, g.get_state()) for g in _listed(given)}
        self._one = isinstance(given, torch.Generator)
        self._modes = _modes()

    @property
    def steps(self) -> int | None:
        """The number of steps asked for, unless by a list of timesteps or sigmas."""
        values = self.bound.arguments
        listed = any(values.get(name) is not None for name in ("timesteps", "sigmas"))
        return None if listed else values.get("num_inference_steps")

    def changed(self, **values: Any) -> inspect.BoundArguments:
        """Return the arguments with other values; those that the pipeline does not take are left out."""
        bound = copy(self.bound)
        known = bound.signature.parameters.keys()
        bound.arguments = {**bound.arguments, **{k: v for k, v in values.items() if k in known}}
        return bound

    @contextmanager
    def again(self) -> Iterator[dict[str, Any]]:
        """Inside, randomness and modes are as they were then; gives the generators to ask with."""
        restored = {
            key: torch.Generator(device).set_state(s) for key, (device, s) in self._generators.items()
        }
        several = [restored[key] for key in self._order]  # one may serve several samples
        with ExitStack() as stack:
            for mode in self._modes:
                stack.enter_context(mode())
            stack.enter_context(torch.random.fork_rng())
            torch.set_rng_state(self._random)
            if self._cuda:
                torch.cuda.set_rng_state_all(self._cuda)
            yield {"generator": several[0] if self._one else several} if several else {}


Draw = Callable[[inspect.BoundArguments, bool], tuple[Any, Cost]]  # arguments, under policies -> output, cost


class Replay:
    """The exact sampler and the accelerated one, once more from the state in which a call began."""

    def __init__(self, snapshot: CallSnapshot, draw: Draw, policies: Sequence[Policy], decodes: bool) -> None:
        self.snapshot, self.draw, self.policies, self.decodes = snapshot, draw, policies, decodes
        self.name = " + ".join(title.name for title in titles(policies))
        self.samples: dict[str, Tensor] = {}
        self.costs: dict[str, Cost] = {}
        self.macs: dict[str, MacCount] = {}

    def rows(self, converged_steps: int | None) -> tuple[Row, Row]:
        """Both rows; the policy's says what the same MACs buy in fewer exact steps.

        Raises:
            ConfigError: `converged_steps` is no positive integer, or the call had its own list of timesteps.
        """
        if converged_steps is not None:
            integer("converged_steps", converged_steps, least=1, most=MOST_STEPS)
            if self.snapshot.steps is None:
                raise ConfigError(
                    f"converged_steps={converged_steps}: the call was asked for its own list of timesteps"
                )
        for name, fast in ((EXACT, False), (self.name, True)):
            self._count(name, fast)
        runs = {EXACT: partial(self._run, EXACT, False), self.name: partial(self._run, self.name, True)}
        seconds = medians(alternated(runs, 1, warmup=0))  # counting has warmed both up
        converged = None
        if converged_steps is not None:
            converged = self._sample(False, num_inference_steps=converged_steps)[0]
        first, second = (self._row(name, seconds, converged) for name in (EXACT, self.name))
        return first, second

    def _row(self, name: str, seconds: dict[str, float], converged: Tensor | None) -> Row:
        cost, count, samples = self.costs[name], self.macs[name], self.samples[name]
        evaluations = self.costs[self.name].evaluations
        exact = name == EXACT
        return Row(
            name=name,
            kind="exact" if exact else "policy",
            series=name,
            tag=name,
            policy="" if exact else "; ".join(map(str, self.policies)),
            steps=self.snapshot.steps or evaluations,
            evaluations=evaluations,
            full_evaluations=evaluations if exact else cost.full,
            seconds=seconds[name],
            seconds_each=(seconds[name],),
            speedup=seconds[EXACT] / seconds[name],
            macs=count.total,
            macs_ratio=count.total / max(self.macs[EXACT].total, 1),
            macs_uncounted=count.uncounted,
            peak_bytes=None,
            peak_added_bytes=None,
            policy_bytes=cost.policy_bytes,
            receipt=tuple(receipt.as_dict() for receipt in cost.receipts),
            psnr_converged_db=None if converged is None else pooled_psnr_db(samples, converged),
            **ERRORS.get(samples.ndim, errors)(samples, self.samples[EXACT]),
            **self._control(None if exact else count, converged),
        )

    def _control(self, count: MacCount | None, converged: Tensor | None) -> dict[str, Any]:
        """Run the exact sampler in as many steps as cost nearest to `count`, and measure its error."""
        names = ("steps", "macs_ratio", "identical", "psnr_db", "psnr_converged_db")
        values: tuple[Any, ...] = (None,) * len(names)
        if count is not None and self.snapshot.steps:
            whole = self.macs[EXACT].total
            steps = max(1, round(self.snapshot.steps * count.total / max(whole, 1)))
            with MacCounter() as counter:
                samples = self._sample(False, num_inference_steps=steps)[0]
            exact = self.samples[EXACT]
            to_converged = None if converged is None else pooled_psnr_db(samples, converged)
            same, psnr = samples.equal(exact), pooled_psnr_db(samples, exact)
            values = (steps, counter.total / max(whole, 1), same, psnr, to_converged)
        return {f"control_{name}": value for name, value in zip(names, values, strict=True)}

    def _count(self, name: str, fast: bool) -> None:
        with MacCounter() as counter:
            self._run(name, fast)
        self.macs[name] = counter.count

    def _run(self, name: str, fast: bool) -> None:
        self.samples[name], self.costs[name] = self._sample(fast)

    def _sample(self, fast: bool, **changed: Any) -> tuple[Tensor, Cost]:
        kind = {"output_type": "np" if self.decodes else "latent"}
        with self.snapshot.again() as generators:
            out, cost = self.draw(self.snapshot.changed(**generators, **kind, **changed), fast)
        return as_samples(out[0]), cost


def as_samples(drawn: Any) -> Tensor:
    """Convert a pipeline's output to samples in [0, 1]; latents stay as they are.

    Pictures are [n, H, W, C], clips [n, T, H, W, C].

    The former as [n, C, H, W] or [n, C, T, H, W] in [-1, 1], all float32 on the CPU.
    """
    if isinstance(drawn, Tensor):
        return drawn.detach().float().cpu()
    return 2 * torch.as_tensor(drawn).float().movedim(-1, 1) - 1


def _evaluated(receipt: PolicyReceipt) -> set[int]:
    """Collect the evaluations of a trajectory, by any branch."""
    return {index for lane in receipt.rows.values() for index in lane}


def _control(row: Row) -> list[str]:
    if row.control_steps is None:
        return []
    steps = f"{row.control_steps} exact step{'s'[: row.control_steps > 1]}"
    reach = decibels(row.control_psnr_db, row.control_identical)
    lines = [f"{steps} ({row.control_macs_ratio:.1%} of the MACs): {reach} dB to exact"]
    if row.psnr_converged_db is not None:
        ours, theirs = decibels(row.psnr_converged_db), decibels(row.control_psnr_converged_db)
        lines.append(f"to converged: {ours} dB, and {theirs} dB in {steps}")
    return lines


def _listed(given: Any) -> list[torch.Generator]:
    several = given if isinstance(given, list | tuple) else [given]
    return [g for g in several if isinstance(g, torch.Generator)]


def _modes() -> list[Callable[[], AbstractContextManager[object]]]:
    """Inference mode and mixed precision, on the CPU and on an accelerator, as they are now."""
    there = torch.accelerator.current_accelerator(check_available=True)
    autocasts = [
        partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        for kind in dict.fromkeys(("cpu", there.type if there else "cpu"))
    ]
    return [partial(torch.inference_mode, torch.is_inference_mode_enabled()), *autocasts]
