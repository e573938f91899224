"""Any scheduler of the diffusers library as a solver."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ditkit.core.ddpm import DISCRETE, DiscretePath
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.path import Linear, Path, Prediction
from ditkit.sample.denoiser import Estimate
from ditkit.sample.noise import SampleNoise
from ditkit.sample.solvers import Solver, drawn
from ditkit.sample.steppers import Stepper

BETAS = {
    "ddpm": "beta_schedule='linear', beta_start=0.0001, beta_end=0.02",
    "ddpm-sd": "beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012",
    "ddpm-cosine": "beta_schedule='squaredcos_cap_v2'",
}
FORMS: dict[str, Prediction] = {"epsilon": "noise", "sample": "data", "flow_prediction": "velocity"}


@final
@dataclass(frozen=True)
class DiffusersScheduler(Solver):
    """A diffusers scheduler, copied for each trajectory; its state is float32, as in the library's pipelines.

    Those of flow matching (FlowMatchEuler, FlowMatchHeun; DPM-Solver++ or UniPC with `use_flow_sigmas` and
    `prediction_type="flow_prediction"`) run models on the linear path. Those with `alphas_cumprod` run models
    on discrete paths, and must have the model's betas (`BETAS`). `clip_sample`, on by default in DDIM
    and DDPM, clips the predicted data and is left as given.

    Args:
        scheduler: as constructed; `steps` sets its timesteps.

    Raises:
        ConfigError: not a scheduler, or one that needs more than a number of steps.
    """

    scheduler: Any

    def __post_init__(self) -> None:
        from diffusers import SchedulerMixin

        if not isinstance(self.scheduler, SchedulerMixin):
            raise ConfigError(f"{type(self.scheduler).__name__} is not a scheduler of diffusers")
        if self.scheduler.config.get("use_dynamic_shifting"):
            raise ConfigError(f"{self._name}: use_dynamic_shifting needs mu; give a fixed shift")

    def times(self, path: Path, steps: int) -> Tensor:
        self._check(path)
        timesteps = self.fresh(steps).timesteps.double().cpu()
        if self._flow:
            return torch.cat([timesteps / self._trained, timesteps.new_zeros(1)])
        return torch.cat([timesteps, timesteps.new_tensor([-1])])

    def evaluations(self, steps: int) -> int:
        """One a timestep; a scheduler of order 2 repeats timesteps."""
        return len(self.fresh(steps).timesteps)

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        """Begin a trajectory over `times`, which must be those that the scheduler sets for a number of steps."""
        self._check(path)
        last = len(times) - 1
        for steps in dict.fromkeys(
            (last, (last + 1) // 2, *range(last - 1, 0, -1))
        ):  # it may repeat timesteps
            if self._visits(times, path, steps):
                return SchedulerStepper(self, steps, noise)
        raise ConfigError(f"{self._name} runs on times of its own only: those of times(path, steps)")

    def _visits(self, times: Tensor, path: Path, steps: int) -> bool:
        try:
            return torch.equal(times, self.times(path, steps))
        except ValueError:  # too few steps for the scheduler
            return False

    def time(self, timestep: float) -> float:
        """Turn a timestep of the scheduler into a time of the model's path."""
        return timestep / self._trained if self._flow else timestep

    def output(self, estimate: Estimate) -> Tensor:
        """Return the estimate in the form that the scheduler expects, with the variance channels if it reads any."""
        value, variance = self._prediction(estimate), self.scheduler.config.get("variance_type")
        if variance not in ("learned", "learned_range"):
            return value
        if estimate.fraction is None:
            raise ConfigError(f"{self._name}: variance_type={variance!r}, but the model learns no variance")
        return torch.cat([value, 2 * estimate.fraction - 1], dim=1)

    def _prediction(self, estimate: Estimate) -> Tensor:
        wanted = self._target
        if wanted == "v_prediction":  # Salimans and Ho 2022, appendix D
            self._refuse_between(estimate.t)
            c = estimate.path.at(estimate.t)
            return c.alpha * estimate.to("noise") - c.sigma * estimate.to("data")
        if FORMS[wanted] != estimate.kind and not self._flow:
            self._refuse_between(estimate.t)
        return estimate.to(FORMS[wanted])

    def _refuse_between(self, t: Tensor) -> None:
        """Refuse times between two indices, which some spacings visit: the tables have no entry to convert with."""
        if t.item() != round(t.item()):
            raise ConfigError(
                f"{self._name}: prediction_type={self._target!r} at timestep {t.item():g} needs converting; "
                "the tables have whole timesteps only; give timestep_spacing='leading' or 'trailing'"
            )

    def _check(self, path: Path) -> None:
        if self._target not in (*FORMS, "v_prediction"):
            raise ConfigError(unknown("prediction_type", self._target, (*FORMS, "v_prediction")))
        if self._flow:
            if not isinstance(path, Linear):
                raise ConfigError(
                    f"{self._name} is for flow matching on the linear path, not {type(path).__name__}"
                )
            return
        if not isinstance(path, DiscretePath):
            raise ConfigError(f"{self._name} is for DDPM's discrete path, not {type(path).__name__}")
        theirs = self.scheduler.alphas_cumprod.double()
        if theirs.shape != path.abar.shape or not torch.allclose(theirs, path.abar, rtol=1e-3):
            raise ConfigError(
                f"{self._name}: its betas are not the model's; give num_train_timesteps={path.steps}, "
                + _betas(path)
            )

    def fresh(self, steps: int, device: torch.device | str = "cpu") -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    @property
    def _target(self) -> str:
        return self.scheduler.config.get("prediction_type", "flow_prediction")

    @property
    def _flow(self) -> bool:
        return self._target == "flow_prediction"

    @property
    def _trained(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def _name(self) -> str:
        return type(self.scheduler).__name__


@final
class SchedulerStepper(Stepper):
    """A scheduler of its own, advanced with the trajectory."""

    def __init__(self, solver: DiffusersScheduler, steps: int, noise: SampleNoise | None) -> None:
        self.solver, self.steps, self.index = solver, steps, 0
        self.scheduler = solver.fresh(steps)
        self.options: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            self.options["generator"] = drawn(solver, noise).generators

    @property
    def t(self) -> float | None:
        timesteps = self.scheduler.timesteps
        return self.solver.time(timesteps[self.index].item()) if self.index < len(timesteps) else None

    def start(self, x: Tensor) -> Tensor:
        self.scheduler = self.solver.fresh(self.steps, x.device)
        return x.float() * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def input(self, x: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, self.scheduler.timesteps[self.index])

    def step(self, x: Tensor, estimate: Estimate) -> Tensor:
        timestep = self.scheduler.timesteps[self.index]
        self.index += 1
        return self.scheduler.step(self.solver.output(estimate), timestep, x, **self.options)[0]


def _betas(path: DiscretePath) -> str:
    """Name the settings of a scheduler that has the betas of `path`."""
    known = (name for name, make in DISCRETE.items() if torch.equal(make().abar, path.abar))
    return BETAS.get(next(known, ""), "and trained_betas equal to the path's")
