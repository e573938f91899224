"""Projections in the place of a text stream or of an MLP, begun by least squares from the network's states (PPCL)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.compress.calibration import Calibration
from ditkit.compress.cka import Affine, NormalEquations, fit_affine
from ditkit.compress.states import STUDENT, evaluating, record, rows_of, streams_in
from ditkit.core.errors import ConfigError
from ditkit.nn.direction import absolute_distance
from ditkit.nn.narrow import TwoStreams, check_linear, linear_mlps, streams_of


class Pair(NamedTuple):
    """A projection x W^T + b + x, and where its input and what it should give are found.

    Args:
        block: new number. part: "text_proj", "text_resume", or the stream of an MLP. x, y: names of sites, `:in` for
            what one is given. stream: of what they give.
    """

    block: int
    part: str
    x: str
    y: str
    stream: str


def pairs_of(transform: Any, blocks: Any) -> tuple[list[Pair], dict[str, str]]:
    """List the projections of a `Contiguous`, and the students that are asked with the state before their span.

    Args:
        blocks: of the stack, as they were before.
    """
    left, stack = transform.left(len(blocks)), transform.stack
    pairs: list[Pair] = []
    students: dict[str, str] = {}
    for j, width in transform.widths(len(blocks)).items():
        block, (a, b) = left[j], width.group
        reads = width.role in ("read", "resumed")
        if reads:
            rows = [f"{stack}.{n}.attn.text" for n in (a, block.source)]
            pairs.append(Pair(j, "text_proj", rows[0], rows[1], "text"))
        if width.role == "resumed":
            pairs.append(Pair(j, "text_resume", f"{stack}.{a}", f"{stack}.{b}", "text"))
        if width.linear:
            source = blocks[block.source]
            streams = ["image"] if reads or not isinstance(source, TwoStreams) else list(streams_of(source))
            prefix = STUDENT if block.is_student else ""
            if block.is_student:
                students[f"{stack}.{block.source}"] = f"{stack}.{block.first}"
            for stream in streams:
                mlp = "mlp" if stream == "image" else f"{stream}.mlp"
                at = f"{prefix}{stack}.{block.source}.{mlp}:in"
                pairs.append(Pair(j, stream, at, f"{stack}.{block.last}", stream))
    return pairs, students


@dataclass
class Fits:
    """The projections of a `Contiguous`, fitted to calibration.

    Args:
        loss: of each, the mean distance of directions that further training lowers; with a ridge, of the first call.
    """

    maps: dict[tuple[int, str], Affine] = field(default_factory=dict)
    loss: dict[tuple[int, str], float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, calibration: Calibration, transform: Any, depth: int) -> Fits:
        """Fit them: by least squares on all rows at once, or with a ridge from sums over the calls.

        Raises:
            ConfigError: there are too few rows.
        """
        blocks = model.get_submodule(model.stacks()[transform.stack].path)
        pairs, students = pairs_of(transform, blocks)
        rows: dict[Pair, list[tuple[Tensor, Tensor]]] = {pair: [] for pair in pairs}
        sums = {pair: NormalEquations(transform.ridge) for pair in pairs}
        names = {name.removeprefix(STUDENT) for pair in pairs for name in (pair.x, pair.y)}
        with evaluating(model):
            for call in calibration.calls:
                found = record(model, call, sorted(names), students)
                for pair in pairs:
                    x, y = (rows_of(_part(found[name], pair.stream)) for name in (pair.x, pair.y))
                    if transform.ridge:
                        sums[pair].add(x, y - x)
                    if not transform.ridge or not rows[pair]:
                        rows[pair].append((x, y))
        new = cls()
        for pair in pairs:
            x, y = (torch.cat(parts) for parts in zip(*rows[pair], strict=True))
            fitted = sums[pair].solve() if transform.ridge else fit_affine(x, y - x)
            found_map = Affine(*(part.to(x) for part in fitted))
            new.maps[pair.block, pair.part] = found_map
            new.loss[pair.block, pair.part] = absolute_distance(x + found_map(x), y).mean().item()
        return new

    @torch.no_grad()
    def fill(self, blocks: Any) -> None:
        """Write them into the layers of the narrower blocks."""
        for (j, part), fitted in self.maps.items():
            own = linear_mlps(blocks[j])[part] if part in ("image", "text") else getattr(blocks[j], part)
            own.weight.copy_(fitted.weight)
            own.bias.copy_(fitted.bias)

    def errors(self) -> dict[str, float]:
        """Return the losses by block and part."""
        return {f"{j} {part}": round(loss, 6) for (j, part), loss in self.loss.items()}


def candidates(model: Any, calibration: Calibration, transform: Any, depth: int) -> dict[int, float]:
    """Return, by old number, the loss of linear layers in the place of the MLPs of every block that is left."""
    blocks = model.get_submodule(model.stacks()[transform.stack].path)
    firsts = []
    for block in transform.left(depth):
        try:
            check_linear(blocks[block.source], "")
        except ConfigError:
            continue
        firsts.append(block.first)
    trial = replace(transform, linear=tuple(firsts), mlps=0)
    fits = Fits.of(model, calibration, trial, depth)
    old = {j: block.first for j, block in enumerate(transform.left(depth))}
    losses: dict[int, float] = {}
    for (j, part), loss in fits.loss.items():
        if part in ("image", "text"):
            losses[old[j]] = losses.get(old[j], 0.0) + loss
    return losses


def _part(state: Any, stream: str) -> Tensor:
    return state if isinstance(state, Tensor) else streams_in(state)[stream]
