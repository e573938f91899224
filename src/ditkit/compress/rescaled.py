"""Lengths of a student's tokens set right: a loss of directions leaves them free (PPCL, arXiv 2511.16156)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ditkit.compress.states import checked, evaluating, record, rows_of, streams_in
from ditkit.core.config import Checked, Count, Finite, Natural
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.loading import load
from ditkit.core.run import Handler, Run
from ditkit.core.transform import Draws, Fed, Transform
from ditkit.nn.feeding import before, given, needed, passed

Factors = tuple[Finite, ...]


@dataclass(frozen=True)
class Rescaled(Checked, Transform):
    """Multiply what students give by constants, so that their tokens are as long as the teacher's.

    Args:
        blocks: numbers of the students in the pruned model. image, text: factors of each; none for 1.
        stack: whose blocks they are.
        original: instead, the model that was pruned, as `ditkit.load` takes it: a factor is 1 over the mean over tokens
            of |s| / |t|, of states of the original that both are given; 1 for the text of a student that reads it.
        steps, samples, seed: of the trajectories that a verb draws as calibration.
    """

    blocks: tuple[Natural, ...] = ()
    image: Factors = ()
    text: Factors = ()
    stack: str = "blocks"
    original: str = ""
    steps: Count = 10
    samples: Count = 8
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image", "text"):
            given_ = getattr(self, name)
            if given_ and len(given_) != len(self.blocks):
                raise ConfigError(
                    f"Rescaled: {name}={given_}, expected as many as blocks={self.blocks}, or none"
                )
        if self.original and self.blocks:
            raise ConfigError(
                f"Rescaled: original={self.original!r} and blocks={self.blocks}, expected one of the two"
            )

    def check(self, model: Any) -> None:
        if self.stack not in model.stacks():
            raise ConfigError("Rescaled: " + unknown("stack", self.stack, model.stacks()))
        count = len(model.get_submodule(model.stacks()[self.stack].path))
        if beyond := [n for n in self.blocks if n >= count]:
            raise ConfigError(
                f"Rescaled: blocks={self.blocks} name block {beyond[0]}, expected 0 to {count - 1}"
            )
        if self.original and not students(model, self.stack):
            raise ConfigError(
                f"Rescaled: the model has no student on {self.stack!r}, expected one that Contiguous pruned"
            )

    def draws(self) -> Draws | None:
        return Draws(self.steps, self.samples, self.seed) if self.original else None

    def resolved(self, model: Any, calibration: Any = None) -> Self:
        if not self.original:
            return self
        calls = checked("Rescaled", calibration, "lengths are measured", tuple(model.sample_shape)).calls
        found = magnitudes(model, load(self.original), calls, self.stack)
        places = tuple(int(name.rpartition(".")[2]) for name in found)
        image = tuple(1 / one["image"] for one in found.values())
        text = tuple(1 / one.get("text", 1.0) for one in found.values())
        any_text = any("text" in one for one in found.values())
        return replace(self, blocks=places, image=image, text=text if any_text else (), original="")

    def shape(self, model: Any) -> Any:
        path = model.stacks()[self.stack].path
        for i, n in enumerate(self.blocks):
            block = model.get_submodule(f"{path}.{n}")
            text = self.text[i] if self.text and getattr(block, "text_role", "own") == "own" else 1.0
            block.register_forward_hook(partial(scaled, self.image[i] if self.image else 1.0, text))
        return model

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        return (cls(blocks=(0,), image=(1.25,), stack=next(iter(model.stacks()))),)

    def exact(self) -> Self:
        return replace(self, blocks=(), image=(), text=(), original="")


def scaled(image: float, text: float, block: nn.Module, args: Any, out: Any) -> Any:
    """Multiply what a block gives, a tensor or a pair of text and image."""
    if isinstance(out, Tensor):
        return out * image
    return (None if out[0] is None else out[0] * text, out[1] * image)


def students(model: Any, stack: str) -> list[Fed]:
    """List the students of a stack."""
    blocks = [one for transform in model.transforms for one in transform.fed(model)]
    return [one for one in blocks if one.is_student and one.block.rpartition(".")[0] == stack]


@torch.no_grad()
def magnitudes(
    pruned: Any, original: Any, calls: Sequence[Mapping[str, Any]], stack: str = "blocks"
) -> dict[str, dict[str, float]]:
    """Return the mean of |s| / |t| over tokens, by student and stream; each student is given the original's state."""
    blocks = students(pruned, stack)
    names = dict.fromkeys(name for one in blocks for name in (*needed(one), one.last))
    totals: dict[str, dict[str, list[float]]] = {one.block: {} for one in blocks}
    kept: dict[str, Any] = {}

    def keep(one: Fed, state: Any, fn: Handler, *args: Any) -> Any:
        kept[one.block] = given(state, fn, *args)
        return kept[one.block]

    with evaluating(pruned), evaluating(original):
        for call in calls:
            taught = record(original, call, names)
            handlers = {site.name: passed for site in pruned.sites() if site.kind == "block"}
            handlers |= {one.block: partial(keep, one, before(one, taught)) for one in blocks}
            pruned(**call, run=Run(handlers))
            for one in blocks:
                own, other = streams_in(kept[one.block]), streams_in(taught[one.last])
                for stream in other:
                    if stream == "image" or one.role == "own":
                        lengths = [rows_of(v[stream]).norm(dim=-1) for v in (own, other)]
                        ratio = lengths[0] / lengths[1].clamp_min(1e-12)
                        totals[one.block].setdefault(stream, []).append(ratio.mean().item())
    return {name: {s: sum(v) / len(v) for s, v in one.items()} for name, one in totals.items()}
