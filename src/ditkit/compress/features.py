"""Temporal features as a network has them when it runs, and how far a quantised one's are from the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def temporal_features(
    model: Any, layers: Sequence[str], calls: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Return what each of `layers` gives in calls of the model, [rows, N], those of all calls after one another."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str, _: nn.Module, __: Any, out: Tensor) -> None:
        found[name].append(out.flatten(0, -2))

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in layers]
    try:
        for call in calls:
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def cosines(own: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> Tensor:
    """Return the cosine of each feature with the original's, [layers, rows]."""
    return torch.stack([F.cosine_similarity(own[name], full[name], -1) for name in full])


def mistaken(own: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> Tensor:
    """Return which features are nearer to those of another time than to their own, bool [layers, rows].

    The row of argmax_t' cos(e_t', e^_t) is not t: the network takes one step for another.
    """
    found = []
    for name, target in full.items():
        similar = F.normalize(own[name], dim=-1) @ F.normalize(target, dim=-1).mT
        found.append(similar.argmax(1) != torch.arange(len(target), device=similar.device))
    return torch.stack(found)
