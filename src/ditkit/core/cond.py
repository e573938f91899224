"""The conditioning of a model, as one typed object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ditkit.core.config import network
from ditkit.core.errors import ConfigError


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

    def given(self, x: Tensor) -> Tensor:
        """`x` [B, C, ...] with the given content in its place, to the bit; `x` itself where nothing is given."""
        if self.mask is None or self.context is None:
            return x
        return torch.where(self.mask.bool(), x, self.context.to(x.dtype))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """`fn` applied to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: fn(v) for k, v in present.items() if v is not None})

    def to(self, device: torch.device | str) -> Cond:
        return self.map(lambda v: v.to(device))

    def rows(self, index: Tensor | slice) -> Cond:
        """Only the samples `index`."""
        return self.map(lambda v: v[index])

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Batches after one another.

        Raises:
            ConfigError: they are not told the same kinds of things.
        """
        present_names = [[f.name for f in fields(Cond) if getattr(c, f.name) is not None] for c in conds]
        if any(names != present_names[0] for names in present_names):
            raise ConfigError(f"Cond.cat: batches have different conditioning: {present_names}")
        present = present_names[0]
        return Cond(**{name: torch.cat([getattr(c, name) for c in conds]) for name in present})


def label_of(config: object, cond: Cond) -> Tensor:
    """Return the label of each sample, [B], for the network of `config`.

    Raises:
        ConfigError: there is none.
    """
    if cond.label is None:
        raise ConfigError(f"{network(config)}: a class label is needed; Cond.label is None")
    return cond.label
