"""Predictions of a trained graph model for pairs or nodes at a moment of an event set."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.data.events import EventSet
from ditkit.models.todyformer import Todyformer
from ditkit.nn.patches import Patches, patchify


def patches_before(events: EventSet, i: int, window: int, patches: int, neighbours: int = 0) -> Patches:
    """Cut the last `window` events that are strictly earlier than event `i` into patches.

    Raises:
        DataError: there are fewer than patches.
    """
    return patchify(*events.window(i, window), count=patches, neighbours=neighbours)


def answer(model: Todyformer, events: EventSet, i: int, ids: Tensor) -> Tensor:
    """Predict the logits of pairs [P, 2] or nodes [P] at the moment of event `i`, before it happens; on the CPU."""
    config, device = model.config, next(model.parameters()).device
    patches = patches_before(events, i, config.window, config.patches, config.neighbours)
    with torch.no_grad():
        return model(patches.to(device), ids.to(device)).cpu()
