"""Initial weights that several networks share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def adaln_zero_(model: Any, *tables: Tensor) -> None:
    """Initialise as DiT (arXiv 2212.09748, section 3.2): every gate is shut, and the first output is 0.

    Layers are Xavier-uniform with zero biases, embeddings N(0, 0.02), each layer's `modulation` and `head.out` zero.
    Branches without modulation, such as VDT's along time, are not zero at first.

    Args:
        model: a network with a `head`.
        tables: weights that are drawn as embeddings after all layers, in this order: those of the time embedding,
            and of embeddings that are not drawn where they stand among the layers.
    """
    late = set(map(id, tables))
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding) and id(part.weight) not in late:
            nn.init.normal_(part.weight, std=0.02)
    for table in tables:
        nn.init.normal_(table, std=0.02)
    gates = [
        part.modulation
        for part in model.modules()
        if isinstance(getattr(part, "modulation", None), nn.Linear)
    ]
    for layer in (*gates, model.head.out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
