"""The resumable state of a run: one safetensors file, replaced whole, so that a kill loses nothing older."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ditkit.core.checkpoint import fill, read_metadata, read_state, write_state
from ditkit.core.errors import CheckpointError
from ditkit.train.ema import Average
from ditkit.train.optimizers import MOMENTS, owners

STATE = "state.safetensors"
DRAFT = re.compile(
    r"\.((state|model|codec|\d{8,}-\d\.\d{3})\.safetensors|(recipe|config)\.json)\.[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}"
)
"""Names of our drafts, and of the one that safetensors makes of each."""


def save_state(
    folder: Path, step: int, model: nn.Module, averages: Sequence[Average], optimizers: Sequence[Optimizer]
) -> None:
    """Weights, averages and the optimisers' moments after `step` steps."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, average in enumerate(averages):
        state |= {f"average.{i}.{k}": v for k, v in average.state.items()}
    steppers = owners(optimizers)
    for name, parameter in model.named_parameters():
        held = steppers[parameter].state.get(parameter, {})
        moments = MOMENTS[type(steppers[parameter])]
        state |= {f"optimizer.{moment}.{name}": held[moment] for moment in moments if moment in held}
    about = {"step": step, "averages": len(averages), "moments": _moments_in(state)}
    write_state(folder / STATE, state, {name: str(count) for name, count in about.items()})


def load_state(
    folder: Path, model: nn.Module, averages: Sequence[Average], optimizers: Sequence[Optimizer]
) -> int:
    """Restore what `save_state` wrote, in place; the number of steps done.

    Raises:
        CheckpointError: the file is missing, damaged, or of another run; quotes the first offending tensor.
    """
    path = folder / STATE
    state, about = read_state(path), read_metadata(path)
    if not about.get("step", "").isdecimal():
        raise CheckpointError(f"{path} does not say after how many steps it was written")
    if about.get("averages") != str(len(averages)):
        raise CheckpointError(
            f"{path} holds {about.get('averages')} averages, this run keeps {len(averages)}"
        )
    if about.get("moments", str(_moments_in(state))) != str(_moments_in(state)):  # older states do not say
        raise CheckpointError(
            f"{path} holds {_moments_in(state)} moments of {about['moments']} that were written"
        )
    fill(model, _part(state, "model."), path)
    for i, average in enumerate(averages):
        held = _part(state, f"average.{i}.")
        if held.keys() != average.state.keys():
            raise CheckpointError(f"{path}: average {i} belongs to another model")
        for k, v in average.state.items():
            _check(held[k], v.shape, f"{path}: tensor 'average.{i}.{k}'")
        average.state = {k: held[k].to(v.device) for k, v in average.state.items()}
    steppers = owners(optimizers)
    for name, parameter in model.named_parameters():
        optimizer = steppers[parameter]
        moments = _moments(state, name, parameter, MOMENTS[type(optimizer)], path)
        if moments:  # AdamW keeps its step count on the CPU
            optimizer.state[parameter] = {
                m: v if m == "step" else v.to(parameter.device) for m, v in moments.items()
            }
    return int(about["step"])


def _moments_in(state: dict[str, Tensor]) -> int:
    return sum(name.startswith("optimizer.") for name in state)


def _moments(
    state: dict[str, Tensor], name: str, parameter: Tensor, expected: Sequence[str], path: Path
) -> dict[str, Tensor]:
    """All that its optimiser keeps of a weight, or nothing where no optimiser has stepped it."""
    of_any = {m for kept in MOMENTS.values() for m in kept if f"optimizer.{m}.{name}" in state}
    moments = {m: state[f"optimizer.{m}.{name}"] for m in expected if m in of_any}
    for m, v in moments.items():
        shape = torch.Size() if m == "step" else parameter.shape
        _check(v, shape, f"{path}: tensor 'optimizer.{m}.{name}'")
        if v.dtype not in (parameter.dtype, torch.float32):
            raise CheckpointError(
                f"{path}: tensor 'optimizer.{m}.{name}' is {v.dtype}, expected {parameter.dtype}"
            )
    if of_any and (lost := [m for m in expected if m not in of_any]):
        raise CheckpointError(f"{path}: missing tensor 'optimizer.{lost[0]}.{name}'")
    return moments


def discard_drafts(folder: Path) -> None:
    """Remove what a kill left half-written where a run writes; all else is the user's."""
    for place in (folder, folder / "model", folder / "model" / "codec", folder / "snapshots"):
        for draft in place.glob(".*"):
            if DRAFT.fullmatch(draft.name) and draft.is_file() and not draft.is_symlink():
                draft.unlink(missing_ok=True)


def _check(tensor: Tensor, shape: torch.Size, what: str) -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"{what} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{what} holds NaN or infinity")


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
