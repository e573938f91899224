"""The resumable state of a run: one safetensors file, replaced whole, so that a kill loses nothing older."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ditkit.core.checkpoint import fill, read_metadata, read_state, write_state
from ditkit.core.errors import CheckpointError
from ditkit.train.ema import Average
from ditkit.train.optimizers import MOMENTS, named_weights, owners
from ditkit.train.parts import PART

STATE = "state.safetensors"
FROZEN = "frozen.safetensors"
"""The file of the weights that no step changes, in a run that trains some only; written once."""
DRAFT = re.compile(
    r"\.((state|frozen|model|codec|\d{8,}-\d\.\d{3})\.safetensors|(recipe|config)\.json)\.[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}"
)
"""Names of our drafts, and of the one that safetensors makes of each."""


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    averages: Sequence[Average],
    optimizers: Sequence[Optimizer],
    *,
    modules: nn.ModuleDict | None = None,
    cursor: Mapping[str, Tensor] | None = None,
    constant: Container[str] = (),
    processes: int = 1,
) -> None:
    """Weights, averages and the optimisers' moments after `step` steps.

    Args:
        modules: of terms. cursor: what the objective remembers.
        constant: tensors of the model that have not changed since they were written in `FROZEN`.
    """
    modules = nn.ModuleDict() if modules is None else modules
    state = {f"model.{k}": v for k, v in model.state_dict().items() if k not in constant}
    state |= {f"{PART}{k}": v for k, v in modules.state_dict().items()}
    state |= {f"objective.{k}": v for k, v in (cursor or {}).items()}
    for i, average in enumerate(averages):
        state |= {f"average.{i}.{k}": v for k, v in average.state.items()}
    steppers = owners(optimizers)
    for name, parameter in named_weights(model, modules).items():
        held = steppers[parameter].state.get(parameter, {})
        moments = MOMENTS[type(steppers[parameter])]
        state |= {f"optimizer.{moment}.{name}": held[moment] for moment in moments if moment in held}
    about = {"step": step, "averages": len(averages), "moments": _moments_in(state), "processes": processes}
    write_state(folder / STATE, state, {name: str(count) for name, count in about.items()})


class Restored(NamedTuple):
    """The content of a state beside what was restored in place: steps done, the objective's memory, processes."""

    step: int
    cursor: dict[str, Tensor]
    processes: int


def load_state(
    folder: Path,
    model: Any,
    averages: Sequence[Average],
    optimizers: Sequence[Optimizer],
    modules: nn.ModuleDict | None = None,
) -> Restored:
    """Restore what `save_state` wrote, in place.

    Raises:
        CheckpointError: the file is missing, damaged, or of another run; quotes the first offending tensor.
    """
    path = folder / STATE
    modules = nn.ModuleDict() if modules is None else modules
    state, about = read_state(path), read_metadata(path)
    for policy in getattr(model, "policies", ()):
        state = _upgraded(policy, state, model.sites())
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
    frozen = read_state(folder / FROZEN) if (folder / FROZEN).exists() else {}
    fill(model, {**frozen, **_part(state, "model.")}, path)
    fill(modules, _part(state, PART), path)
    for i, average in enumerate(averages):
        held = _part(state, f"average.{i}.")
        if not average.state.keys() <= held.keys() <= model.state_dict().keys():
            raise CheckpointError(f"{path}: average {i} belongs to another model")
        for k, v in average.state.items():
            _check(held[k], v.shape, f"{path}: tensor 'average.{i}.{k}'")
            v.copy_(held[k])  # in its place: an EmaTeacher shares its memory
    steppers = owners(optimizers)
    for name, parameter in named_weights(model, modules).items():
        optimizer = steppers[parameter]
        moments = _moments(state, name, parameter, MOMENTS[type(optimizer)], path)
        if moments:  # AdamW keeps its step count on the CPU
            optimizer.state[parameter] = {
                m: v if m == "step" else v.to(parameter.device) for m, v in moments.items()
            }
    return Restored(int(about["step"]), _part(state, "objective."), int(about.get("processes", "1")))


def save_frozen(folder: Path, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Write what no step changes, once, where some weights are frozen: these, and buffers.

    Returns:
        Marks of these tensors, by which `unchanged` finds out; none where all weights are trained.
    """
    held = model.state_dict(keep_vars=True)
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if not frozen:
        return {}
    kept = {k: v.detach() for k, v in held.items() if k in frozen or not isinstance(v, nn.Parameter)}
    write_state(folder / FROZEN, kept)
    return _marks(model, kept)


def unchanged(model: nn.Module, marks: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """List the tensors that nothing has written to since they got these marks."""
    now = _marks(model, marks)
    return frozenset(name for name, mark in marks.items() if now[name] == mark)


def _marks(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Mark each tensor by its address and by how often it was written to in place."""
    held = model.state_dict(keep_vars=True)
    return {name: (held[name].data_ptr(), held[name]._version) for name in names}


def _upgraded(policy: Any, state: dict[str, Tensor], sites: Any) -> dict[str, Tensor]:
    """Tensors that an older version named otherwise, wherever in a state they stand."""
    for prefix in {name[: name.index("learned.")] for name in state if "learned." in name}:
        inner = _part(state, prefix)
        renamed = policy.upgraded(inner, sites)
        if renamed is not inner:
            state = {k: v for k, v in state.items() if not k.startswith(prefix)}
            state |= {prefix + k: v for k, v in renamed.items()}
    return state


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
