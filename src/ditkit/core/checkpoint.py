"""Reading and writing weights: safetensors, checked before use, written beside their place and renamed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path
from stat import S_IFREG
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditkit.core.errors import CheckpointError, ConfigError, nearest
from ditkit.core.files import check_regular, is_file
from ditkit.core.unpickled import read_pickled, unwrapped, without_prefixes

STALE_SECONDS = 3600.0
"""Age from which a draft is one that a killed process left."""
TIED = "tied"
"""Key of a file's metadata: further names of its tensors, as JSON of name to name."""
PICKLED = (".pt", ".pth", ".bin")
"""Suffixes of files that `torch.load` reads, and only as plain tensors."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it when the block ends well, and is removed otherwise.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full; an earlier file at `path` is kept.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        _discard_drafts(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    draft = Path(name)
    try:
        yield draft
        to_disk(draft)
        draft.chmod(0o644)
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot write {path}: {reason}; nothing was changed there") from error
    finally:
        draft.unlink(missing_ok=True)


def _discard_drafts(path: Path) -> None:
    """Remove what killed processes left of this file beside its place; a fresh draft may be another process's.

    A draft is its owner's alone until it is whole; a file of a person's own that is called so seldom is.
    """
    for draft in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            found = draft.lstat()
            if found.st_mode == S_IFREG | 0o600 and time.time() - found.st_mtime > STALE_SECONDS:
                draft.unlink()


def to_disk(path: Path) -> None:
    """Wait until a file's content would survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with replacing(path) as draft:
        draft.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return `value` as the bytes of an indented JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    check_regular(path, CheckpointError)
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors as safetensors, atomically."""
    with replacing(path) as draft:
        dump_state(draft, state, metadata)


def dump_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors as safetensors, at once in their place; several names of one storage are written once."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and key in first:
            tied[name] = first[key]
        elif value.numel():
            first[key] = name
    written, storages = {}, set[int]()
    for name in (name for name in state if name not in tied):
        value = state[name].detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        written[name] = value.clone() if pointer in storages else value  # a part of another is written whole
        storages.add(pointer)
    about = {**(metadata or {}), **({TIED: json.dumps(tied)} if tied else {})}
    save_file(written, path, about)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a complete safetensors file: {error}") from error


def digest(value: Any) -> str:
    """SHA-256 of a JSON value as it reads back, whatever the order of its keys and its spaces."""
    canonical = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or the weights of a `.pt`, `.pth` or `.bin` file, of which no code runs.

    Of a training script's checkpoint the averaged weights are taken, else the model's; the prefixes that wrappers
    put before all names are taken off.

    Raises:
        CheckpointError: missing, truncated, or a pickle that would run code.
    """
    if not is_file(path, CheckpointError):
        raise CheckpointError(f"no weights at {path}")
    if path.suffix in PICKLED:
        state = unwrapped(read_pickled(path), path)
    else:
        try:
            state = load_file(path)
        except Exception as error:  # safetensors raises many kinds for a file that is not its own
            first = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise CheckpointError(f"{path} cannot be read as a complete safetensors file: {first}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"{path} should hold tensors by name, nothing else")
    if path.suffix not in PICKLED:
        state |= {name: state[other] for name, other in _tied(path, state).items()}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise CheckpointError(f"{path}: {name!r} should be a dense tensor; only tensors by name are read")
    return without_prefixes(state)


def _tied(path: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of a file's tensors."""
    try:
        tied = json.loads(read_metadata(path).get(TIED, "{}"))
        if all(isinstance(name, str) and other in state for name, other in tied.items()):
            return dict(tied)
    except (ValueError, AttributeError, TypeError):
        pass
    raise CheckpointError(f"{path}: the metadata's {TIED!r} should name tensors of the file")


def fill(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load `state` into `module`: every tensor present, of the right shape and finite, and none left over.

    A module on the meta device takes copies of the tensors as its own; any other keeps its storage.

    Raises:
        CheckpointError: quotes the first offending tensor; the module is unchanged.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    if missing:
        raise CheckpointError(
            f"{source}: missing tensor {missing[0]!r} ({len(missing)} missing{_other(missing, extra)})"
        )
    if extra:
        raise CheckpointError(f"{source}: unexpected tensor {extra[0]!r} ({len(extra)} extra)")
    for name, expected in own.items():
        _same_form(state[name], expected, f"{source}: tensor {name!r}")
    empty = any(v.is_meta for v in own.values())
    values = {
        k: state[k].to(v.dtype, copy=empty, memory_format=torch.contiguous_format) for k, v in own.items()
    }
    for name, value in values.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{source}: tensor {name!r} holds NaN or infinity")
    module.load_state_dict(values, assign=empty)


def _same_form(given: Tensor, expected: Tensor, what: str) -> None:
    if given.shape != expected.shape:
        raise CheckpointError(f"{what} has shape {list(given.shape)}, expected {list(expected.shape)}")
    if given.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{what} holds {given.dtype}, expected {expected.dtype}")


def _other(missing: list[str], extra: list[str]) -> str:
    return f", {len(extra)} unexpected such as {extra[0]!r}{nearest(extra[0], missing)}" if extra else ""
