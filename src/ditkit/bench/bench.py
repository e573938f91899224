"""The measurements behind a comparison: MACs, wall clock, memory and error of several ways to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ditkit.bench.macs import MacCount, MacCounter
from ditkit.bench.memory import Isolated, PeakMemory
from ditkit.bench.rows import MEASURED, Kind, Row
from ditkit.bench.timing import alternated, medians
from ditkit.core.errors import ConfigError, NoEffectError
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.core.task import Progress, Task
from ditkit.metrics.distribution import Distribution, distribution
from ditkit.metrics.error import generated_mask, pooled_psnr_db
from ditkit.metrics.features import extract, load_efficientnet_lite0
from ditkit.sample.sampler import Sampler, Samples

T = TypeVar("T")
EXACT = "exact"
FEWEST = 4  # pictures that KID needs in each set


@dataclass(frozen=True)
class Method:
    """One row: policies and a number of steps, of the first model or of a rival."""

    name: str
    kind: Kind
    series: str
    tag: str
    policies: tuple[Policy, ...]
    steps: int
    rival: Denoiser | None = None


class Bench:
    """The measurements of one comparison, by the methods' names; `controls` by the policy's."""

    def __init__(
        self, work: Sampler, task: Task, methods: Sequence[Method], progress: Progress | None
    ) -> None:
        self.work, self.task, self.methods, self.progress = work, task, list(methods), progress
        self.generated = generated_mask(work.cond)
        self.drawn: dict[str, Samples] = {}
        self.macs: dict[str, MacCount] = {}
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, PeakMemory] = {}
        self.controls: dict[str, Method] = {}
        self.idle: dict[str, NoEffectError] = {}
        self.converged: Tensor | None = None

    def of(self, method: Method) -> Sampler:
        """Return the sampler of a row's model."""
        return self.work if method.rival is None else replace(self.work, model=method.rival)

    def draw(self, method: Method) -> Samples:
        return self.of(method).draw(policies=method.policies, steps=method.steps)

    def count(self) -> None:
        """Draw once under the counter of MACs; policies that save nothing get no row.

        Raises:
            NoEffectError: none is left.
        """
        for method in self._counted("counting MACs", tuple(self.methods)):
            try:
                self._count(method)
            except NoEffectError as error:
                self.idle[method.name] = error
                self.methods.remove(method)
        if self.idle and not self._policies():
            raise next(iter(self.idle.values()))

    def add_controls(self) -> None:
        """For each policy, the exact sampler with as many steps as cost the same MACs."""
        exact = self.macs[EXACT].total
        for method in self._counted("counting MACs of controls", self._policies()):
            self.controls[method.name] = self._fewer(self.macs[method.name].total / exact)

    def add_control_rows(self) -> None:
        """Add the exact sampler with as many steps as a policy computed in full, once for each number."""
        policies = [m for m in self._policies() if m.rival is None]
        shares = {self.drawn[m.name].full / self.drawn[m.name].evaluations for m in policies}
        found = [self._fewer(share) for share in sorted(shares, reverse=True)]
        self.methods += [m for i, m in enumerate(found) if m.kind == "control" and m not in found[:i]]

    def converge(self, steps: int) -> None:
        tell = None if self.progress is None else partial(self.progress, f"drawing in {steps} steps")
        self.converged = self.work.draw(tell, policies=(), steps=steps).samples

    def time(self, rounds: int) -> None:
        """Wall clock of the rows, in turns; what they drew last is what is judged."""

        def draw_again(method: Method) -> None:
            self.drawn[method.name] = self.draw(method)

        tell = None if self.progress is None else partial(self.progress, "timing")
        functions = {method.name: partial(draw_again, method) for method in self.methods}
        # counting has warmed every one of them up
        self.seconds = alternated(functions, rounds, warmup=0, progress=tell)

    def measure_memory(self, isolated: Mapping[str, Isolated]) -> None:
        """Measure each row in a process of its own.

        Args:
            isolated: the first model under "exact", and rivals by their names.
        """
        for method in self._counted("measuring memory", self.methods):
            work = isolated[EXACT if method.rival is None else method.name]
            self.memory[method.name] = work.peak(method.policies, method.steps)

    def rows(self, judge: Callable[[Tensor], Distribution] | None) -> tuple[Row, ...]:
        return tuple(self._row(method, judge) for method in self._counted("comparing", self.methods))

    def _row(self, method: Method, judge: Callable[[Tensor], Distribution] | None) -> Row:
        drawn, memory = self.drawn[method.name], self.memory.get(method.name)
        exact, seconds = self.drawn[EXACT].samples, medians(self.seconds)
        count, whole = self.macs[method.name], self.macs[EXACT].total
        held = [*self.of(method).model.parameters(), *self.of(method).model.buffers()]
        return Row(
            name=method.name,
            kind=method.kind,
            series=method.series,
            tag=method.tag,
            policy="; ".join(map(str, method.policies)),
            steps=method.steps,
            evaluations=drawn.evaluations,
            full_evaluations=drawn.full,
            seconds=seconds[method.name],
            seconds_each=tuple(self.seconds[method.name]),
            speedup=seconds[EXACT] / seconds[method.name],
            macs=count.total,
            macs_ratio=count.total / whole,
            macs_uncounted=count.uncounted,
            peak_bytes=None if memory is None else memory.peak_bytes,
            peak_added_bytes=None if memory is None else memory.added_bytes,
            policy_bytes=drawn.policy_bytes,
            parameters=sum(p.numel() for p in self.of(method).model.parameters()),
            weight_bytes=sum(t.numel() * t.element_size() for t in held),
            receipt=tuple(receipt.as_dict() for receipt in drawn.receipts),
            distribution=None if judge is None else judge(drawn.samples),
            psnr_converged_db=self._to_converged(drawn.samples),
            **self.task.error(drawn.samples, exact, self.generated),
            **self._control(method, exact, whole),
        )

    def samples(self) -> dict[str, Tensor]:
        """Return the samples of each row, and the converged run's under "converged"."""
        assert self.converged is not None
        return {m.name: self.drawn[m.name].samples for m in self.methods} | {"converged": self.converged}

    def _control(self, method: Method, exact: Tensor, whole: int) -> dict[str, Any]:
        control = self.controls.get(method.name)
        if control is None:
            names = ("steps", "macs_ratio", "identical", "psnr_db", "psnr_converged_db")
            return {f"control_{name}": None for name in names}
        samples = self.drawn[control.name].samples
        return {
            "control_steps": control.steps,
            "control_macs_ratio": self.macs[control.name].total / whole,
            "control_identical": samples.equal(exact),
            "control_psnr_db": pooled_psnr_db(samples, exact, self.generated),
            "control_psnr_converged_db": self._to_converged(samples),
        }

    def _to_converged(self, samples: Tensor) -> float | None:
        assert self.converged is not None
        return pooled_psnr_db(samples, self.converged, self.generated)

    def _policies(self) -> list[Method]:
        return [method for method in self.methods if method.kind in MEASURED]

    def _fewer(self, share: float) -> Method:
        """Return the exact sampler in nearest to `share` of the steps, sampled and counted once."""
        steps = self.work.steps_like(share)
        if steps == self.work.sampling.steps:
            return self.methods[0]
        name = f"exact, {steps} step{'s'[: steps > 1]}"
        method = Method(name, "control", "fewer exact steps", str(steps), (), steps)
        if name not in self.drawn:
            self._count(method)
        return method

    def _count(self, method: Method) -> None:
        with MacCounter() as counter:
            self.drawn[method.name] = self.draw(method)
        self.macs[method.name] = counter.count

    def _counted(self, stage: str, items: Sequence[T]) -> Iterator[T]:
        for done, item in enumerate(items):
            yield item
            if self.progress is not None:
                self.progress(stage, done + 1, len(items))


class DistributionMetric:
    """Distances between what a row drew and `real`, pictures [N, 1 or 3, H, W] in [-1, 1].

    Args:
        drawn, shape: how many samples will be judged, and of what shape; what does not fit is refused before
            anything is drawn.

    Raises:
        ConfigError: too few pictures in either set, or samples of other channels than pictures have.
        DataError: the extractor's weights are missing.
    """

    def __init__(self, real: Tensor, drawn: int, shape: tuple[int, ...]) -> None:
        if shape[0] not in (1, 3):
            raise ConfigError(f"real: pictures have 1 or 3 channels, the model draws {shape[0]}")
        if min(len(real), drawn) < FEWEST:
            raise ConfigError(
                f"KID needs {FEWEST} pictures in each set, got {len(real)} real and {drawn} seeds"
            )
        self.network = load_efficientnet_lite0()
        self.real = extract(self.network, real)

    def __call__(self, samples: Tensor) -> Distribution:
        fake = extract(self.network, samples)
        return distribution(self.real, fake, extractor=self.network.name)
