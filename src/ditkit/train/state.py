"""The resumable state of a run: one safetensors file, replaced whole, so that a kill loses nothing older."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ditkit.core.checkpoint import fill, read_state, write_state
from ditkit.core.errors import CheckpointError
from ditkit.train.ema import Average

STATE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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
        CheckpointError: the file is missing, damaged, or of another run.
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
        average.state = {k: held[k].to(v.device) for k, v in average.state.items()}
    for name, parameter in model.named_parameters():
        moments = {m: state[key] for m in MOMENTS if (key := f"optimizer.{m}.{name}") in state}
        if moments:  # AdamW keeps its step count on the CPU
            optimizer.state[parameter] = {
                m: v if m == "step" else v.to(parameter.device) for m, v in moments.items()
            }
    return int(about["step"])


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a complete safetensors file: {error}") from error


def discard_drafts(folder: Path) -> None:
    """Remove what a kill left of tensors being written: our draft, and the one safetensors makes of it."""
    for pattern in (".*.safetensors.*", ".tmp??????"):
        for draft in folder.rglob(pattern):
            draft.unlink(missing_ok=True)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
