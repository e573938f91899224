"""Reading and writing weights: safetensors, checked before use, written beside their place and renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditkit.core.errors import CheckpointError, ConfigError, nearest


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and is removed otherwise.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full; an earlier file at `path` is left as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    draft = Path(name)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot write {path}: {reason}; nothing was changed there") from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors as safetensors, atomically."""
    with replacing(path) as draft:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, draft, dict(metadata or {}))


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a `.pt`/`.pth` file that holds nothing but tensors.

    Raises:
        CheckpointError: missing, truncated, or a pickle that would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        if path.suffix in (".pt", ".pth", ".bin"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not a plain tensor archive
        first = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(f"{path} cannot be read as plain tensors (weights_only=True): {first}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} should hold tensors by name, nothing else")
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load `state` into `module`: every tensor present, of the right shape and finite, and none left over.

    Raises:
        CheckpointError: quotes the first offending tensor; the module is unchanged.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    if missing:
        raise CheckpointError(f"{source}: missing tensor {missing[0]!r} ({len(missing)} missing{_other(missing, extra)})")
    if extra:
        raise CheckpointError(f"{source}: unexpected tensor {extra[0]!r} ({len(extra)} extra)")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(own[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source}: tensor {name!r} holds NaN or infinity")
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def _other(missing: list[str], extra: list[str]) -> str:
    return f", {len(extra)} unexpected such as {extra[0]!r}{nearest(extra[0], missing)}" if extra else ""
