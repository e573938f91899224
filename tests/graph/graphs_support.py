"""Small event sets, and slow obvious twins of what the graph code does fast: loops over nodes, no tensors of rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ditkit.data.events import EventSet, Window
from ditkit.models.todyformer import Todyformer, TodyformerConfig
from models_support import perturbed

CONTACTS, PEOPLE, FEATURES = 60, 8, 2


def contacts(
    events: int = CONTACTS, people: int = PEOPLE, features: int = FEATURES, seed: int = 0, **changes: Any
) -> EventSet:
    """Random events between `people` nodes, several of them at the same time stamp, some pairs more than once."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.randint(people, (events,), generator=draw)
    destination = (source + 1 + torch.randint(people - 1, (events,), generator=draw)) % people
    given = {
        "name": "contacts",
        "source": source,
        "destination": destination,
        "time": (torch.randint(0, 3, (events,), generator=draw).cumsum(0) * 20.0).double(),
        "features": torch.randn(events, features, generator=draw),
        "nodes": tuple(f"p{i}" for i in range(people)),
        "labels": torch.arange(people) % 3,
        "classes": ("a", "b", "c"),
    }
    return EventSet(**{**given, **changes})


def small(**changes: Any) -> TodyformerConfig:
    """Two blocks of each kind, four patches."""
    given = {"width": 8, "heads": 2, "layout": "LG*2", "window": 40, "patches": 4, "features": FEATURES}
    return TodyformerConfig(**{**given, **changes})


def awake(config: TodyformerConfig | None = None) -> Todyformer:
    """A model in float64 with no weight at zero."""
    return perturbed(Todyformer(config or small()), 0.3).double()


def twin_patches(window: Window, count: int) -> list[list[int]]:
    """The events of each patch: equal counts, the last may be shorter."""
    total = len(window.source)
    size = math.ceil(total / count)
    return [list(range(first, min(first + size, total))) for first in range(0, total, size)]


def twin_edges(window: Window, events: list[int], node: int) -> list[tuple[int, int]]:
    """(other node, event) of every edge of `node` in a patch, both directions; a loop counts at both ends."""
    found = []
    for e in events:
        s, d = int(window.source[e]), int(window.destination[e])
        found += [(d, e)] if s == node else []
        found += [(s, e)] if d == node else []
    return found


def twin_structure(window: Window, events: list[int], node: int, other: int) -> list[int]:
    """Degree of both, in events, and the number of their common neighbours, in one patch."""
    around = {n: twin_edges(window, events, n) for n in (node, other)}
    sets = [{j for j, _ in around[n]} for n in (node, other)]
    return [len(around[node]), len(around[other]), len(sets[0] & sets[1])]


def twin_embeddings(model: Todyformer, window: Window, count: int) -> dict[int, Tensor]:
    """The embedding of every node of a window, by loops over patches, nodes and edges."""
    config, patches = model.config, twin_patches(window, count)
    ages = window.age.double()
    present = {
        m: sorted({int(n) for e in events for n in (window.source[e], window.destination[e])})
        for m, events in enumerate(patches)
    }
    h: dict[tuple[int, int], Tensor] = {
        (n, m): model.first_tokens(window.node_features[n : n + 1].double())[0]
        for m, nodes in present.items()
        for n in nodes
    }
    for block, kind in zip(model.blocks, model.kinds, strict=True):
        fresh = {}
        if kind == "L":
            for (n, m), x in h.items():
                around = twin_edges(window, patches[m], n)
                tokens = [_twin_edge(model, window, patches[m], n, j, e, ages) for j, e in around]
                fresh[n, m] = _twin_local(block, x, [h[j, m] for j, _ in around], tokens)
        else:
            for n in {n for n, _ in h}:
                own = [m for m in range(len(patches)) if (n, m) in h]
                stamps = torch.stack([ages[patches[m][-1]] for m in own])
                places = torch.tensor([count - len(patches) + m for m in own])
                x = torch.stack([h[n, m] for m in own]) + block.position(stamps, places)
                out = _twin_global(block, x)
                fresh |= {(n, m): row for m, row in zip(own, out, strict=True)}
        h = fresh
    found = {}
    for n in {n for n, _ in h}:
        own = [h[n, m] for m in range(len(patches)) if (n, m) in h]
        found[n] = model.norm(own[-1] if config.readout == "last" else torch.stack(own).mean(0))
    return found


def _twin_edge(
    model: Todyformer, window: Window, events: list[int], n: int, j: int, e: int, ages: Tensor
) -> Tensor:
    counts = torch.tensor(twin_structure(window, events, n, j), dtype=torch.float64).log1p()
    own = torch.cat([counts, window.features[e].double()])
    wave = torch.cos(ages[e] * model.time.frequency + model.time.phase)
    return wave + model.structure.outer(torch.relu(model.structure.inner(own)))


def _twin_local(block: Any, x: Tensor, others: list[Tensor], tokens: list[Tensor]) -> Tensor:
    heads, width = block.heads, len(x)
    q = block.q(x).view(heads, -1)
    kv = [block.node(h) + block.edge(e) for h, e in zip(others, tokens, strict=True)]
    k = torch.stack([row[:width].view(heads, -1) for row in kv])
    v = torch.stack([row[width:].view(heads, -1) for row in kv])
    weight = ((q * k).sum(-1) / math.sqrt(width // heads)).softmax(0)
    return torch.relu(x + (weight[..., None] * v).sum(0).flatten())


def _twin_global(block: Any, x: Tensor) -> Tensor:
    h, attn = block.norm_attn(x), block.attn
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.heads, -1)).permute(1, 2, 0, 3)
    o = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    x = x + attn.out(o.transpose(0, 1).flatten(1))
    return x + block.mlp(block.norm_mlp(x))
