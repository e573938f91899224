"""A family's inputs in training: the tensors that go with latents in a file, and the call that they make.

B batch, C channels, S text rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.slot import Slot


class Inputs(ABC):
    """The call of a transformer in training; the tensors have the names that its pipeline's own call has for them."""

    flow: ClassVar[bool] = True
    """True if the family is of flow matching, where no scheduler says."""

    @abstractmethod
    def latents(self, model: Any) -> tuple[int, tuple[int, ...]]:
        """Return the channels of latents [C, ...] and the numbers that their further axes divide by.

        Raises:
            ConfigError: the transformer takes more than latents, text and times.
        """

    @abstractmethod
    def slots(self, model: Any) -> Mapping[str, Slot]:
        """Return the tensors beside the latents."""

    @abstractmethod
    def arguments(self, model: Any, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> dict[str, Any]:
        """Return the arguments of a call.

        Args:
            x: [B, C, ...]. t: [B], noise-time in [0, 1] of flow matching, or the index of a discrete path.
            guidance: the scale that a distilled network is told.
        """

    def prediction(self, model: Any, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the transformer's output for samples of `shape` as [B, C or 2 C, ...]."""
        return out

    def nothing(self, model: Any) -> Cond | None:
        """Return one row of what a sample without its conditioning is given, if the network has such a thing itself."""
        return None

    def prepare(self, model: Any) -> None:  # noqa: B027
        """Take away what a transformer draws of its own in training: dropout belongs to the sample."""
