"""Networks that judge or teach and are trained no further: a folder with `config.json` and safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ditkit.core.checkpoint import fill, read_json, read_state, write_json, write_state
from ditkit.core.config import config_of
from ditkit.core.errors import CheckpointError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


N = TypeVar("N", bound=nn.Module)


def save_network(network: nn.Module, folder: str | Path) -> Path:
    """Write the network's config and weights to `folder`, which is returned."""
    folder = Path(folder)
    write_state(folder / WEIGHTS, network.state_dict())
    described = {"network": type(network).__name__, "config": dataclasses.asdict(network.config)}  # type: ignore[call-overload]
    write_json(folder / CONFIG, described)
    return folder


def load_network(kind: Callable[[Any], N], folder: str | Path) -> N:
    """Read a network of class `kind` that `save_network` wrote: in eval mode, without gradients.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or holds another network.
    """
    path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    described, name = read_json(path), kind.__name__
    if described.get("network") != name:
        raise CheckpointError(f"{path} holds a {described.get('network')}, expected a {name}")
    network = kind(config_of(kind.Config, described.get("config"), path))  # type: ignore[attr-defined]
    fill(network, read_state(weights), weights)
    return network.eval().requires_grad_(False)
