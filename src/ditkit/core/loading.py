"""`load`: a shipped model by its name, a folder by its path, or a model of the hub by its id."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

import torch

from ditkit.core.devices import WANTED, Placement
from ditkit.core.errors import CheckpointError, ConfigError, unknown
from ditkit.core.files import is_folder
from ditkit.core.model import CONFIG, Model

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Model:
    """Load a model in eval mode, on the CPU and in float32 unless told otherwise.

    Args:
        source: the name of a shipped model (`shipped()`), a folder that `Model.save` wrote, or `owner/name`
            on the hub. A shipped name wins over a folder of that name: write `./emoji` for the folder.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto", the best that there is. Samples, conditions and what policies
            keep follow the weights.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: it is none of these, or the device is not there. CheckpointError: what is there is damaged or
            incomplete, or the hub has no such model or cannot be reached.
    """
    wanted = WANTED.get() if device is None and dtype is None else Placement.read(device, dtype)
    return wanted.place(_loaded(source))


def _loaded(source: str | Path) -> Model:
    text = str(source)
    if text in shipped():
        return Model.load(_weights() / text)
    folder = Path(os.path.expanduser(text))
    if is_folder(folder):
        return Model.load(folder)
    if isinstance(source, str) and HUB_ID.fullmatch(text):
        return _from_hub(text)
    raise ConfigError(f"{unknown('model', text, shipped())}, and there is no folder of that name")


def shipped() -> tuple[str, ...]:
    """Names of the models inside the package."""
    if not _weights().is_dir():
        return ()
    return tuple(sorted(folder.name for folder in _weights().iterdir() if (folder / CONFIG).is_file()))


def _from_hub(name: str) -> Model:
    """Load a model of the Hub.

    A mistyped folder of two parts comes here as well, so the error names that first.
    """
    try:
        return Model.from_pretrained(name)
    except CheckpointError as error:
        message = str(error).removeprefix(f"no model folder and no model of the hub at {name}: ")
        sentence = message.partition("\n")[0].partition(". ")[0].rstrip(".")
        raise CheckpointError(f"no folder {name!r}, and the hub: {sentence}") from error


def _weights() -> Path:
    return Path(str(files("ditkit"))) / "weights"
