"""The flags of sampling, and the settings they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from ditkit.cli.options import EXACT, Number, Policies
from ditkit.core.errors import ConfigError
from ditkit.core.loading import load
from ditkit.core.spec import named_alone, spec
from ditkit.sample import Autoguidance, ClassifierFree, Guidance, Sampling, Solver, Unguided

SOLVERS = ", ".join(named_alone(Solver))  # type: ignore[type-abstract]
SolverName = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="SOLVER", help=f"One of {SOLVERS}. Default: ddim for a discrete (DDPM) model, else euler."
    ),
]
Interval = Annotated[tuple[float, float], tyro.conf.arg(metavar="LOW HIGH")]
ALL_TIMES = (0.0, 1.0)


@dataclass(frozen=True)
class Guiding:
    """The flags of guidance.

    Args:
        guidance: Scale of classifier-free guidance, or of --guide; 1 is none, which halves the time.
        guidance_interval: Lowest and highest noise-time that is guided; 1 is pure noise.
        guidance_channels: Guide only the first so many channels. Default: all.
        guide: Autoguidance: a weaker model in place of the unconditional branch, named as MODEL is.
    """

    guidance: float = 2.0
    guidance_interval: Interval = ALL_TIMES
    guidance_channels: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    guide: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None

    def make(self) -> Guidance:
        """Return the guidance of these flags; a guide is loaded.

        Raises:
            ConfigError: two flags contradict each other, or a value is out of range. Those of `load`.
        """
        narrowed = self._narrowed()
        if self.guide is not None and narrowed:
            raise ConfigError(f"got --guide {self.guide} with {narrowed}, expected one of the two")
        flag = narrowed or (f"--guide {self.guide}" if self.guide is not None else "")
        if self.guidance == 1 and flag:
            raise ConfigError(f"--guidance=1 guides nothing, expected another scale with {flag}")
        if self.guide is not None:
            return Autoguidance(self.guidance, load(self.guide))
        if self.guidance == 1:
            return Unguided()
        return ClassifierFree(self.guidance, self.guidance_channels, self.guidance_interval)

    def _narrowed(self) -> str:
        """Return the first flag that only classifier-free guidance has, or nothing."""
        if self.guidance_interval != ALL_TIMES:
            low, high = self.guidance_interval
            return f"--guidance-interval {low:g} {high:g}"
        return "" if self.guidance_channels is None else f"--guidance-channels {self.guidance_channels}"


@dataclass(frozen=True)
class SamplingFlags:
    """The flags of `Sampling`, but for the seeds.

    Args:
        steps: Steps of the solver.
        guiding: Flags of guidance.
        policy: Cache or sparse attention, such as taylorseer:interval=4,order=2; exact is none. Repeat it for several.
        batch_size: Samples drawn at once.
        max_bytes: Memory in bytes that the policies may hold; more is refused.
    """

    steps: int = 50
    guiding: Annotated[Guiding, tyro.conf.arg(name="")] = Guiding()
    policy: Policies = ()
    solver: SolverName = None
    batch_size: int = 8
    max_bytes: Number = None

    def make(self, seeds: Sequence[int]) -> Sampling:
        """Return the settings of these flags; a guide is loaded.

        Raises:
            ConfigError: an unknown solver, policy, field or value, or flags that contradict each other.
        """
        policies = tuple(text for text in self.policy if text != EXACT)
        return Sampling(
            steps=self.steps,
            solver=self.solver,  # type: ignore[arg-type]
            guidance=self.guiding.make(),
            policies=policies,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            max_bytes=self.max_bytes,
            seeds=tuple(seeds),
        )

    def as_dict(self, sampling: Sampling) -> dict[str, Any]:
        """Return the flags as JSON, components by the texts of those in `sampling`."""
        return {
            "steps": self.steps,
            **asdict(self.guiding),
            "solver": None if sampling.solver is None else spec(sampling.solver),
            "policies": [spec(policy) for policy in sampling.policies],
            "batch_size": self.batch_size,
            "max_bytes": self.max_bytes,
        }


Flattened = Annotated[SamplingFlags, tyro.conf.arg(name="")]
