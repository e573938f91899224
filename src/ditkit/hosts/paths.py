"""A scheduler of diffusers as a convention: the path that a transformer was trained on, and how its times are moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ditkit.core.convention import Convention, Extra, PathName
from ditkit.core.ddpm import DISCRETE
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.path import Prediction

BETAS: Mapping[tuple[Any, ...], PathName] = {
    ("linear", 1e-4, 0.02): "ddpm",
    ("scaled_linear", 0.00085, 0.012): "ddpm-sd",
    ("squaredcos_cap_v2",): "ddpm-cosine",
}
"""Paths by a scheduler's betas."""
PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "noise", "sample": "data"}
STEPS = 1000
KIND = "_class_name"


class SchedulerPath(NamedTuple):
    """The convention of a scheduler's transformers, and by how much it shifts times to noise."""

    convention: Convention
    shift: float = 1.0


def path_of(
    scheduler: Mapping[str, Any] | None, flow: bool, learns_variance: bool, rows: int
) -> SchedulerPath:
    """Read a scheduler's config.

    Args:
        scheduler: its config; None where there is none. flow: what the family is of, then.
        learns_variance: the transformer has a second set of output channels.
        rows: tokens of a picture, by which some schedulers shift.

    Raises:
        ConfigError: betas, or a prediction, of none of the known paths.
    """
    if scheduler is None:
        flow_matching, shift = flow, 1.0
        scheduler = {} if flow else {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    else:
        flow_matching, shift = is_flow(scheduler), shift_of(scheduler, rows)
    if flow_matching != flow:
        kinds = {True: "flow matching", False: "discrete steps (DDPM)"}
        raise ConfigError(
            f"scheduler {scheduler.get(KIND)} is of {kinds[flow_matching]}, expected one of {kinds[flow]}, as the "
            "transformer is trained by"
        )
    if flow:
        return SchedulerPath(Convention(), shift)
    extra: Extra = "variance" if learns_variance else "none"
    return SchedulerPath(Convention(_betas(scheduler), _prediction(scheduler), "index", extra))


def config_of_scheduler(scheduler: Any) -> dict[str, Any]:
    """Return the config of a scheduler of diffusers with its class, as its file has it."""
    kinds = [kind.__name__ for kind in type(scheduler).__mro__ if kind.__module__.startswith("diffusers")]
    return {**scheduler.config, KIND: kinds[0]}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Return whether a scheduler is of flow matching."""
    named = str(scheduler.get(KIND, "")).startswith("FlowMatch")
    return named or scheduler.get("prediction_type") == "flow_prediction"


def shift_of(scheduler: Mapping[str, Any], rows: int) -> float:
    """Return the `a` of t' = a t / (1 + (a - 1) t), by which a scheduler of flow matching moves its steps to noise.

    One that shifts by the picture's size has a = exp(mu), or mu, on a line through two sizes (diffusers'
    `calculate_shift`).
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = low + (high - low) / (many - few) * (rows - few)
    return mu if scheduler.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def _betas(scheduler: Mapping[str, Any]) -> PathName:
    schedule = scheduler.get("beta_schedule", "linear")
    given = (schedule, scheduler.get("beta_start"), scheduler.get("beta_end"))
    steps, odd = scheduler.get("num_train_timesteps", STEPS), scheduler.get("rescale_betas_zero_snr")
    found = BETAS.get((schedule,), BETAS.get(given))
    if found is None or steps != STEPS or odd or scheduler.get("trained_betas") is not None:
        listed = ", ".join(f"{name} {key}" for key, name in BETAS.items())
        raise ConfigError(
            f"scheduler {scheduler.get(KIND)}: beta_schedule, beta_start and beta_end are {given}, with "
            f"num_train_timesteps={steps}, trained_betas={scheduler.get('trained_betas')} and "
            f"rescale_betas_zero_snr={odd}, expected {STEPS} steps of one of {listed}"
        )
    assert found in DISCRETE
    return found


def _prediction(scheduler: Mapping[str, Any]) -> Prediction:
    given = scheduler.get("prediction_type", "epsilon")
    if given not in PREDICTIONS:
        raise ConfigError(
            f"scheduler {scheduler.get(KIND)}: " + unknown("prediction_type", given, PREDICTIONS)
        )
    return PREDICTIONS[given]
