"""Predicted links over time, and predicted classes of nodes, as pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.model import Model
from ditkit.data.events import EventSet
from ditkit.models.todyformer import Todyformer
from ditkit.tasks.graph.predict import answer

ROWS, COLUMNS = 16, 60
"""Destinations and moments that a picture has room for."""
DPI = 110
HOUR = 3600.0


def links_over_time(
    model: Todyformer, events: EventSet, span: range, source: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predict one node's links in a span of events.

    Args:
        source: the node; the one with most events in the span unless given.

    Returns:
        The node, destinations [R] with most of its events first, indices of events [C] at which the model predicts,
        and probabilities [R, C], each from what is strictly earlier.
    """
    pairs = events.pairs[span.start : span.stop]
    if not events.directed:
        pairs = torch.cat([pairs, pairs.flip(1)])
    node = pairs[:, 0].mode().values if source is None else torch.tensor(source)
    met = torch.bincount(pairs[pairs[:, 0] == node, 1], minlength=len(events.nodes))
    others = events.candidates[events.candidates != node]
    rows = others[met[others].argsort(descending=True, stable=True)[:ROWS]]
    moments = torch.linspace(span.start, span.stop - 1, min(COLUMNS, len(span))).long().unique()
    links = torch.stack([node.expand(len(rows)), rows], 1)
    odds = [answer(model, events, i, links).sigmoid() for i in moments.tolist()]
    return node, rows, moments, torch.stack(odds, 1)


def draw_links(model: Todyformer, events: EventSet, span: range, source: int | None = None) -> bytes:
    """Draw `links_over_time` as PNG: darker is likelier, a ring is an event that happened up to the next moment."""
    node, rows, moments, odds = links_over_time(model, events, span, source)
    figure, axes = _figure(len(rows))
    hours = (events.time[moments] - events.time[span.start]) / HOUR
    shown = axes.imshow(odds.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.plot(*_happened(events, span, node, rows, moments), "o", ms=5, mfc="none", mec="#d97706", mew=1.4)
    axes.set_yticks(range(len(rows)), [events.nodes[i] for i in rows.tolist()], fontsize=8)
    ticks = torch.linspace(0, len(moments) - 1, 6).long().unique()
    axes.set_xticks(ticks.tolist(), [f"{hours[i]:.3g}" for i in ticks.tolist()], fontsize=8)
    axes.set_xlabel("hours since the first event shown (columns are equal counts of events)", fontsize=9)
    axes.set_title(
        f"{events.name}: predicted links of {events.nodes[node]}; rings are events that happened", fontsize=10
    )
    figure.colorbar(shown, ax=axes, pad=0.01).set_label(
        "predicted probability against a random node", fontsize=8
    )
    return _png(figure)


def _happened(
    events: EventSet, span: range, node: Tensor, rows: Tensor, moments: Tensor
) -> tuple[list[int], list[int]]:
    """Find columns and rows of the node's events in the span."""
    pairs = events.pairs[span.start : span.stop]
    columns = torch.searchsorted(moments, torch.arange(span.start, span.stop), right=True) - 1
    both = [pairs] if events.directed else [pairs, pairs.flip(1)]
    found = {
        (int(columns[i]), row)
        for ends in both
        for row, other in enumerate(rows.tolist())
        for i in ((ends[:, 0] == node) & (ends[:, 1] == other)).nonzero().flatten().tolist()
    }
    return [c for c, _ in sorted(found)], [r for _, r in sorted(found)]


def draw_classes(model: Todyformer, events: EventSet, span: range) -> bytes:
    """Draw as PNG, for each class, the shares of its nodes by the class that the model gives them after a span."""
    nodes = events.pairs[span.start : span.stop].unique()
    nodes = nodes[events.labels[nodes] >= 0]
    found = answer(model, events, span.stop - 1, nodes).argmax(-1)
    count = len(events.classes)
    table = (
        torch.bincount(events.labels[nodes] * count + found, minlength=count**2).view(count, count).float()
    )
    table = table / table.sum(1, keepdim=True).clamp_min(1)
    figure, axes = _figure(count)
    shown = axes.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(count), events.classes, fontsize=8)
    axes.set_yticks(range(count), events.classes, fontsize=8)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("class", fontsize=9)
    axes.set_title(f"{events.name}: classes of {len(nodes)} nodes, training ones too", fontsize=10)
    figure.colorbar(shown, ax=axes, pad=0.01).set_label("share of the class", fontsize=8)
    return _png(figure)


def write_links(folder: Path, events: EventSet, span: range, model: Model, step: int) -> None:
    """Write `draw_links` into `folder`, named after the step."""
    assert isinstance(model, Todyformer)
    _write(folder, step, draw_links(model, events, span))


def write_classes(folder: Path, events: EventSet, span: range, model: Model, step: int) -> None:
    """Write `draw_classes` into `folder`, named after the step."""
    assert isinstance(model, Todyformer)
    _write(folder, step, draw_classes(model, events, span))


def _write(folder: Path, step: int, picture: bytes) -> None:
    with replacing(folder / f"step-{step:07d}.png") as draft:
        draft.write_bytes(picture)


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.28 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
