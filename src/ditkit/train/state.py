"""The resumable state of a run: one safetensors file, replaced whole, so that a kill loses nothing older."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ditkit.core.checkpoint import fill, read_metadata, read_state, write_state
from ditkit.core.errors import CheckpointError
from ditkit.train.ema import Average

STATE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
DRAFT = re.compile(
    r"\.((state|model|codec|\d{8,}-\d\.\d{3})\.safetensors|(recipe|config)\.json)\.[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}"
)
"""Names of our drafts, and of the one that safetensors makes of each."""


def save_state(
    folder: Path, step: int, model: nn.Module, averages: Sequence[Average], optimizer: torch.optim.Optimizer
) -> None:
    """Weights, averages and AdamW's moments after `step` optimiser steps."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, average in enumerate(averages):
        state |= {f"average.{i}.{k}": v for k, v in average.state.items()}
    for name, parameter in model.named_parameters():
        held = optimizer.state.get(parameter, {})
        state |= {f"optimizer.{moment}.{name}": held[moment] for moment in MOMENTS if moment in held}
    write_state(folder / STATE, state, {"step": str(step), "averages": str(len(averages))})


def load_state(
    folder: Path, model: nn.Module, averages: Sequence[Average], optimizer: torch.optim.Optimizer
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
    fill(model, _part(state, "model."), path)
    for i, average in enumerate(averages):
        held = _part(state, f"average.{i}.")
        if held.keys() != average.state.keys():
            raise CheckpointError(f"{path}: average {i} belongs to another model")
        for k, v in average.state.items():
            _check(held[k], v.shape, f"{path}: tensor 'average.{i}.{k}'")
        average.state = {k: held[k].to(v.device) for k, v in average.state.items()}
    for name, parameter in model.named_parameters():
        moments = {m: state[key] for m in MOMENTS if (key := f"optimizer.{m}.{name}") in state}
        for m, v in moments.items():
            shape = torch.Size() if m == "step" else parameter.shape
            _check(v, shape, f"{path}: tensor 'optimizer.{m}.{name}'")
        if 0 < len(moments) < len(MOMENTS):
            lost = next(m for m in MOMENTS if m not in moments)
            raise CheckpointError(f"{path}: missing tensor 'optimizer.{lost}.{name}'")
        if moments:  # AdamW keeps its step count on the CPU
            optimizer.state[parameter] = {
                m: v if m == "step" else v.to(parameter.device) for m, v in moments.items()
            }
    return int(about["step"])


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
