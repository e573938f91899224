"""The conditioning of a model, as one typed object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.condition import Condition
from ditkit.core.config import network
from ditkit.core.errors import ConfigError, ShapeError, unknown

MAPPINGS = ("streams", "absent")
"""Fields of `Cond` that hold tensors by name."""
DECLARED = ("vector", "frames", "text", "maps")
"""Fields of `Cond` that a model takes only if it declares them."""

UNDECLARED: Mapping[str, Condition] = {name: Condition(None) for name in DECLARED}
"""Conditions that a model can be given and whose config does not name them."""


@dataclass(frozen=True)
class Cond:
    """Conditioning of a batch; what a model does not use stays None. Every tensor's first axis is the batch.

    Args:
        label: [B] class indices.
        drop: [B] bool, samples whose label or text counts as absent. Given in training, so that dropout belongs to
            the sample; a model in train mode that is given none draws its own.
        vector: [B, D] a global embedding.
        frames: [B, T, D] an embedding per frame.
        text: [B, S, D] text tokens, with `text_mask` [B, S] true where a token is real.
        maps: [B, C, ...] maps aligned with the sample's own axes.
        context: [B, C, T, H, W] given content, of the sample's own shape, read where `mask` is 0.
        mask: [B, 1, T, H, W], 1 where content is to be made, 0 where `context` gives it (VDT, section 3.3).
            Without a mask, all is to be made.
        pixels: [B, C, H, W] of the very signal that a latent codes, for losses that look at it; no model reads them.
        streams: further tensors by name, [B, ...] of any shape: audio, camera, action, a source of another length.
            A model says in `conditions` which it can be given.
        absent: [B] bool by name of a condition, samples in which that one alone counts as absent; what is not named
            here follows `drop`, if it is the label or the text.
    """

    label: Tensor | None = None
    drop: Tensor | None = None
    vector: Tensor | None = None
    frames: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    maps: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None
    pixels: Tensor | None = None
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    absent: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.tensors():
            if not isinstance(value, Tensor):
                raise ConfigError(f"Cond.{name}: got {type(value).__name__}, expected a torch.Tensor")

    def dropped(self, name: str) -> Tensor | None:
        """Return the samples [B] bool in which a condition counts as absent; None where nothing says so."""
        return self.absent.get(name, self.drop if name in ("label", "text") else None)

    def given(self, x: Tensor) -> Tensor:
        """`x` [B, C, ...] with the given content in its place, to the bit; `x` itself where nothing is given."""
        if self.mask is None or self.context is None:
            return x
        return torch.where(self.mask.bool(), x, self.context.to(x.dtype))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that is present, those of `streams` and `absent` as streams.NAME and absent.NAME."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in MAPPINGS:
                yield from ((f"{f.name}.{name}", one) for name, one in value.items())
            elif value is not None:
                yield f.name, value

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """`fn` applied to every tensor that is present."""
        return _built({name: fn(value) for name, value in self.tensors()})

    def to(self, device: torch.device | str) -> Cond:
        return self.map(lambda v: v.to(device))

    def rows(self, index: Tensor | slice) -> Cond:
        """Only the samples `index`."""
        return self.map(lambda v: v[index])

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Batches after one another; texts of several lengths are padded to the longest, and masked there.

        Raises:
            ConfigError: they are not given the same kinds of things.
            ShapeError: one of them has several shapes, and is no text.
        """
        present = [dict(c.tensors()) for c in _padded(conds)]
        names = [list(one) for one in present]
        if any(sorted(one) != sorted(names[0]) for one in names):
            raise ConfigError(f"Cond.cat: batches have different conditioning: {names}")
        for name in names[0]:
            shapes = [list(one[name].shape[1:]) for one in present]
            if any(shape != shapes[0] for shape in shapes):
                raise ShapeError(f"Cond.cat: {name} of samples of {shapes}, expected one shape")
        return _built({name: torch.cat([one[name] for one in present]) for name in names[0]})

    @staticmethod
    def joins(conds: Sequence[Cond]) -> bool:
        """Return whether `cat` takes these."""
        shapes = [{name: value.shape[1:] for name, value in c.tensors()} for c in _padded(conds)]
        return all(one == shapes[0] for one in shapes)


def _built(tensors: Mapping[str, Tensor]) -> Cond:
    """Undo `Cond.tensors`."""
    plain: dict[str, Any] = {name: value for name, value in tensors.items() if "." not in name}
    for kind in MAPPINGS:
        at = kind + "."
        plain[kind] = {name.removeprefix(at): value for name, value in tensors.items() if name.startswith(at)}
    return Cond(**plain)


def _padded(conds: Sequence[Cond]) -> Sequence[Cond]:
    """Give all texts the length of the longest, and a mask where lengths differ."""
    lengths = {c.text.shape[1] for c in conds if c.text is not None}
    masked = {c.text_mask is not None for c in conds if c.text is not None}
    if len(lengths) < 2 and len(masked) < 2:
        return conds
    longest, out = max(lengths), []
    for c in conds:
        if c.text is None:
            out.append(c)
            continue
        mask = torch.ones_like(c.text[..., 0], dtype=torch.bool) if c.text_mask is None else c.text_mask
        missing = longest - c.text.shape[1]
        out.append(replace(c, text=F.pad(c.text, (0, 0, 0, missing)), text_mask=F.pad(mask, (0, missing))))
    return out


def check_cond(name: str, conditions: Mapping[str, Condition], cond: Cond, count: int) -> None:
    """Refuse what a model cannot be given: a text that it has no place for, an unknown stream, another shape.

    Labels and given content are checked by who reads them.

    Args:
        name: of the model. count: of samples.

    Raises:
        ConfigError: the model takes no such thing, or needs something that is missing.
        ShapeError: it is of another shape.
    """
    for kind in DECLARED:
        if getattr(cond, kind) is not None and kind not in conditions:
            raise ConfigError(f"{name}: got Cond.{kind}, expected none: it takes {listed(conditions)}")
    for stream in cond.streams:
        if stream not in conditions:
            raise ConfigError(f"{name}: " + unknown("stream", stream, conditions or ("none",)))
    for kind, condition in conditions.items():
        value = cond.streams.get(kind, getattr(cond, kind, None))
        if value is None and not condition.optional:
            raise ConfigError(f"{name}: {kind} is needed, {condition}; got none")
        if value is None or kind == "label":
            continue
        if len(value) != count or not condition.fits(tuple(value.shape[1:])):
            expected = str(condition).replace("B", str(count), 1)
            raise ShapeError(f"{name}: {kind} {list(value.shape)} should be {expected}")


def listed(conditions: Mapping[str, Condition]) -> str:
    """List what a model can be given, for errors."""
    return ", ".join(conditions) or "no condition"


def label_of(config: object, cond: Cond) -> Tensor:
    """Return the label of each sample, [B], for the network of `config`.

    Raises:
        ConfigError: there is none.
    """
    if cond.label is None:
        raise ConfigError(f"{network(config)}: a class label is needed; Cond.label is None")
    return cond.label
