"""Declarations of what a model can be given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One thing that a model can be given: a field of `Cond`, or one of its streams.

    Args:
        shape: of one sample's, None for an axis of any length; () is one number a sample.
        dropout: share of training samples in which it counts as absent.
        coded: it is a signal that the model's codec encodes, as it does the sample.
        optional: the model also runs without it.
    """

    shape: tuple[int | None, ...] = ()
    dropout: float = 0.0
    coded: bool = False
    optional: bool = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of `shape`, without the batch axis, is of this kind."""
        return len(shape) == len(self.shape) and all(
            n == m or m is None for n, m in zip(shape, self.shape, strict=True)
        )

    def __str__(self) -> str:
        return "[" + ", ".join(["B", *("*" if n is None else str(n) for n in self.shape)]) + "]"
