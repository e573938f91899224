"""Declarations of what a model can be given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One thing that a model can be given: a field of `Cond`, or one of its streams.

    Args:
        shape: of one sample's, None for an axis of any length; () is one number a sample. None is any shape at all.
        dropout: share of training samples in which it counts as absent.
        coded: it is a signal that the model's codec encodes, as it does the sample.
        optional: the model also runs without it.
    """

    shape: tuple[int | None, ...] | None = ()
    dropout: float = 0.0
    coded: bool = False
    optional: bool = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of `shape`, without the batch axis, is of this kind."""
        if self.shape is None:
            return True
        alike = len(shape) == len(self.shape)
        return alike and all(m in (n, None) for n, m in zip(shape, self.shape, strict=True))

    def __str__(self) -> str:
        sides = ("...",) if self.shape is None else ("*" if n is None else str(n) for n in self.shape)
        return "[" + ", ".join(["B", *sides]) + "]"
